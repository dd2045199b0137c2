"""A language model without matrix products: characters of Shakespeare, the same text on every target.

    EDGEMAT_DATA=/path/to/data python examples/shakespeare_lm.py [--size 1M] [--steps 4000] [--output build/shakespeare]

The folder EDGEMAT_DATA holds tinyshakespeare/input.txt. Three models of equal size are trained: the ternary one, the
same architecture in float, and a float transformer (--models picks some of them). Training stops with Ctrl-C and goes
on: each model is kept in a checkpoint, and the same call with the same --output resumes it. Then the ternary model is
exported as the step of one token and writes text. torch, onnxruntime, the HLS C++ and the C library on an emulated
microcontroller must agree on every logit and every state of that text, and each draws the same characters from the
logits it returned itself.
"""

import argparse
import math
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat import formats
from edgemat.lower import read
from edgemat.nn import MatMulFreeLM

SIZES = {  # dim, layers, hidden
    "tiny": (16, 1, 24),
    "1M": (192, 2, 576),
    "2M": (256, 2, 768),
    "3M": (256, 4, 704),
}
LEARNING_RATES = {"ternary": 4e-3, "float": 4e-3, "transformer": 1e-3}
HELD_OUT = 0.1  # share of the text, at its end


# -- the float models -------------------------------------------------------------------------------------------------
class FloatMixer(nn.Module):
    """The token mixer of the ternary model in float, `edgemat.nn.MLGRU` in the paper's form."""

    def __init__(self, dim):
        super().__init__()
        self.forget, self.candidate, self.gate, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x):
        f, c, g = torch.sigmoid(self.forget(x)), F.silu(self.candidate(x)), torch.sigmoid(self.gate(x))
        h, states = torch.zeros_like(f[:, 0]), []
        for f_t, c_t in zip(f.unbind(1), c.unbind(1), strict=True):
            h = torch.lerp(c_t, h, f_t)
            states.append(h)
        return self.out(normalised(g * torch.stack(states, 1)))


