"""Small recurrent modules, composed by hand: an integrator, a gated unit, and registers that only move codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.nn import (
    FixedQuantizer,
    QuantAdd,
    QuantConstant,
    QuantLinear,
    QuantMul,
    QuantSigmoid,
    QuantState,
    QuantSub,
)
from edgemat.verification import backends


class Leaky(nn.Module):
    """``h = quantize(decay * h + x)``, then a linear readout; rounds half to even, so that ties matter."""

    shape = (5,)

    def __init__(self) -> None:
        super().__init__()
        self.input = FixedQuantizer("fixed<8,3>")
        self.state = QuantState(5, "fixed<6,3,RND_CONV,SAT>")
        self.decay = QuantConstant("ufixed<4,0>", torch.full((1,), 0.875))
        self.scale, self.add = QuantMul(None), QuantAdd(None)
        self.readout = QuantLinear(5, 3, weights="fixed<6,1>", input="fixed<6,3>", output="fixed<8,3>")

    def advance(self, h: Tensor, x: Tensor) -> Tensor:
        return self.state.quantize(self.add(self.scale(h, self.decay()), self.input(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.state.write(self.advance(self.state.read(x), x)))

    def sequence(self, x: Tensor) -> Tensor:
        h, made = self.state.initial(x[0]), []
        for x_t in x:
            h = self.advance(h, x_t)
            made.append(self.readout(h))
        return torch.stack(made)


class Gated(nn.Module):
    """``h = quantize(f * h + (1 - f) * c)``, ``f = sigmoid(W_f x)``, ``c = W_c x + U h``; h is an output, too."""

    shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.input = FixedQuantizer("fixed<7,2>")
        self.state = QuantState((6,), "fixed<12,2,TRN,SAT_SYM>")
        self.forget = QuantLinear(4, 6, weights="fixed<5,1>", input=None, output="fixed<8,4>")
        self.candidate = QuantLinear(4, 6, weights="fixed<5,1>", input=None, output="fixed<9,3>")
        self.recurrent = QuantLinear(6, 6, weights="fixed<4,0>", input=None, output="fixed<9,3>")
        for layer in (self.forget, self.candidate):
            layer.link(self.input)
        self.recurrent.link(self.state.output_quantizer)
        self.sigmoid = QuantSigmoid("ufixed<7,0>", input="fixed<8,4>")
        self.one = QuantConstant("ufixed<1,1>", torch.ones(1))
        self.sum, self.rest = QuantAdd("fixed<10,4>"), QuantSub(None)
        self.keep, self.take, self.blend = QuantMul(None), QuantMul(None), QuantAdd(None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input(x)
        h = self.state.read(x)
        f = self.sigmoid(self.forget(x))
        c = self.sum(self.candidate(x), self.recurrent(h))
        new = self.blend(self.keep(f, h), self.take(self.rest(self.one(), f), c))
        return self.state.write(new), c


class Registers(nn.Module):
    """Codes that move: a delay of two, two states that exchange what they hold, maps, and a reshaped state."""

    shape = (3, 4, 2)

    def __init__(self) -> None:
        super().__init__()
        self.input = FixedQuantizer("fixed<6,3>")
        self.first = QuantState(self.shape, "fixed<6,3>")
        self.second = QuantState(self.shape, "fixed<6,3>")
        self.left = QuantState(self.shape, "fixed<7,4>")
        self.right = QuantState(self.shape, "fixed<7,4>")
        self.add, self.out = QuantAdd(None), QuantAdd("fixed<8,5>")
        self.readout = QuantLinear(24, 2, weights="fixed<5,1>", input=None, output="fixed<9,4>")
        self.readout.link(self.left.output_quantizer)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.input(x)
        first, second, left, right = (s.read(x) for s in (self.first, self.second, self.left, self.right))
        self.first.write(x)
        self.second.write(first)
        self.left.write(right)
        self.right.write(self.add(left, x))
        return self.out(second, right), self.readout(left.flatten(1))


class Twins(nn.Module):
    """Two states that always hold the same codes."""

    shape = (4,)

    def __init__(self) -> None:
        super().__init__()
        self.input = FixedQuantizer("fixed<6,3>")
        self.a, self.b = QuantState(4, "fixed<6,3>"), QuantState(4, "fixed<6,3>")
        self.add = QuantAdd("fixed<8,5>")

    def forward(self, x: Tensor) -> Tensor:
        x = self.input(x)
        return self.add(self.a(x), self.b(x))


CELLS: tuple[type[nn.Module], ...] = (Leaky, Gated, Registers)


def made(cell: Callable[[], nn.Module]) -> nn.Module:
    """The module in eval mode, with weights that fill their formats."""
    torch.manual_seed(5)
    module = cell()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("weight"):
                parameter.uniform_(-0.9, 0.9)
    return module.eval()


def exported(cell: type[nn.Module], folder: Path) -> tuple[nn.Module, Path]:
    """The module and its lowered file."""
    module, path = made(cell), folder / f"{cell.__name__}.onnx"
    edgemat.to_onnx(module, torch.zeros(2, *cell.shape), path)
    return module, path


def needs(name: str) -> None:
    """Skips where a backend cannot run, with its reason."""
    reason = backends.make(name, None).missing()
    if reason is not None:
        pytest.skip(reason)
