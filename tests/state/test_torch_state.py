"""QuantState: its order of use, its batch, training over sequences, checkpoints, and what an export refuses."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.errors import EdgematError, FormatError, LoweringError
from edgemat.nn import FixedQuantizer, QuantState, reset_states
from tests.state.cells import Leaky, made


def test_a_sequence_at_once_and_step_by_step_give_the_same_codes() -> None:
    cell = made(Leaky)
    x = torch.randn(40, 3, 5) * 3
    with torch.no_grad():
        whole = cell.sequence(x)
        steps = torch.stack([cell(x_t) for x_t in x])
        assert torch.equal(whole, steps)
        assert not torch.equal(torch.stack([cell(x_t) for x_t in x]), whole)  # the state stayed
        reset_states(cell)
        assert torch.equal(torch.stack([cell(x_t) for x_t in x]), whole)


def test_gradients_reach_back_through_time() -> None:
    cell = made(Leaky).train()
    x = (torch.randn(6, 2, 5) / 8).requires_grad_()
    cell.sequence(x)[-1].sum().backward()
    assert x.grad is not None and all((x.grad[t] != 0).any() for t in range(6))
    with pytest.raises(FormatError, match="training mode, where no gradient would reach back"):
        cell(x[0])
    with torch.no_grad():
        cell(x[0])  # calibration and evaluation of a module that trains


def test_order_of_use() -> None:
    state, x = QuantState(2, "fixed<6,3>").eval(), torch.zeros(3, 2)
    with pytest.raises(FormatError, match="before it was read"):
        state.write(x)
    assert torch.equal(state.read(x), state.read(x))
    assert torch.equal(state.write(x + 0.3), torch.full((3, 2), 0.25))
    with pytest.raises(FormatError, match="written twice in a step"):
        state.write(x)
    assert torch.equal(state.read(x), torch.full((3, 2), 0.25))
    with pytest.raises(FormatError, match=r"written in shape \(3, 1\)"):
        state.write(x[:, :1])
    with pytest.raises(FormatError, match="holds 3 samples and is read for 4"):
        state.read(torch.zeros(4, 2))
    state.reset()
    assert state.read(torch.zeros(4, 2)).shape == (4, 2)


def test_formats_and_shapes_that_hold_no_state() -> None:
    for format, shape, words in (
        ("bipolar", 2, "bipolar"),
        ("fixed<6,3>", (), "at least one axis"),
        ("fixed<6,3>", 0, "at least"),
    ):
        with pytest.raises(FormatError, match=words):
            QuantState(shape, format)
    assert QuantState(2, "fixed<30,10>").eval().read(torch.zeros(1, 2)).dtype == torch.float64


@pytest.mark.parametrize("persistent", [False, True])
def test_a_checkpoint_keeps_the_value_on_request(persistent: bool) -> None:
    state = QuantState(2, "fixed<6,3>", persistent=persistent).eval()
    state(torch.ones(3, 2))
    kept = state.state_dict()
    assert ("value" in kept) is persistent
    other = QuantState(2, "fixed<6,3>", persistent=persistent).eval()
    other.load_state_dict(kept)
    assert torch.equal(other.read(torch.zeros(3, 2)), torch.full((3, 2), float(persistent)))
    twin = copy.deepcopy(state)
    twin.reset()
    assert state.value is not None and twin.value is None


class Wrong(nn.Module):
    """One way to use a state wrongly in a step."""

    def __init__(self, use: Callable[[QuantState, Tensor], Tensor]) -> None:
        super().__init__()
        self.input, self.memory, self.use = FixedQuantizer("fixed<6,3>"), QuantState(2, "fixed<6,3>"), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.memory, self.input(x))


def twice(state: QuantState, x: Tensor) -> Tensor:
    state(x)
    return state(x)


def rewritten(state: QuantState, x: Tensor) -> Tensor:
    state(x)
    return state.write(x)


WRONG = {
    "read but never written": lambda s, x: s.read(x),
    "neither read nor written": lambda s, x: x,
    "before it was read": lambda s, x: s.write(x),
    "written twice in the exported step": rewritten,
    "read again after it was written": twice,
}


@pytest.mark.parametrize("words", WRONG)
def test_an_export_of_a_wrong_step_is_refused_with_the_state_named(words: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=words) as refusal:
        edgemat.to_onnx(Wrong(WRONG[words]).eval(), torch.zeros(2, 2), tmp_path / "wrong.onnx")
    assert "'memory'" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_state_written_without_its_format_is_refused(tmp_path: Path) -> None:
    """A shape that differs is seen at export; eager mode sees it in the step."""
    module = Wrong(lambda s, x: s.write(s.read(x)[:, :1]))
    with pytest.raises(EdgematError, match="shape"):
        edgemat.to_onnx(module.eval(), torch.zeros(2, 2), tmp_path / "wrong.onnx")


def test_an_export_leaves_the_module_and_its_state_alone(tmp_path: Path) -> None:
    cell = made(Leaky)
    with torch.no_grad():
        cell(torch.ones(3, 5))
    before = cell.state.value.clone()
    edgemat.to_onnx(cell, torch.zeros(1, 5), tmp_path / "cell.onnx")
    edgemat.to_onnx(cell, torch.zeros(7, 5), tmp_path / "again.onnx")
    assert torch.equal(cell.state.value, before) and not cell._forward_hooks
    assert (tmp_path / "cell.onnx").read_bytes() == (tmp_path / "again.onnx").read_bytes()
