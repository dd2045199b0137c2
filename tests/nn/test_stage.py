"""A stage in native passes against the same in plain operations: both layouts, every combination of quantisers."""

from __future__ import annotations

import ctypes
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import native, stage
from edgemat.nn.affine import QuantizedBatchNorm
from edgemat.nn.rounding import Grid
from edgemat.nn.stage import Stage

pytestmark = pytest.mark.skipif(native.load() is None, reason="install gcc for the native passes")

KINDS = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "float": ctypes.c_float}
SHAPES = [(5, 3, 4, 7), (8, 16, 33, 31), (64, 3), (3, 2, 2500), (2, 70, 5, 5), (9, 1, 2, 1), (4, 130, 3, 3)]
QUANTISERS = list(itertools.product([False, True], repeat=3))


def grid(text: str) -> Grid:
    return Grid.of(edgemat.Fixed.parse(text))


def inputs(shape: tuple[int, ...], last: bool) -> list[Tensor]:
    torch.manual_seed(0)
    x = torch.randn(shape) * 3 + 5
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    gamma, beta = torch.randn(shape[1]) * 2, torch.randn(shape[1])
    return [t.requires_grad_() for t in (x, gamma, beta)]


def run(
    way: object, given: list[Tensor], points: Tensor | None, fracs: list[Tensor | None], grids: Stage
) -> list[Tensor]:
    leaves = [t for t in (*given, points, *fracs) if t is not None]
    for t in leaves:
        t.grad = None
    y, mean, var = way(*given, points, fracs, 1e-5, grids)  # type: ignore[operator]
    y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape))
    return [y.detach(), mean, var, *(t.grad.clone() for t in leaves)]  # type: ignore[union-attr]


def test_the_settings_have_the_members_of_the_c_structure() -> None:
    """Names, types and order, and with them the size: nothing else would notice a member that moved."""
    source = Path(native.__file__).with_name("stage.c").read_text("utf-8")
    found = re.search(r"typedef struct \{(.*?)\} EdgematStage;", source, re.DOTALL)
    assert found is not None
    text = re.sub(r"/\*.*?\*/", "", found[1], flags=re.DOTALL)
    members = [
        (name, KINDS[kind]) for kind, names in re.findall(r"(\w+) ([\w, ]+);", text) for name in names.split(", ")
    ]
    assert len(members) > 20 and members == list(stage._Passes._fields_)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("first", "factor", "third"), QUANTISERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_native_and_plain(shape: tuple[int, ...], first: bool, factor: bool, third: bool, relu: bool) -> None:
    points = torch.full((shape[1],), 9.0, requires_grad=True) if factor else None
    fracs = [torch.tensor(f, requires_grad=True) if on else None for f, on in ((3.0, first), (2.0, True), (1.0, third))]
    grids = Stage(
        grid("fixed<7,0>") if first else None,
        grid("fixed<12,0>") if factor else None,
        grid("ufixed<4,0>" if relu else "fixed<5,0>"),
        relu,
        grid("ufixed<3,0>") if third else None,
    )
    for last in (False, True) if len(shape) == 4 else (False,):
        given = inputs(shape, last)
        fast, slow = (run(way, given, points, fracs, grids) for way in (stage.apply, stage.plain))
        assert fast[0].stride() == given[0].stride()
        # Statistics are real numbers: a value on the brink between two codes may fall either way.
        apart = (fast[0] - slow[0]).abs()
        assert float(apart.max()) <= (0.5 if third else 0.25), "one code"
        assert float((apart > 0).float().mean()) < 1e-3
        for a, b in zip(fast[1:3], slow[1:3], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for a, b in zip(fast[3:], slow[3:], strict=True):
            assert float((a - b).norm()) <= 2e-2 * float(b.norm()) + 3e-2 * given[0].numel() ** 0.5
    with torch.no_grad():
        points = points - 6 if points is not None else None
        given[1] = given[1] * 1.5
    changed = stage.apply(*given, points, fracs, 1e-5, grids)[0]
    assert not torch.equal(changed, fast[0]), "the control: another factor gives other codes"


def test_every_tie_and_rail_of_the_first_quantiser() -> None:
    """With statistics that are powers of two nothing is rounded but by the quantisers: equal to the bit."""
    frac = torch.tensor(2.0)
    values = torch.arange(-40, 40) / 8
    x = torch.stack([values, -values]).t().reshape(-1, 2).contiguous()  # mean and variance do not matter below
    near = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)])
    grids = Stage(grid("fixed<5,0>"), None, grid("fixed<16,0>"), False, None)
    y, numbers = stage.forward(near, torch.ones(2), torch.zeros(2), None, (frac, torch.tensor(9.0), None), 0.0, grids)
    q = torch.clamp(torch.ceil(torch.floor(near * 8) * 0.5), -16, 15) / 4
    a, b = (numbers[i].double() for i in (3, 4))
    expected = torch.floor((q.double() * a + b) * 512 + 0.5) / 512
    assert float((y.double() - expected).abs().max()) <= 1 / 512
    assert float((y.double() != expected).double().mean()) < 0.01
    wrong = torch.clamp(torch.round(near * 4), -16, 15) / 4  # half to even
    assert not torch.equal(wrong, q)
    other = torch.floor((wrong.double() * a + b) * 512 + 0.5) / 512
    assert float((y.double() != other).double().mean()) > 0.02, "the control: another rounding is seen"


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [s for s in SHAPES if torch.Size(s).numel() > s[1]])
def test_a_batch_norm_without_native_passes(
    shape: tuple[int, ...], relu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = grid("fixed<4,0>")
    found = []
    for way in ("stage", "eager"):
        x, gamma, beta = inputs(shape, False)
        frac = torch.tensor(2.0, requires_grad=True)
        if way == "stage":
            y = stage.apply(x, gamma, beta, None, (None, frac, None), 1e-5, Stage(None, None, result, relu, None))[0]
        else:
            monkeypatch.setattr(native, "kernel", lambda *tensors: None)
            running = torch.zeros(shape[1]), torch.ones(shape[1])
            y = QuantizedBatchNorm.apply(x, gamma, beta, (*running, 0.1, 1e-5), frac, (result, 2, relu))
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape))
        found.append([y.detach(), *(t.grad for t in (x, gamma, beta, frac))])
    assert float((found[0][0] - found[1][0]).abs().max()) <= 0.25
    assert float((found[0][0] != found[1][0]).float().mean()) < 1e-3
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        assert float((a - b).norm()) <= 1e-2 * float(b.norm()) + 1e-2 * x.numel() ** 0.5