class FloatGLU(nn.Module):
    """The channel mixer of the ternary model in float, `edgemat.nn.GLU`."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.gate, self.up = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x):
        return self.down(normalised(F.silu(self.gate(x)) * self.up(x)))


class FloatLM(nn.Module):
    """`edgemat.nn.MatMulFreeLM` with float weights and activations, initialised as it is."""

    def __init__(self, vocabulary, dim, layers, hidden):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary, bias=False)
        self.mixers = nn.ModuleList(FloatMixer(dim) for _ in range(layers))
        self.channels = nn.ModuleList(FloatGLU(dim, hidden) for _ in range(layers))
        for name, weight in self.named_parameters():
            if name.startswith("mixers"):
                nn.init.xavier_uniform_(weight, gain=2.0**-2.5)
            else:
                nn.init.normal_(weight, std=0.02 / (math.sqrt(2 * layers) if "down" in name else 1.0))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for mixer, channel in zip(self.mixers, self.channels, strict=True):
            x = x + mixer(normalised(x))
            x = x + channel(normalised(x))
        return self.head(normalised(x))


class Transformer(nn.Module):
    """A causal transformer with learned positions, as many weights in a block as the models above."""

    def __init__(self, vocabulary, dim, layers, hidden, length):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, dim), nn.Linear(dim, vocabulary, bias=False)
        self.positions = nn.Parameter(torch.zeros(length, dim))
        options = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        block = nn.TransformerEncoderLayer(dim, dim // 32 or 1, 3 * hidden // 2, **options)
        self.blocks = nn.TransformerEncoder(block, layers, nn.LayerNorm(dim), enable_nested_tensor=False)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, tokens):
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        return self.head(self.blocks(self.embedding(tokens) + self.positions[:length], mask, is_causal=True))


def normalised(x):
    return F.rms_norm(x, x.shape[-1:], eps=1e-8)


# -- text and training ------------------------------------------------------------------------------------------------
def load(folder):
    """The characters in order, and the text as their numbers: training part and held-out part."""
    text = Path(folder, "tinyshakespeare", "input.txt").read_text()
    characters = sorted(set(text))
    number = {character: i for i, character in enumerate(characters)}
    tokens = torch.tensor([number[character] for character in text])
    split = int(len(tokens) * (1 - HELD_OUT))
    return characters, tokens[:split], tokens[split:]


def batch_of(tokens, generator, batch, length):
    """Random windows of the text: ``[batch, length + 1]``."""
    starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
    return tokens[starts[:, None] + torch.arange(length + 1)]


def loss_of(model, windows):
    """Mean cross-entropy of the next character, in nats."""
    logits = model(windows[:, :-1]).float()
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model, tokens, length, windows):
    """The loss on successive windows, spread over the held-out text; the first token of each is read from nothing."""
    starts = torch.linspace(0, len(tokens) - length - 1, windows).long()
    chosen = tokens[starts[:, None] + torch.arange(length + 1)]
    model.eval()
    loss = sum(loss_of(model, part).item() * len(part) for part in chosen.split(32)) / windows
    model.train()
    return loss


def progress(name, step, steps, loss, began, first):
    """One line that is written over on a terminal, and a line now and then elsewhere."""
    terminal = sys.stdout.isatty()
    if not terminal and step % max(1, steps // 20) and step != steps:
        return
    filled = 24 * step // steps
    left = (time.time() - began) / max(1, step - first) * (steps - step)
    bar = "#" * filled + "." * (24 - filled)
    line = f"  {name:11} [{bar}] {step}/{steps}, loss {loss:.3f}, {left:.0f} s left"
    print(f"\r{line}" if terminal else line, end="" if terminal and step < steps else "\n", flush=True)


def train(model, name, text, options):
    """Trains up to ``--steps``, from the checkpoint if there is one; the learning rate follows a cosine."""
    checkpoint = options.output / f"{name}.pt"
    generator = torch.Generator().manual_seed(1)
    peak = LEARNING_RATES[name] if options.lr is None else options.lr
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.0)
    step, warmup = 0, min(100, options.steps // 10 + 1)
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        if kept["setting"] != setting_of(options):
            raise SystemExit(f"{checkpoint} has the setting {kept['setting']}, expected {setting_of(options)}")
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        generator.set_state(kept["generator"])
        step = kept["step"]
        print(f"  {name}: resumed at step {step}")
    first, began, smooth = step, time.time(), math.nan
    model.train()
    with interruptible() as stopped:
        while step < options.steps:
            share = max(0.0, (step - warmup) / max(1, options.steps - warmup))
            rate = peak * min((step + 1) / warmup, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_of(model, batch_of(text, generator, options.batch, options.length))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            smooth = loss.item() if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss.item()
            progress(name, step, options.steps, smooth, began, first)
            last = step == options.steps or bool(stopped)
            if step % 200 == 0 or last:
                states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                whole = {**states, "generator": generator.get_state(), "setting": setting_of(options)}
                torch.save(whole, f"{checkpoint}.part")
                os.replace(f"{checkpoint}.part", checkpoint)
            if last:
                break
    if step < options.steps:
        print(f"\n  {name}: stopped at step {step}, kept in {checkpoint}; the same call goes on from there")
        raise SystemExit(130)
    model.eval()


@contextmanager
def interruptible():
    """A list that is no longer empty after Ctrl-C: no step is cut in two. A second Ctrl-C interrupts at once."""
    stopped = []

    def stop(*_):
        stopped.append(True)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def setting_of(options):
    return [options.size, options.steps, options.batch, options.length, options.lr]


# -- writing ----------------------------------------------------------------------------------------------------------
def write(step, prompt, draws, temperature):
    """Feeds the prompt and then what was drawn, one character for each of `draws`.

    Args:
        step: One token to its logits.
        prompt: Tokens to begin with.
        draws: Random numbers from 0 to 1, one for each token to write.
        temperature: Divides the logits.
    """
    tokens = list(prompt)
    for token in tokens:
        logits = step(token)
    for draw in draws:
        tokens.append(drawn(logits, draw, temperature))
        logits = step(tokens[-1])
    return tokens


def drawn(logits, draw, temperature):
    """The token that a random number from 0 to 1 picks by the softmax of logits."""
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    shares = np.cumsum(np.exp(scaled))
    return int(np.searchsorted(shares, draw * shares[-1], side="right"))


def written(codes, format, prompt, draws, temperature):
    """The text a backend writes: each token drawn from the logit codes that it returned itself.

    Args:
        codes: What it returned for the steps of a text that begins with the prompt, ``[T, 1, vocabulary]``. It is the
            backend's own text as long as the tokens returned are those it was given next.
        format: Of the codes.
        prompt, draws, temperature: As for `write`.
    """
    logits = formats.dequantize(codes[len(prompt) - 1 :, 0], format)
    return [*prompt, *(drawn(row, draw, temperature) for row, draw in zip(logits, draws, strict=False))]


def equal_tokens(text, other):
    """How many tokens are equal up to the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b), len(text))


def torch_step(model):
    model.reset()

    @torch.no_grad()
    def step(token):
        return model.step(torch.tensor([token]))[0].numpy()

    return step


def onnxruntime_step(file):
    """One step under a stock onnxruntime; the states are handed from output to input."""
    session = onnxruntime.InferenceSession(str(file))
    kinds = {"tensor(int8)": np.int8, "tensor(int16)": np.int16, "tensor(int32)": np.int32}
    token_input, *state_inputs = session.get_inputs()
    outputs = [output.name for output in session.get_outputs()]
    feed = {held.name: np.zeros([1, *held.shape[1:]], kinds[held.type]) for held in state_inputs}

    def step(token):
        made = dict(
            zip(outputs, session.run(None, {token_input.name: np.array([token], np.float32), **feed}), strict=True)
        )
        for name in feed:
            feed[name] = made[f"{name}.next"]
        return made[outputs[0]][0]

    return step


