"""What all quantised layers share: how they know the grid of their inputs, exact arithmetic, and freezing for export.

A layer's bias lies on the grid of its accumulator, so it must know the binary point of its input. It either owns an
input quantiser (`input=`), or is linked to the quantiser that made its input, as `edgemat.quantize` does. A link is
held in a plain object: it is not registered, so it appears neither in `parameters()` nor twice in `state_dict()`, and
`copy.deepcopy` keeps it inside the copy.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.codes import Codes
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.quantizer import FixedQuantizer, quantizer_of

FLOAT32_EXACT = 1 << 24
FLOAT64_EXACT = 1 << 53


class Link:
    """An unregistered reference to modules owned elsewhere."""

    def __init__(self, *modules: nn.Module | None):
        self.modules = list(modules)


class QuantLayer(nn.Module):
    """Base of the quantised layers.

    Attributes:
        input_quantizer: Quantiser of the input, owned by this layer, or None.
        output_quantizer: Quantiser of the result, or None where the exact result leaves the layer.
        input_shape: Shape of the latest input, batch included, or None before the first forward.
        path: Name of this layer in its network, for messages.
        defers: Whether freezing may leave large codes to be made while they are written (`prepare_export`).
        deferred: Those codes, by the name of the buffer that stands for them.
        network: Name of the network `quantize` made, of which this layer is a part, or "".

    Args:
        input: Format of an own input quantiser, or None.
        output: Format of the result, or None.
        relu: Whether the output quantiser applies a ReLU first.
    """

    network = ""
    defers = False
    deferred: dict[str, Codes] = {}
    input_shape: tuple[int, ...] | None = None

    def __init__(
        self, input: str | Fixed | None = None, output: str | Fixed | FixedQuantizer | None = None, relu: bool = False
    ):
        super().__init__()
        self.input_quantizer = quantizer_of(input)
        self.output_quantizer = quantizer_of(output, role="requantize", relu=relu)
        self.path = ""
        self._links = Link()
        self._next = Link()
        self._frozen = False

    def link(self, *quantizers: FixedQuantizer | None) -> None:
        """Names the quantisers whose values reach this layer, one per input."""
        self._links = Link(*quantizers)

    def source(self, index: int = 0) -> FixedQuantizer | None:
        """The quantiser that made input `index`, or None where it is not known."""
        if self.input_quantizer is not None:
            return self.input_quantizer
        linked = self._links.modules
        if index < len(linked):
            found = linked[index]
            assert found is None or isinstance(found, FixedQuantizer)
            return found
        return None

    def known_source(self, index: int = 0) -> FixedQuantizer:
        """The quantiser that made input `index`.

        Raises:
            FormatError: if the layer neither owns an input quantiser nor is linked to one.
        """
        source = self.aligned_source(index)
        if source.per_channel:
            raise FormatError(
                f"layer {self.path or type(self).__name__!r} gets an input with a binary point per channel, expected "
                "one for the whole tensor; give it an input format of its own"
            )
        return source

    def aligned_source(self, index: int = 0) -> FixedQuantizer:
        """The quantiser that made input `index`, for layers that take channels of their own formats, aligned.

        Raises:
            FormatError: if the layer neither owns an input quantiser nor is linked to one.
        """
        source = self.source(index)
        if source is None:
            raise FormatError(
                f"layer {self.path or type(self).__name__!r} does not know the format of its input, expected "
                "input='fixed<8>' or the like in its constructor; layers made by edgemat.quantize know it"
            )
        return source

    def result_quantizer(self) -> FixedQuantizer | None:
        """The quantiser on whose grid the result lies, also where a part of this layer owns it; None for exact sums."""
        return self.output_quantizer

    def precede(self, quantizer: FixedQuantizer) -> None:
        """Names the quantiser of the ReLU that takes this layer's result and nobody else does."""
        self._next = Link(quantizer)

    @property
    def next_quantizer(self) -> FixedQuantizer | None:
        """The quantiser directly behind this layer: its own, or that of the ReLU it precedes."""
        if self.output_quantizer is not None:
            return self.output_quantizer
        found = self._next.modules[0] if self._next.modules else None
        assert found is None or isinstance(found, FixedQuantizer)
        return found

    @property
    def quantizes_ahead(self) -> bool:
        """Whether batch norm with batch statistics and the next quantiser run in one pass in this layer."""
        return False

    @property
    def reaches_relu(self) -> bool:
        """Whether this layer's pass contains the ReLU behind it and that ReLU's quantiser."""
        return self.output_quantizer is None and self.quantizes_ahead

    def enter(self, x: Tensor) -> Tensor:
        """Applies the own input quantiser, if any; keeps the shape of the input for the cost models."""
        if not torch.compiler.is_compiling():
            self.input_shape = tuple(x.shape)
        return x if self.input_quantizer is None else self.input_quantizer(x)

    def leave(self, y: Tensor) -> Tensor:
        """Applies the output quantiser, if any."""
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def defer(self, name: str, codes: Codes) -> None:
        """Leaves codes to be made while they are written; the buffer `name` stands for them in the trace."""
        self.deferred = {**self.deferred, name: codes}
        self.register_buffer(name, torch.zeros(1, dtype=torch.int32))

    def freeze(self) -> None:
        """Fixes integer codes and format texts for export; called on a copy by `prepare_export`."""
        self._frozen = True

    def check_frozen(self) -> None:
        """Refuses an export that was not prepared."""
        if not self._frozen:
            raise FormatError(
                f"layer {self.path or type(self).__name__!r} is exported without preparation, expected a frozen copy; "
                "use edgemat.to_onnx, or edgemat.nn.prepare_export before torch.onnx.export"
            )

    def carrier(self, bound: int) -> torch.dtype:
        """float32 or float64, whichever holds every partial sum below `bound` codes.

        Raises:
            FormatError: if neither does.
        """
        if bound < FLOAT32_EXACT:
            return torch.float32
        if bound < FLOAT64_EXACT:
            return torch.float64
        raise FormatError(
            f"layer {self.path or type(self).__name__!r} has partial sums of up to {bound} LSBs, expected less than "
            "2**53, which is what a float64 holds exactly; narrow the inputs or the weights"
        )


