"""Learned widths: values, gradients and files against their definition."""

from __future__ import annotations

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import FormatError
from edgemat.formats import Fixed, dequantize, holds_codes, quantize
from edgemat.lower.reader import read
from edgemat.nn import native
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.nn.learned_width import Groups, LearnedWidthQuantizer, enclosed_bits, signed_digits

LN2 = math.log(2.0)
SHAPES = [
    ((4, 6), 4, 0, "weight", (4, 6)),
    ((4, 6), 4, 0, "channel", (4, 1)),
    ((4, 6), 4, 0, "tensor", ()),
    ((4, 7), 4, 0, 3, (4, 3)),
    ((4, 6, 3, 3), 4, 0, 4, (4, 2, 1, 1)),
    ((6, 4, 3, 3), 4, 1, 4, (2, 4, 1, 1)),
    ((6, 2, 3, 3), None, 1, "channel", ()),
    ((6, 2, 3, 3), None, 1, 4, ()),
    ((6, 2, 3, 3), None, 1, "weight", (6, 2, 3, 3)),
    ((5,), 5, 0, "weight", (5,)),
    ((5,), 5, 0, 2, (5,)),
]


def weights(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Random weights with zeros, powers of two and channels of other magnitudes among them."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.4
    made.view(-1)[::5] = 0.5
    made.view(-1)[1::7] = 0.0
    made[0] *= 8
    return made


@pytest.mark.parametrize(("shape", "outputs", "axis", "groups", "expected"), SHAPES)
def test_groups_share_as_stated(shape, outputs, axis, groups, expected):
    made = Groups(shape, axis, outputs is not None, groups)
    assert made.shape == expected
    entries = torch.arange(1.0, math.prod(expected) + 1).view(expected)
    spread = made.spread(entries).expand(shape)
    values = torch.randn(shape)
    gathered = made.gather(values)
    assert gathered.shape == expected
    for entry in entries.view(-1).tolist():  # a group's sum is the sum over the weights that got its entry
        assert gathered.view(-1)[int(entry) - 1].item() == pytest.approx(values[spread == entry].sum().item(), abs=1e-4)


def test_weights_round_to_their_groups_fractional_bits():
    w = weights((3, 8))
    q = LearnedWidthQuantizer("fixed<8>", w.shape, 3, 0, "weight")
    q.fit(w)
    with torch.no_grad():
        q.frac.sub_(torch.randint(0, 7, w.shape, generator=torch.Generator().manual_seed(1)))
    frac = q.frac.detach().clone()
    v = q(w).detach()
    step = torch.exp2(-frac)
    assert torch.equal(v, torch.floor(w / step + 0.5) * step)
    with torch.no_grad():
        q.frac[0, 0] -= 1  # the control: one fractional bit less for one weight
    assert not torch.equal(q(w).detach(), v) or v[0, 0] == 0 or (v[0, 0] / step[0, 0]) % 2 == 0


@pytest.mark.skipif(native.load() is None, reason="install gcc for the native passes")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM"])
@pytest.mark.parametrize(("shape", "outputs", "axis", "groups", "expected"), SHAPES)
def test_the_native_pass_has_the_bits_of_eager_torch(
    shape, outputs, axis, groups, expected, overflow, training, monkeypatch
):
    w = weights(shape)
    w[-1] = 0.0  # a channel of zeros
    found = []
    for lacking in (False, True):
        if lacking:
            monkeypatch.setattr(native, "kernel", lambda *tensors: None)
        for width in (2, 3, 8):
            q = LearnedWidthQuantizer(
                f"fixed<{width},0,RND,{overflow}>".replace(",0", ""), shape, outputs, axis, groups
            )
            q.fit(w)
            q.train(training)
            with torch.no_grad():
                q.frac.sub_(torch.rand(q.frac.shape, generator=torch.Generator().manual_seed(3)) * 6 - 1)
            v = q(w).detach()
            found.append(
                (
                    lacking,
                    v,
                    q.codes_now(),
                    q.bits().detach(),
                    q.points.clone(),
                    q.span.clone(),
                    q.frac.detach().clone(),
                )
            )
    for (_, *first), (_, *second) in zip(found[:3], found[3:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradient_of_the_fractional_bits_is_the_rounding_error():
    w = weights((3, 8)).requires_grad_()
    q = LearnedWidthQuantizer("fixed<5>", w.shape, 3, 0, 4)
    q.fit(w)
    g = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    v = q(w)
    v.backward(g)
    assert torch.equal(w.grad, g)
    expected = (LN2 * g * (w - v)).detach().view(3, 2, 4).sum(2)
    assert torch.allclose(q.frac.grad.view(3, 2), expected, atol=1e-6)
    assert not torch.allclose(-q.frac.grad.view(3, 2), expected, atol=1e-6)


@pytest.mark.parametrize("width", [2, 3, 4, 8])
@pytest.mark.parametrize("groups", ["tensor", "channel", "weight", 3])
def test_nothing_saturates_and_the_format_holds_every_code(width, groups):
    for seed in range(5):
        w = weights((4, 9), seed)
        q = LearnedWidthQuantizer(f"fixed<{width}>", w.shape, 4, 0, groups)
        q.fit(w)
        with torch.no_grad():
            q.frac.sub_(torch.rand(q.frac.shape, generator=torch.Generator().manual_seed(seed)) * 3)
        v = q(w).detach()
        assert (v - w).abs().max() <= 0.5 * torch.exp2(-q.frac.round().min() + 1)
        codes, fmt = q.codes(v), q.format
        assert fmt.width <= width
        assert np.array_equal(dequantize(codes.numpy(), fmt, axis=0), v.numpy())
        assert holds_codes(codes.numpy(), fmt, axis=0)
        if fmt.width > 1 and fmt.overflow == "SAT":  # the control: one bit less does not hold them
            narrow = dataclasses.replace(fmt, width=fmt.width - 1, int_bits=tuple(i - 1 for i in fmt.int_bits))
            assert not holds_codes(codes.numpy(), narrow, axis=0)


def test_folded_weights_are_those_of_the_scaled_ones():
    w, scale = weights((4, 9)), torch.tensor([0.5, -3.0, 1.7, 0.01])
    q = LearnedWidthQuantizer("fixed<6>", w.shape, 4, 0, "weight")
    q.fit(w * scale.view(-1, 1))
    assert torch.equal(q.folded(w, scale), q(w * scale.view(-1, 1)).detach() / scale.view(-1, 1))


def test_a_pruned_weight_lives_again_where_the_loss_asks():
    w = torch.tensor([[0.75, 0.3]])
    q = LearnedWidthQuantizer("fixed<8>", w.shape, 1, 0, "weight").train()
    q.fit(w)
    with torch.no_grad():
        q.frac[0, 1] = -3.0
    assert q(w)[0, 1] == 0 and q.bits()[0, 1] == 0
    optimizer = torch.optim.SGD(q.parameters(), lr=2.0)
    for _ in range(20):
        loss = (q(w) - w).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert q(w)[0, 1] != 0


def test_the_cost_of_a_weight_falls_with_its_bits_and_with_its_magnitude():
    w = torch.tensor([[0.75, -0.3, 0.0, 0.001]]).requires_grad_()
    q = LearnedWidthQuantizer("fixed<4>", w.shape, 1, 0, "weight")
    q.fit(w)
    q(w)
    q.bits().sum().backward()
    live = torch.tensor([[True, True, False, False]])
    assert torch.equal(q.frac.grad, live.float())
    expected = torch.where(live, q.pull / (LN2 * w.detach()), torch.zeros(()))
    assert torch.allclose(w.grad, expected)


@pytest.mark.parametrize(
    ("code", "bits", "digits"), [(0, 0, 0), (1, 1, 1), (-4, 1, 1), (6, 2, 2), (7, 3, 2), (-11, 4, 3)]
)
def test_bits_and_digits_of_a_code(code, bits, digits):
    codes = torch.tensor([code])
    assert enclosed_bits(codes).item() == bits
    assert signed_digits(codes).item() == digits


def test_digits_of_every_small_code_are_minimal():
    sums = {0: 0}
    for count in range(1, 6):
        for value in list(sums):
            for power in range(10):
                for sign in (1, -1):
                    sums.setdefault(value + sign * (1 << power), count)
    codes = torch.arange(-255, 256)
    assert signed_digits(codes).tolist() == [sums[c] for c in codes.tolist()]


# -- activations ---------------------------------------------------------------------------------------------------


def activation(widths: list[int], fracs: list[int], signed: bool, overflow: str = "SAT") -> LearnedActivationQuantizer:
    """A quantiser of given channels."""
    kind = "fixed" if signed else "ufixed"
    q = LearnedActivationQuantizer(f"{kind}<8,RND,{overflow}>".replace("8,RND", "8,8,RND"), len(widths))
    q.finest_stated = 60
    with torch.no_grad():
        q.frac.copy_(torch.tensor(fracs))
        q.whole.copy_(torch.tensor(widths) - torch.tensor(fracs) - float(signed) * (torch.tensor(widths) > 0))
    return q.eval()


@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM"])
@pytest.mark.parametrize("signed", [True, False])
def test_activations_are_the_formats_codes(signed, overflow):
    q = activation([5, 3, 0, 8], [2, 4, 0, -1], signed, overflow)
    fmt = q.format
    assert fmt.widths == (5, 3, 0, 8)
    ticks = torch.arange(-70, 70).float() / 8  # ties, rails and beyond
    x = ticks.view(-1, 1).repeat(1, 4) * torch.tensor([1.0, 1.0, 1.0, 64.0])
    y = q(x).detach()
    assert np.array_equal(q.codes(y).numpy(), quantize(x.numpy(), fmt))
    for channel in (0, 1, 3):  # the control: a width off by one
        wrong = list(fmt.widths)
        wrong[channel] -= 1
        other = Fixed.of_channels(wrong, fmt.fracs, signed, "RND", overflow)
        assert not np.array_equal(q.codes(y).numpy(), quantize(x.numpy(), other))


def test_float64_values_are_rounded_once():
    q = activation([8], [2], True).requires_grad_(False)
    x = torch.tensor([[0.125 - 2.0**-40]], dtype=torch.float64)  # float32 would make it a tie, which rounds up
    assert q(x).item() == 0.0 and q(x.float()).item() == 0.25


@pytest.mark.skipif(native.load() is None, reason="install gcc for the native passes")
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (3, 4, 5, 5), (40, 4, 20, 20)])
def test_the_native_passes_of_activations_have_the_bits_of_eager_torch(shape, relu, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-40, 40, shape, generator=generator).float() / 8
    g = torch.randn(shape, generator=generator)
    found = []
    for lacking in (False, True):
        if lacking:
            monkeypatch.setattr(native, "kernel", lambda *tensors: None)
        for signed in (True, False):
            q = activation([5, 3, 0, 8], [2, 4, 0, -1], signed)
            q.relu = relu
            given = x.clone().requires_grad_()
            y = q(given)
            y.backward(g)
            found.append((y.detach(), given.grad, q.frac.grad, q.whole.grad))
    for first, second in zip(found[:2], found[2:], strict=True):
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        for a, b in zip(first[2:], second[2:], strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-3 * a.abs().max())


def test_gradients_of_saturation_are_those_of_the_value_that_stands_there():
    q = activation([4, 4], [1, 1], True)
    x = torch.tensor([[1.3, 9.0], [-7.0, 0.4], [3.6, -3.9]], requires_grad=True)
    g = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]])
    q(x).backward(g)
    above = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
    below = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    inside = 1 - above - below
    assert torch.equal(x.grad, g * inside)
    error = (x - q(x)).detach()
    assert torch.allclose(q.frac.grad, LN2 * (g * inside * error + g * above * 0.5).sum(0))
    assert torch.allclose(q.whole.grad, LN2 * 4.0 * (g * above - g * below).sum(0))


