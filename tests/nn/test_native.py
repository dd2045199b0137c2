"""The native passes of a training step against eager torch: values to the bit, gradients to their summation order."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from edgemat.nn import FixedQuantizer, native, stage
from edgemat.nn.affine import QuantizedBatchAffine, batch_statistics

pytestmark = pytest.mark.skipif(native.load() is None, reason="install gcc for the native passes")

FORMATS = ("fixed<8>", "ufixed<8>", "fixed<3>", "fixed<8,3,RND,SAT_SYM>", "fixed<22,4>", "ufixed<1>")
SHAPES = ((5, 3, 4, 7), (8, 16, 33, 31), (64, 3), (3, 2, 2500))


def both(monkeypatch: pytest.MonkeyPatch, run: Callable[[], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """What `run` gives natively and in eager torch; checks that the first run did call native code."""
    calls = 0

    def counted(*tensors: Tensor) -> object:
        nonlocal calls
        calls += 1
        found = passes(*tensors)
        assert found is not None
        return found

    def reached() -> bool:
        nonlocal calls
        calls += 2
        return native.load() is not None

    passes = native.kernel
    with monkeypatch.context() as patch:
        patch.setattr(native, "kernel", counted)
        patch.setattr(stage, "at_hand", reached)
        fast = run()
    assert calls >= 2
    with monkeypatch.context() as patch:
        patch.setattr(native, "kernel", lambda *tensors: None)
        patch.setattr(stage, "at_hand", lambda: False)
        return fast, run()


def ties_and_rails(frac: int, width: int) -> Tensor:
    """Every half and quarter LSB around the rails and around zero, each with its float neighbours."""
    edges = torch.tensor([0.0, -(2.0 ** (width - 1)), 2.0 ** (width - 1), 2.0**width])
    x = (edges[:, None] + torch.arange(-40, 41) / 4).reshape(-1) * 2.0**-frac
    far = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, float("inf"), -float("inf"), 0.49999997, -0.49999997])
    up, down = (torch.nextafter(x, torch.tensor(v)) for v in (float("inf"), -float("inf")))
    return torch.cat([x, up, down, far])


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("frac", [-3, 0, 4, 9])
def test_a_tensor(format: str, frac: int, relu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = FixedQuantizer(format, relu=relu)
    quantizer.set_frac(frac)
    values = ties_and_rails(frac, quantizer.width)

    def run() -> list[Tensor]:
        x = values.clone().requires_grad_()
        quantizer.frac.requires_grad_()
        quantizer.frac.grad = None
        y = quantizer(x)
        y.backward(torch.linspace(-1, 1, len(values)).where(values.abs() < 1e30, 0.0))
        return [y.detach(), x.grad]  # type: ignore[list-item]

    fast, slow = both(monkeypatch, run)
    for a, b in zip(fast, slow, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(fast[0], quantizer(values.detach()).detach())


@pytest.mark.parametrize("size", [1, 1023, 40_000, 300_001])
def test_a_binary_point(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    values, g = torch.randn(size), torch.randn(size)
    quantizer = FixedQuantizer("fixed<4>")
    quantizer.set_frac(2)

    def run() -> list[Tensor]:
        x = values.clone().requires_grad_()
        quantizer.frac.grad = None
        y = quantizer(x)
        y.backward(g)
        return [y.detach(), x.grad, quantizer.frac.grad]  # type: ignore[list-item]

    fast, slow = both(monkeypatch, run)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (10, 4000), (1, 1), (7,)])
def test_channels(shape: tuple[int, ...], scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    channels = shape[0]
    quantizer = FixedQuantizer("fixed<4>", channels=channels, axis=0, role="weights")
    quantizer.set_frac(torch.arange(channels) % 5 - 1.0)
    values, scale = torch.randn(shape) * 4, torch.rand(channels) - 2.0
    values.view(-1)[::3] = (values.view(-1)[::3] * 4).round() / 4
    g = torch.randn(shape)

    def run() -> list[Tensor]:
        x = values.clone().requires_grad_()
        quantizer.frac.grad = None
        y = quantizer.folded(x, scale) if scaled else quantizer(x)
        y.backward(g)
        return [y.detach(), x.grad, quantizer.frac.grad]  # type: ignore[list-item]

    fast, slow = both(monkeypatch, run)
    assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
    torch.testing.assert_close(fast[2], slow[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_batch_affine(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    channels = shape[1]
    grid = FixedQuantizer("fixed<4>").grid
    values, g = torch.randn(shape), torch.randn(shape)
    starts = torch.rand(channels) + 0.5, torch.randn(channels)

    def run() -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (values, *starts, torch.tensor(2.0))]
        x, a, b, frac = inputs
        running = torch.zeros(channels), torch.ones(channels)
        mean, var = batch_statistics(x.detach(), *running, 0.1)
        y = QuantizedBatchAffine.apply(x, a, b, (mean, var, 1e-5), frac, (grid, 2, False))
        y.backward(g)
        return [y.detach(), mean, var, *running, *(t.grad for t in inputs)]

    fast, slow = both(monkeypatch, run)
    assert torch.equal(fast[0], slow[0])
    for a, b in zip(fast[1:5], slow[1:5], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    for a, b in zip(fast[5:], slow[5:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * values.numel() ** 0.5)


def test_other_tensors_stay_eager() -> None:
    x = torch.zeros(4, 6)
    assert native.kernel(x) is not None
    assert native.kernel(x.T) is None
    assert native.kernel(x.double()) is None
    assert native.kernel(x, x.to("meta")) is None


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # who has no compiler, or wants none, is told nothing
        monkeypatch.setenv("EDGEMAT_NATIVE", "0")
        assert native.load.__wrapped__() is None
        monkeypatch.delenv("EDGEMAT_NATIVE")
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        assert native.load.__wrapped__() is None


def test_a_compiler_that_fails_is_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In one sentence, with what the compiler said first; a folder that cannot be written likewise."""
    monkeypatch.delenv("EDGEMAT_NATIVE", raising=False)
    monkeypatch.setenv("EDGEMAT_CACHE", str(tmp_path / "cache"))
    broken = tmp_path / "broken.c"
    broken.write_text("int f(void) {\n  return nothing_of_that_name;\n}\n")
    monkeypatch.setattr(native, "_SOURCES", (broken,))
    sentence = r"^edgemat trains without .*error: .nothing_of_that_name. .*set EDGEMAT_NATIVE=0$"
    with pytest.warns(RuntimeWarning, match=sentence) as said:
        assert native.load.__wrapped__() is None
    assert len(said) == 1 and "\n" not in str(said[0].message)
    monkeypatch.setenv("EDGEMAT_CACHE", str(broken))
    with pytest.warns(RuntimeWarning, match=r"Not a directory"):
        assert native.load.__wrapped__() is None
    monkeypatch.setenv("EDGEMAT_CACHE", str(tmp_path / "cache"))
    broken.write_text("int f(void) { return 0; }\n")  # compiles, and has none of the passes
    with pytest.warns(RuntimeWarning, match=r"undefined symbol: edgemat_quantize"):
        assert native.load.__wrapped__() is None