def report_losses(losses):
    """A table: each model's loss and size, and the ternary model's loss over it."""
    print(f"\n  {'':11} {'parameters':>10}  {'validation loss, nats per character':>36}  {'ternary / it':>12}")
    for name, (loss, parameters) in losses.items():
        ratio = f"{losses['ternary'][0] / loss:.3f}" if "ternary" in losses and name != "ternary" else ""
        print(f"  {name:11} {parameters:10,}  {loss:36.4f}  {ratio:>12}".rstrip())
    print(flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--size", choices=SIZES, default="1M", help="about as many parameters")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=128, help="characters of a training window")
    parser.add_argument("--lr", type=float, help="peak learning rate; by default one for each model")
    parser.add_argument("--models", default="ternary,float,transformer", help="which to train, separated by commas")
    parser.add_argument("--tokens", type=int, default=1000, help="characters to write")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--backends", default="onnx,hls,mcu:cortex-m4", help="where the text is compared")
    parser.add_argument("--reuse", type=int, default=64, help="weights that share an adder in the HLS C++")
    parser.add_argument("--output", type=Path, default=Path("build/shakespeare_lm"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds tinyshakespeare/input.txt")
    if options.quick:
        options.size, options.steps, options.batch, options.length, options.tokens = "tiny", 3, 4, 16, 12

    characters, text, held_out = load(os.environ["EDGEMAT_DATA"])
    options.output.mkdir(parents=True, exist_ok=True)
    dim, layers, hidden = SIZES[options.size]
    sizes = len(characters), dim, layers
    makers = {
        "ternary": lambda: MatMulFreeLM(*sizes, hidden=hidden),
        "float": lambda: FloatLM(*sizes, hidden),
        "transformer": lambda: Transformer(*sizes, hidden, options.length),
    }
    models, losses = {}, {}
    for name in options.models.split(","):
        torch.manual_seed(0)
        models[name] = model = makers[name]()
        if name == "ternary":
            edgemat.calibrate(model, [batch_of(text, torch.Generator().manual_seed(2), 8, options.length)[:, :-1]])
        train(model, name, text, options)
        loss = validate(model, held_out, options.length, 8 if options.quick else 256)
        losses[name] = loss, sum(p.numel() for p in model.parameters())
    report_losses(losses)
    if "ternary" not in models:
        return 0
    return deploy(models["ternary"], characters, options)


def deploy(model, characters, options):
    """Exports the step, writes text, compares every backend on it."""
    file = options.output / "lm.onnx"
    model.reset()
    edgemat.to_onnx(model, (torch.zeros(1, dtype=torch.int64),), file)
    prompt = [characters.index(character) for character in "\n"]
    draws = np.random.default_rng(0).random(options.tokens)
    tokens = write(torch_step(model), prompt, draws, options.temperature)
    assert write(onnxruntime_step(file), prompt, draws, options.temperature) == tokens, "onnxruntime differs"
    print(f"{options.tokens} characters, drawn under onnxruntime one by one: those of torch\n{'-' * 60}")
    print("".join(characters[token] for token in tokens[1:]) + f"\n{'-' * 60}", flush=True)

    model.reset()
    backends = tuple(options.backends.split(","))
    report = edgemat.verify(file, inputs=np.array(tokens)[:, None], backends=backends, module=model, keep=True)
    print(f"the text, {report.steps} steps, and {report.corners} corner sequences of {report.corner_steps} steps:")
    for backend, found in report.to_dict()["backends"].items():
        print(f"{backend}: {found['compared']} integers compared, {found['mismatches']} mismatches")
    print("characters that each backend draws from the logits it returned itself, up to the first that differs:")
    same = True
    for backend, outputs in report.outputs.items():
        (codes,) = outputs.values()
        own = written(codes, read(file).output_type(0).format, prompt, draws, options.temperature)
        equal = equal_tokens(tokens, own) - len(prompt)
        same = same and own == tokens
        print(f"{backend}: {equal} of {options.tokens} equal")
    print(f"the texts of {', '.join(report.outputs)} are {'equal' if same else 'NOT equal'}")
    edgemat.export(file, target="hls", output=options.output / "hls", reuse=options.reuse)
    edgemat.export(file, target="mcu", output=options.output / "mcu")
    print(f"written: {file}, {options.output / 'hls'}, {options.output / 'mcu'}")
    return 0 if report.ok and same else 3


if __name__ == "__main__":
    raise SystemExit(main())