def test_a_pruned_channel_keeps_gradients_and_a_relu_stops_them():
    q = LearnedActivationQuantizer("ufixed<6>", 1, relu=True).train()
    q.fit_range(torch.zeros(1), torch.ones(1))
    with torch.no_grad():
        q.frac.copy_(-q.whole)
    x = torch.tensor([[0.9], [-0.5], [1.9]], requires_grad=True)
    y = q(x)
    assert torch.equal(y, torch.zeros_like(y)) and q.format.widths == (0,)
    y.sum().backward()
    assert x.grad.view(-1).tolist() == [1, 0, 0]
    assert q.frac.grad.item() > 0 and q.whole.grad.item() > 0


def test_bits_of_activations_reach_both_parameters():
    q = activation([5, 0, 3], [2, 0, 1], False)
    q.bits().sum().backward()
    assert q.bits().tolist() == [5, 0, 3]
    assert q.frac.grad.tolist() == [1, 0, 1] and q.whole.grad.tolist() == [1, 0, 1]


# -- networks ------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution with batch norm, a grouped one, and a dense layer behind a flatten."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.dense = nn.Conv2d(8, 8, 3, stride=2, groups=4), nn.Linear(8 * 4, 3)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.norm(self.first(x)))))
        return self.dense(x.flatten(1))


