"""The MatMul-free language model: sequences and steps give equal codes, in torch and in the exported step."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.lower.reader import read
from edgemat.nn import QuantState, reset_states
from edgemat.nn.embedding import QuantEmbedding
from edgemat.nn.glu import GLU, hidden_width
from edgemat.nn.matmulfree import MatMulFreeLM
from edgemat.nn.mlgru import MLGRU
from edgemat.nn.ternary import TernaryLinear
from edgemat.nn.token_quantizer import RowGrid, TokenQuantizer

VOCABULARY = 11


def counting(batch: int = 6, length: int = 17) -> Tensor:
    """Sequences that count in steps of their own, modulo the vocabulary."""
    return torch.arange(length)[None] * torch.arange(1, batch + 1)[:, None] % VOCABULARY


def language_model(form: str, steps: int = 12, **options: object) -> MatMulFreeLM:
    """A tiny model, calibrated and trained for a few steps so that its codes differ."""
    torch.manual_seed(0)
    model = MatMulFreeLM(VOCABULARY, 16, 2, hidden=24, form=form, **options)  # type: ignore[arg-type]
    tokens = counting()
    edgemat.calibrate(model, [tokens[:, :-1]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model.train()(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return model.eval()


@pytest.mark.parametrize("form", ["paper", "released"])
def test_prefill_step_and_the_exported_file_agree(form: str, tmp_path: Path) -> None:
    model, tokens = language_model(form), counting()
    with torch.no_grad():
        whole = model.prefill(tokens)
        model.reset()
        single = torch.stack([model.step(tokens[:, t]) for t in range(tokens.shape[1])], 1)
        model.prefill(tokens[:, :9])
        behind = torch.stack([model.step(tokens[:, t]) for t in range(9, tokens.shape[1])], 1)
    assert whole.std() > 0 and torch.equal(whole, single)
    assert torch.equal(whole[:, 9:], behind)  # a prefill hands its states on
    with torch.no_grad():
        model.reset()  # control: another token before changes what follows
        model.step((tokens[:, 0] + 1) % VOCABULARY)
        assert not torch.equal(model.step(tokens[:, 1]), whole[:, 1])
        model.reset()

    path = tmp_path / "lm.onnx"
    edgemat.to_onnx(model, (tokens[:, 0],), path)
    found = edgemat.Simulator(path).run_sequence(tokens.T.numpy())
    assert np.array_equal(np.moveaxis(found, 0, 1), whole.numpy())
    graph = read(path)
    assert len(graph.states) == 2
    linear = [call for call in graph.nodes if call.op.name == "Linear"]
    assert len(linear) == 2 * 7 + 1
    assert all(call.op.native(call).params.get("ternary") == 1 for call in linear)
    report = edgemat.verify(path, steps=200, samples=1)
    assert report.ok and report.overflow_proved, report.first_mismatch


def test_generation_is_greedy_or_drawn() -> None:
    model, tokens = language_model("paper"), counting()[:2, :5]
    first, again = model.generate(tokens, 6), model.generate(tokens, 6)
    assert torch.equal(first, again) and first.shape == (2, 11) and torch.equal(first[:, :5], tokens)
    model.reset()
    logits = model.prefill(first[:, :-1])
    assert torch.equal(logits[:, 4:].argmax(2), first[:, 5:])
    drawn = [model.generate(tokens, 6, 1.0, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with pytest.raises(FormatError, match="training mode"):
        model.train().generate(tokens, 1)


def test_the_published_initialisation() -> None:
    torch.manual_seed(0)
    model = MatMulFreeLM(50, 64, 3, hidden=128, form="released")
    assert abs(model.embedding.weight.std().item() - 0.02) < 0.002
    assert abs(model.head.weight.std().item() - 0.02) < 0.002
    for block in model._blocks():
        limit = 2.0**-2.5 * math.sqrt(6.0 / 128)
        for part in (block.mixer.f_proj, block.mixer.o_proj):
            assert 0.9 * limit < part.weight.abs().max().item() <= limit
        assert abs(block.channel.gate_proj.weight.std().item() - 0.02) < 0.002
        assert abs(block.channel.down_proj.weight.std().item() - 0.02 / math.sqrt(6)) < 0.002
    bounds = model.lower_bounds()
    assert bounds[0] is not None and not bounds[0].any()  # none in the first block
    assert bounds[2] is not None and torch.allclose(bounds[2], torch.full((64,), 2 / 3))


def test_the_channel_mixer_is_as_wide_as_published() -> None:
    assert [hidden_width(d) for d in (96, 256, 512, 1024, 2048)] == [256, 768, 1536, 2816, 5632]
    layer = GLU(12, output="fixed<8>")
    assert layer.hidden == 256
    x = torch.randn(3, 4, 12)
    layer.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    assert torch.equal(layer.eval()(x)[:, 1], layer(x[:, 1]))


def test_mlgru_follows_its_equations() -> None:
    torch.manual_seed(0)
    layer = MLGRU(8, norm=False, output="fixed<12>", activations="fixed<12>", state="fixed<20>", gates="fixed<12>")
    x = torch.randn(2, 30, 8)
    edgemat.calibrate(layer, [x])
    layer.eval()
    found = layer.prefill(x).detach()

    def trits(part: nn.Module) -> Tensor:
        return part.weight_quantizer(part.weight).detach()  # type: ignore[operator, union-attr]

    y, h = layer.input_quantizer(x), torch.zeros(2, 8)  # type: ignore[misc]
    for t in range(30):
        f, c = torch.sigmoid(y[:, t] @ trits(layer.f_proj).T), nn.functional.silu(y[:, t] @ trits(layer.c_proj).T)
        h = f * h + (1 - f) * c
        expected = (torch.sigmoid(y[:, t] @ trits(layer.g_proj).T) * h) @ trits(layer.o_proj).T
        assert (found[:, t] - expected).abs().max() < 0.05 * found.abs().max()  # rounding alone; bits are tested above


def test_states_of_other_batches_are_refused() -> None:
    layer = MLGRU(4, norm=False).eval()
    edgemat.calibrate(layer, [torch.randn(3, 5, 4)])
    reset_states(layer)
    with torch.no_grad():
        layer.step(torch.zeros(3, 4))
        with pytest.raises(FormatError, match="holds 3 samples and is read for 2"):
            layer.step(torch.zeros(2, 4))


def test_indices_are_rows_or_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 2))
    q = edgemat.quantize(net, edgemat.Recipe(weights="ternary"))
    x = torch.tensor([0, 1, 2, 3, 4])
    edgemat.calibrate(q, [x]).eval()
    edgemat.to_onnx(q, (x,), tmp_path / "net.onnx")
    simulator = edgemat.Simulator(tmp_path / "net.onnx")
    assert np.array_equal(simulator(x.numpy()), q(x).detach().numpy())
    for wrong in (np.array([5]), np.array([-1]), np.array([0.5])):
        with pytest.raises(FormatError, match="expected whole numbers from 0 to 4"):
            simulator(wrong)
        with pytest.raises(FormatError, match="expected whole numbers from 0 to 4"):
            q(torch.from_numpy(wrong))
    with pytest.raises(FormatError, match="expected 0 to 4"):
        simulator(np.array([6]), codes=True)
    with pytest.raises(FormatError, match="expected one format for the table"):
        QuantEmbedding(4, 2, "ternary")


def test_what_the_parts_cannot_be_is_refused() -> None:
    with pytest.raises(FormatError, match="form 'papers'"):
        MLGRU(4, form="papers")
    with pytest.raises(FormatError, match="an unsigned share of 1"):
        MLGRU(4, forget="fixed<8,1>")
    with pytest.raises(FormatError, match="at most 12 bits"):
        GLU(4, gate="fixed<16>")
    with pytest.raises(FormatError, match="layers is 0, expected a whole number of at least 1"):
        MatMulFreeLM(4, 4, 0)
    model = MatMulFreeLM(4, 4, 1, hidden=8)
    with pytest.raises(FormatError, match=r"expected \[N, T\]"):
        model.prefill(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(FormatError, match=r"expected \[N\]"):
        model.step(torch.zeros(3, 1, dtype=torch.int64))


@pytest.mark.parametrize("form", ["paper", "released"])
def test_tokens_with_scales_of_their_own(form: str, tmp_path: Path) -> None:
    """Features of 16 bits are cut to 6 by a power of two of each token: in training, steps and the exported file."""
    model, tokens = language_model(form, 8, tokens="fixed<6>"), counting()
    trained = model.train()(tokens).detach()
    with torch.no_grad():
        whole = model.eval().prefill(tokens)
        model.reset()
    assert torch.equal(trained, whole)
    path = tmp_path / "lm.onnx"
    edgemat.to_onnx(model, (tokens[:, 0],), path)
    found = edgemat.Simulator(path).run_sequence(tokens.T.numpy())
    assert np.array_equal(np.moveaxis(found, 0, 1), whole.numpy())
    calls = read(path).nodes
    exponents = [call.x[1].hi for call in calls if call.op.name == "TokenQuantize"]
    linear = [call for call in calls if call.op.name == "Linear"]
    assert len(linear) == 2 * 7 + 1 and len(exponents) == 2 * 4 + 1 and min(exponents) > 0
    assert all(call.op.native(call).params.get("ternary") == 1 for call in linear)
    for part in model.modules():  # control: another width gives other bits
        if isinstance(part, TokenQuantizer):
            part.grid = RowGrid(Fixed(5, 5), role="requantize")
    for part in model.modules():
        if isinstance(part, TernaryLinear):
            assert part.source() is part.tokens.grid  # type: ignore[union-attr]
    with torch.no_grad():
        assert not torch.equal(model.prefill(tokens), whole)


@pytest.mark.parametrize("kind", [MLGRU, GLU])
def test_projections_share_the_codes_of_their_rows(kind: type) -> None:
    """One quantiser for all gives the values and the gradients that one for each gives; another width does not."""
    torch.manual_seed(1)
    mixer = kind(12, tokens="fixed<5>", input="fixed<12>", output="fixed<10>")
    x = torch.randn(3, 7, 12)
    edgemat.calibrate(mixer, [x])
    apart = copy.deepcopy(mixer)
    first, *others = [part for part in apart.modules() if isinstance(part, TernaryLinear)][:-1]
    assert all(part.tokens is first.tokens for part in others) and len(others) == (2 if kind is MLGRU else 1)
    found, shared = [], first.tokens
    for part in (first, *others):
        part.tokens, part.rows = copy.deepcopy(shared), lambda x: None  # type: ignore[method-assign]
    for model in (mixer, apart):
        x.grad = None
        y = model.train()(x.requires_grad_())
        (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
        assert x.grad is not None
        found.append((y.detach(), x.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # scales are powers of two
    others[0].tokens.grid = RowGrid(Fixed(4, 4), role="requantize")  # type: ignore[union-attr]
    assert not torch.equal(apart(x), found[0][0])


def test_the_published_division_of_tokens_trains_and_is_refused_at_export(tmp_path: Path) -> None:
    model = language_model("paper", 2, tokens="fixed<8>", token_scale="absmax")
    with pytest.raises(FormatError, match=r"layer 'blocks\.0\.mixer\.f_proj\.tokens' divides every row .*power_of_two"):
        edgemat.to_onnx(model, (counting()[:, 0],), tmp_path / "lm.onnx")


def test_sizes_and_shapes_that_cannot_be_meant_are_refused() -> None:
    for build in (lambda: MLGRU(0), lambda: MLGRU(-1), lambda: GLU("4"), lambda: GLU(4, 0)):  # type: ignore[arg-type]
        with pytest.raises(FormatError, match=r"an MLGRU's dim|a GLU's"):
            build()
    for shape in ((2, 3, 5), (2, 0, 4), (2, 3, 4, 4), (4,)):
        with pytest.raises(FormatError, match=r"expected \[N, T, 4\] with at least one token, or \[N, 4\]"):
            MLGRU(4)(torch.zeros(shape))


def test_quantize_says_that_it_follows_no_state() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.state = nn.Linear(4, 4), QuantState(4, "fixed<8>")

        def forward(self, x: Tensor) -> Tensor:
            return self.state.write(self.linear(x) + self.state.read(x))

    for net in (Own(), Own().eval()):
        with pytest.raises(LoweringError, match=r"follows tensors and no states; build the recurrent network from"):
            edgemat.quantize(net, edgemat.Recipe())
