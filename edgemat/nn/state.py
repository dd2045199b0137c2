"""`QuantState`: what one step of a recurrent network hands to the next, in a declared format.

A cell owns its states. In a step it reads each once or more, then writes each once:

    h = self.state.read(x)                      # what the step before wrote; zeros in the first
    h = self.state.write(self.decay(h) + x)     # quantised, kept, and returned

The step is what `edgemat.to_onnx` exports: every state becomes an input and an output of the file. Training runs over
whole sequences and hands the state along as a tensor, so that gradients reach back through time:

    h = self.state.initial(x[0])
    for x_t in x:
        h = self.state.quantize(self.decay(h) + x_t)

`write` keeps exactly what `quantize` returns, hence both ways give the same codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.emission import emit, exporting
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer


class _Step:
    """Where one traced step stands: the emitted nodes of a state. A plain object, so that no tracer looks inside."""

    def __init__(self) -> None:
        self.read: Tensor | None = None
        self.written: Tensor | None = None


class QuantState(QuantLayer):
    """A recurrent state: values on a fixed-point grid that stay from one step to the next, zeros at first.

    The number of samples is that of the first tensor read with; another number is refused until `reset`.

    Attributes:
        shape: Shape of one sample, without the batch.
        value: What the last step wrote, float32 ``[N, *shape]`` (float64 beyond 24 bits), or None after `reset`.

    Args:
        shape: Length of the only axis, or the shape of one sample.
        format: Format of the state, or a `FixedQuantizer` that makes its values (shared with its owner then).
        persistent: Whether `value` goes into the `state_dict`.

    Raises:
        FormatError: for the format ``bipolar``, which has no zero, or an empty shape.
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        format: str | Fixed | FixedQuantizer = "fixed<8>",
        *,
        persistent: bool = False,
    ):
        super().__init__(None, format)
        assert self.output_quantizer is not None
        self.shape = (shape,) if isinstance(shape, int) else tuple(int(extent) for extent in shape)
        if not self.shape or min(self.shape) < 1:
            raise FormatError(f"a state of shape {self.shape} was asked for, expected at least one axis, none empty")
        if isinstance(self.output_quantizer, BipolarQuantizer):
            raise FormatError("a state of the format bipolar was asked for, expected one that has the value 0")
        self.value: Tensor | None
        self.register_buffer("value", None, persistent=persistent)
        self.persistent = persistent
        self._begun = False
        self._step = _Step()
        self._y_format = ""

    # -- over time, explicitly ------------------------------------------------------------------------------------
    def initial(self, x: Tensor) -> Tensor:
        """Zeros ``[N, *shape]`` for the N samples of `x`, on its device: the state before the first step."""
        return torch.zeros((x.shape[0], *self.shape), dtype=self._dtype, device=x.device)

    def quantize(self, x: Tensor) -> Tensor:
        """The values `write` would keep of `x`, with straight-through gradients; keeps nothing.

        Args:
            x: ``[..., *shape]``, real or on any grid.
        """
        assert self.output_quantizer is not None
        return self.output_quantizer(x)

    # -- step by step ---------------------------------------------------------------------------------------------
    def read(self, x: Tensor) -> Tensor:
        """The state as this step sees it: ``[N, *shape]`` for the N samples of `x`.

        Args:
            x: Any tensor of the step with the batch on axis 0.

        Raises:
            FormatError: if the state holds another number of samples, or gradients are wanted in training mode.
            LoweringError: while exporting, if the state was written already in this step.
        """
        if exporting():
            return self._emit_read(x)
        self._refuse_tracing(x)
        self._refuse_training()
        self._begun = True
        if self.value is None:
            self.value = self.initial(x)
        if self.value.shape[0] != x.shape[0]:
            raise FormatError(
                f"state {self._label} holds {self.value.shape[0]} samples and is read for {x.shape[0]}, expected the "
                "same number in every step of a sequence; call reset() before another sequence"
            )
        return self.value

    def write(self, x: Tensor) -> Tensor:
        """Quantises ``[N, *shape]``, keeps it for the next step and returns it.

        Raises:
            FormatError: if the step did not read the state first, or wrote it before, or the shape is another one.
        """
        if exporting():
            return self._emit_write(x)
        self._refuse_tracing(x)
        self._refuse_training()
        if not self._begun or self.value is None:
            raise FormatError(
                f"state {self._label} is written twice in a step, or before it was read, expected read(), then "
                "write(), once a step"
            )
        if x.shape != self.value.shape:
            raise FormatError(
                f"state {self._label} is written in shape {tuple(x.shape)}, expected {tuple(self.value.shape)}"
            )
        made = self.quantize(x)
        self.value, self._begun = made.detach(), False
        return made

    def reset(self) -> None:
        """Forgets everything: the next step reads zeros, for any number of samples."""
        self.value, self._begun = None, False

    def forward(self, x: Tensor) -> Tensor:
        """A delay of one step: writes `x`, returns what the step before wrote."""
        before = self.read(x)
        self.write(x)
        return before

    # -- export and state -----------------------------------------------------------------------------------------
    @property
    def _label(self) -> str:
        return repr(self.path) if self.path else f"of shape {self.shape}"

    @property
    def _dtype(self) -> torch.dtype:
        assert self.output_quantizer is not None
        return torch.float32 if self.output_quantizer.width <= 24 else torch.float64

    def _refuse_tracing(self, x: Any) -> None:
        if isinstance(x, fx.Proxy):
            raise LoweringError(
                f"state {self._label} is read or written in the forward that edgemat.quantize traces, which follows "
                "tensors and no states; build the recurrent network from edgemat.nn layers and calibrate it as it is"
            )

    def _refuse_training(self) -> None:
        if self.training and torch.is_grad_enabled():
            raise FormatError(
                f"state {self._label} is read or written step by step in training mode, where no gradient would reach "
                "back through it; hand the state along as a tensor (initial, quantize), or call eval()"
            )

    def freeze(self) -> None:
        """Fixes the format as text for export."""
        super().freeze()
        assert self.output_quantizer is not None
        self._y_format = str(self.output_quantizer.format)

    def _emit_read(self, x: Tensor) -> Tensor:
        self.check_frozen()
        if self._step.written is not None:
            raise LoweringError(
                f"state {self._label} is read again after it was written in the exported step, expected all reads "
                "first; use what write() returned"
            )
        if self._step.read is None:
            shape = (x.shape[0], *self.shape)
            self._step.read = emit("State", (x,), shape, name=self.path or "state", y_format=self._y_format)
        return self._step.read

    def _emit_write(self, x: Tensor) -> Tensor:
        self.check_frozen()
        if self._step.read is None or self._step.written is not None:
            raise LoweringError(
                f"state {self._label} is written twice in the exported step, or before it was read, expected read(), "
                "then write(), once"
            )
        made = self.quantize(x)
        self._step.written = emit("NextState", (made,), made.shape, state=self.path or "state")
        return made

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        kept = state_dict.get(f"{prefix}value") if self.persistent else None
        self.value = None if kept is None else torch.empty_like(kept, device=self._device)
        self._begun = False
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def _device(self) -> torch.device:
        assert self.output_quantizer is not None
        return self.output_quantizer.frac.device

    def extra_repr(self) -> str:
        """Shape and whether a checkpoint keeps the value."""
        return f"shape={self.shape}{', persistent' if self.persistent else ''}"