def trained(groups: str | int, activations: str, steps: int = 25, **more) -> tuple[nn.Module, torch.Tensor]:
    """A network of learned widths after some steps under a cost."""
    torch.manual_seed(0)
    x, labels = torch.randn(48, 3, 6, 6), torch.arange(48) % 3
    recipe = edgemat.Recipe(
        input="fixed<8,3>", weights="fixed<6>", activations="fixed<6>", learn_widths="all", weight_groups=groups,
        activation_groups=activations, **more,
    )  # fmt: skip
    q = edgemat.quantize(Small(), recipe)
    edgemat.calibrate(q, [x])
    optimizer = torch.optim.Adam(q.parameters(), lr=2e-2)
    q.train()
    for _ in range(steps):
        loss = F.cross_entropy(q(x), labels) + 1e-5 * edgemat.cost(q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    q.eval()(x)
    return q, x


@pytest.mark.parametrize(("groups", "activations"), [("weight", "channel"), (2, "tensor"), ("channel", "channel")])
def test_exported_bits_are_those_of_eval_on_every_backend(tmp_path, groups, activations):
    q, x = trained(groups, activations)
    assert bool((q.second.weight_quantizer.codes_now() == 0).any()) or groups != "weight"
    file = tmp_path / "net.onnx"
    edgemat.to_onnx(q, x[:2], file)
    backends = ("reference", "onnx", "hls:parallel", "mcu") if groups == "weight" else ("reference", "onnx")
    report = edgemat.verify(file, inputs=x[:8].numpy(), backends=backends, module=q)
    assert report.to_dict()["ok"]


@pytest.mark.parametrize("change", ["weight", "activation"])
def test_verify_sees_a_width_that_is_off_by_one(tmp_path, change):
    q, x = trained("weight", "channel")
    file = tmp_path / "net.onnx"
    edgemat.to_onnx(q, x[:2], file)
    with torch.no_grad():
        if change == "weight":
            codes = q.dense.weight_quantizer.codes_now()
            odd = (codes.abs() * (codes % 2 != 0)).argmax()
            assert codes.view(-1)[odd] % 2 != 0
            q.dense.weight_quantizer.frac.view(-1)[odd] = q.dense.weight_quantizer.frac.view(-1)[odd].round() - 2
        else:
            quantizer = q.input_1_quantizer if hasattr(q, "input_1_quantizer") else q.x_quantizer
            quantizer.frac.sub_(1.0)
    report = edgemat.verify(file, inputs=x.numpy(), backends=("reference",), module=q)
    assert not report.to_dict()["ok"]


def test_the_file_narrows_channels_and_holds_zeros_for_pruned_weights(tmp_path):
    q, x = trained("weight", "channel", steps=60)
    file = tmp_path / "net.onnx"
    edgemat.to_onnx(q, x[:2], file)
    graph = read(file)
    formats = [tensor.format for tensor in graph.tensors.values()]
    assert any(fmt.widths is not None for fmt in formats)
    stored = {name: codes for name, codes in graph.constants.items() if codes.ndim == 2}
    zeros = int((q.dense.weight_quantizer.codes_now() == 0).sum())
    assert [int((codes == 0).sum()) for codes in stored.values()] == [zeros]


def test_training_mode_without_batch_statistics_has_the_bits_of_eval():
    q, x = trained("weight", "channel", steps=3)
    y = q(x)
    q.train()
    q.norm.eval()
    assert torch.equal(q(x), y.float())


def test_a_checkpoint_brings_everything_back():
    q, x = trained("weight", "channel")
    y, kept = q(x), copy.deepcopy(q.state_dict())
    torch.manual_seed(1)
    recipe = edgemat.Recipe(
        input="fixed<8,3>", weights="fixed<6>", activations="fixed<6>", learn_widths="all", weight_groups="weight",
        activation_groups="channel",
    )  # fmt: skip
    fresh = edgemat.quantize(Small(), recipe)
    with pytest.raises(FormatError, match="calibrate"):
        fresh.eval()(x)
    fresh.load_state_dict(kept)
    assert torch.equal(fresh.eval()(x), y)
    assert torch.equal(copy.deepcopy(fresh)(x), y)
    other = edgemat.quantize(Small(), edgemat.Recipe(input="fixed<8,3>", weights="fixed<5>", learn_widths="all"))
    with pytest.raises(RuntimeError, match="the recipe the checkpoint was trained with"):
        other.load_state_dict(kept, strict=False)


def test_channels_are_found_for_inputs_and_refused_where_layers_cannot_align():
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    recipe = edgemat.Recipe(learn_widths="all", activation_groups="channel", activations="fixed<6>")
    q = edgemat.quantize(model, recipe)
    learned = [m for m in q.modules() if isinstance(m, LearnedActivationQuantizer)]
    # Input and ReLU go to dense layers alone; what goes into the table has one width.
    assert [tuple(m.frac.shape) for m in learned[:3]] == [(5,), (4,), ()]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedWidthQuantizer("ufixed<4>", (2, 2), 2), "signed ceiling"),
        (lambda: LearnedWidthQuantizer("fixed<1>", (2, 2), 2), "at least 2 bits"),
        (lambda: LearnedWidthQuantizer("fixed<4,1>", (2, 2), 2), "learned binary point"),
        (lambda: LearnedActivationQuantizer("fixed<8,RND,WRAP>".replace("8,", "8,3,")), "saturates"),
        (lambda: LearnedActivationQuantizer("fixed<1>"), "one bit beside the sign"),
        (lambda: activation([4, 4], [1, 1], True)(torch.zeros(3, 5)), "channels on axis 1"),
        (lambda: LearnedWidthQuantizer("fixed<4>", (2, 2), 2).bits(), "no weights yet"),
    ],
)
def test_refusals_say_what_to_do(make, message):
    with pytest.raises(FormatError, match=message):
        make()