_EXACT = ("none", "ieee")


def _settings(device: torch.device) -> tuple[Any, ...]:
    """Where torch keeps the precision of float32 products on a device."""
    backends = torch.backends
    if device.type == "cuda":
        return backends.cuda.matmul, backends.cudnn.conv  # type: ignore[attr-defined]
    return backends.mkldnn.matmul, backends.mkldnn.conv  # type: ignore[attr-defined]


@contextlib.contextmanager
def _switched(device: torch.device) -> Iterator[None]:
    settings = _settings(device)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for setting in settings:
            stack.callback(setattr, setting, "fp32_precision", setting.fp32_precision)
            setting.fp32_precision = "ieee"
        if device.type == "cuda":
            # cuDNN may pick Winograd or FFT, which round; the native kernels multiply and add, which is exact here.
            stack.callback(setattr, torch.backends.cudnn, "enabled", torch.backends.cudnn.enabled)
            torch.backends.cudnn.enabled = False
        yield


_PLAIN = contextlib.nullcontext()


def exact_arithmetic(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """A context in which multiply-accumulates round nothing: no autocast, no TF32, no bfloat16, no Winograd."""
    device = x.device
    if device.type == "cpu" and torch.compiler.is_compiling():
        enabled = torch.is_autocast_enabled("cpu")
        return torch.autocast("cpu", enabled=False) if enabled else _PLAIN
    if (
        device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and all(setting.fp32_precision in _EXACT for setting in _settings(device))
    ):
        return _PLAIN
    return _switched(device)


def pair(value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One int per spatial axis."""
    return (value,) * rank if isinstance(value, int) else tuple(int(v) for v in value)