def states_of(module: nn.Module) -> dict[str, QuantState]:
    """The states of a module by path, each once."""
    return {name: part for name, part in module.named_modules() if isinstance(part, QuantState)}


def reset_states(module: nn.Module) -> None:
    """Resets every state of a module."""
    for state in states_of(module).values():
        state.reset()


@contextmanager
def states_handed_out(module: nn.Module) -> Iterator[int]:
    """While it lasts, a call of `module` returns ``(result, what was written)``; gives the number of states.

    Modules without states are left alone. The exporter keeps only what reaches an output.

    Raises:
        LoweringError: from that call, if it reads or writes a state too seldom.
    """
    states = list(states_of(module).values())
    if not states:
        yield 0
        return

    def begin(_module: nn.Module, _arguments: Any) -> None:
        for state in states:
            state._step = _Step()

    def finish(_module: nn.Module, _arguments: Any, result: Any) -> Any:
        written = []
        for state in states:
            if state._step.written is None:
                done = "read but never written" if state._step.read is not None else "neither read nor written"
                raise LoweringError(
                    f"state {state._label} is {done} in the exported step, expected read(), then write(), once; a "
                    "state that the step does not need can be left out"
                )
            written.append(state._step.written)
        return result, written

    handles = [module.register_forward_pre_hook(begin), module.register_forward_hook(finish)]
    try:
        yield len(states)
    finally:
        for handle in handles:
            handle.remove()
        for state in states:
            state._step = _Step()