def test_a_binary_point_out_of_range_is_refused() -> None:
    given = inputs((4, 2, 3, 3), False)
    grids = Stage(None, grid("fixed<4,0>"), grid("fixed<4,0>"), False, None)
    for points, frac in ((torch.tensor([3.0, 200.0]), 2.0), (torch.ones(2), float("nan"))):
        with pytest.raises(FormatError, match="lower the learning rate"):
            stage.apply(*given, points, (None, torch.tensor(frac), None), 1e-5, grids)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(5, 3, 4, 7), (8, 16, 33, 31), (4, 130, 3, 3)])
def test_a_chain_without_statistics_is_exact(shape: tuple[int, ...], last: bool) -> None:
    """Ties and rails of both quantisers: equal to the bit, the gradients to their order of summation."""
    torch.manual_seed(0)
    x = torch.randint(-300, 300, shape) / 8
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    x.requires_grad_()
    grids = Stage(None, None, grid("fixed<6,0>"), False, grid("ufixed<3,0>"))
    fracs = [None, torch.tensor(1.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)]
    found = []
    for way in (stage.apply, stage.plain):
        x.grad = fracs[1].grad = fracs[2].grad = None  # type: ignore[union-attr]
        y = way(x, None, None, None, fracs, 0.0, grids)[0]
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape))
        found.append([y.detach(), x.grad, fracs[1].grad, fracs[2].grad])  # type: ignore[union-attr]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    for a, b in zip(found[0][2:], found[1][2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-2 * x.numel() ** 0.5)
    q = torch.clamp(torch.floor(x.detach() * 2 + 0.5), -32, 31) / 2
    expected = torch.clamp(torch.floor(q / 2 + 0.5), 0, 7) * 2
    assert torch.equal(found[0][0], expected)
    even = torch.clamp(torch.round(torch.clamp(torch.round(x.detach() * 2), -32, 31) / 4), 0, 7) * 2
    assert not torch.equal(expected, even), "the control: half to even gives other codes"


class Chain(nn.Module):
    """What joins a stage (the first branch), and what must not: a result that two layers read, a ReLU behind a pool."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.first, self.second, self.third = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(self.one(x)))
        y = self.two(x)
        z = torch.relu(self.second(y) + y)
        return torch.relu(torch.max_pool2d(self.third(z), 2))


def test_only_a_chain_joins_a_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    recipe = edgemat.Recipe(weights="fixed<6>", activations="fixed<5>", batch_norm="affine", every_layer=True)
    x = torch.randn(4, 3, 8, 8)
    module = edgemat.quantize(Chain(), recipe)
    edgemat.calibrate(module, [x])
    module.train()
    assert module.first.takes_sums and module.first.reaches_relu
    assert not module.second.takes_sums, "its input has two readers"
    assert not module.third.takes_sums and not module.second.reaches_relu
    assert module.add.reaches_relu
    start = {name: value.clone() for name, value in module.state_dict().items()}
    y = module(x).detach()
    module.load_state_dict(start)
    monkeypatch.setattr(stage, "at_hand", lambda: False)
    assert not module.first.takes_sums
    other = module(x).detach()
    assert float((y != other).float().mean()) < 0.01
    monkeypatch.undo()
    module.eval()
    assert not module.first.takes_sums and not module.first.reaches_relu
    monkeypatch.setattr(stage, "apply", lambda *given: pytest.fail("eval goes the exact way"))
    module(x)
