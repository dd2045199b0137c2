"""`FixedQuantizer`: rounds a tensor to a fixed-point format whose binary point may be learned."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import OVERFLOWS, ROUNDINGS, Fixed
from edgemat.nn import compiled
from edgemat.nn.affine import QuantizedBatchAffine, QuantizedBatchNorm
from edgemat.nn.emission import emit, exporting
from edgemat.nn.rounding import (
    EXPONENT_LIMIT,
    Grid,
    QuantizeChannels,
    QuantizeTensor,
    ReplaceForward,
    power_of_two,
    quantize_codes,
    range_frac,
)

EXTRA_STATE = "_extra_state"  # torch's name for what get_extra_state returns


class Observer(Protocol):
    """What calibration puts into a quantiser: it sees the real values and lets them pass."""

    def update(self, x: Tensor) -> None:
        """Takes note of one batch of values."""


class FixedQuantizer(nn.Module):
    """Rounds to a fixed-point format, ``v = overflow(round(x * 2**f)) / 2**f``, with straight-through gradients.

    A learned binary point is the float parameter `frac` (``f``, one entry or one per channel), rounded half to even.
    WRAP formats do not learn by gradient: their integer bits follow the range seen in training, so that training never
    wraps. `eval()` and `train()` give the same bits for the same `frac`.

    Attributes:
        frac: Fractional bits, float32, shape ``[]`` or ``[channels]``; a parameter where learned, else a buffer.
        calibrated: Whether the binary point is set: by the format, calibration, a checkpoint or the first batch.
        delayed: Whether real values pass while training (`edgemat.QuantizationDelay` sets it); eval mode rounds.
        path: Name of this quantiser in its network, for messages.
        network: Name of the network `quantize` made, of which this quantiser is a part, or "".

    Args:
        format: A format or its text; without ``int_bits`` the binary point is learned.
        channels: Number of channels with a binary point each, or None for one.
        axis: The channel axis.
        relu: Whether negative values become 0 first (the fused ReLU; gradient 0 at 0).
        role: ``"input"`` for real values from outside, ``"requantize"`` for values on a grid already,
            ``"weights"`` for parameters.
    """

    network = ""
    delayed = False

    def __init__(
        self,
        format: str | Fixed = "fixed<8>",
        channels: int | None = None,
        axis: int = 1,
        relu: bool = False,
        role: str = "input",
    ):
        super().__init__()
        fmt = Fixed.parse(format) if isinstance(format, str) else format
        if fmt.width > 32:
            raise FormatError(f"a quantiser of {fmt} was asked for, expected at most 32 bits in a torch layer")
        if isinstance(fmt.int_bits, tuple):
            channels = channels or len(fmt.int_bits)
            if len(fmt.int_bits) != channels:
                raise FormatError(f"{fmt} has {len(fmt.int_bits)} binary points, expected {channels}, one per channel")
        self.grid = Grid.of(fmt)
        self.relu = relu
        self.role = role
        self.axis = axis
        self.path = ""
        self.per_channel = channels is not None
        self.stated = fmt.int_bits is not None
        shape = (channels,) if channels is not None else ()
        start = torch.zeros(shape)
        if fmt.int_bits is not None:
            start = start + torch.tensor(fmt.frac_bits, dtype=torch.float32)
        if self.stated or fmt.overflow == "WRAP":
            self.register_buffer("frac", start)
        else:
            self.frac = nn.Parameter(start)
        self.tracks = fmt.overflow == "WRAP" and not self.stated
        if self.tracks and role != "weights":
            self.register_buffer("seen", torch.zeros(2, *shape))
        self.register_buffer("calibrated", torch.tensor(self.stated))
        self._ready = self.stated
        self._observer: Observer | None = None
        self._frozen: str | None = None

    # -- formats --------------------------------------------------------------------------------------------------
    @property
    def width(self) -> int:
        """Bits of a code."""
        return self.grid.width

    @property
    def signed(self) -> bool:
        """Whether codes are two's complement."""
        return self.grid.signed

    @property
    def ready(self) -> bool:
        """Whether the binary point is set."""
        return self._ready

    @property
    def observing(self) -> bool:
        """Whether real values pass: calibration looks at them, or quantisation has not begun in this training."""
        return self._passes()

    def _passes(self) -> bool:
        return self._observer is not None or (self.delayed and self.training)

    @property
    def format(self) -> Fixed:
        """The format as deployed, with its present binary point(s).

        Raises:
            FormatError: if the quantiser is not calibrated.
        """
        self._check_ready()
        return self._blank.with_frac(self.exponents().tolist() if self.per_channel else self.exponent())

    @property
    def _blank(self) -> Fixed:
        """The format with its binary point left open."""
        return Fixed(self.grid.width, None, self.grid.signed, self.grid.rounding, self.grid.overflow)

    @property
    def kind(self) -> str:
        """The format with its binary point left open, as messages spell it."""
        return str(self._blank)

    def exponent(self) -> int:
        """The rounded fractional bits of a per-tensor format."""
        value = self.frac.item()
        if not -EXPONENT_LIMIT <= value <= EXPONENT_LIMIT:
            raise FormatError(
                f"quantiser {self.path or self.role!r} learned {value} fractional bits, expected within "
                f"+-{EXPONENT_LIMIT}; lower the learning rate of the binary points"
            )
        return round(value)

    def exponents(self) -> Tensor:
        """The rounded fractional bits as an int32 tensor, shape ``[]`` or ``[channels]``."""
        return self.frac.detach().float().round().to(torch.int32)

    def finest(self) -> int:
        """Fractional bits of the grid on which layers take this quantiser's values: its finest channel's."""
        return int(self.exponents().amax().item()) if self.per_channel else self.exponent()

    def reach(self) -> int:
        """Largest absolute code on the grid of `finest`."""
        spread = self.finest() - int(self.exponents().amin().item()) if self.per_channel else 0
        return self.grid.magnitude << spread

    @property
    def promises(self) -> dict[str, Any]:
        """What else than a format holds for every code this quantiser makes: attributes of the layer's node."""
        return {}

    def round_codes(self, values: Tensor, scale: float) -> Tensor:
        """Codes of real values times `scale`, as integral floats; no gradient (calibration compares formats by it)."""
        return quantize_codes(values, self.grid, scale, False)

    def set_frac(self, frac: float | Tensor) -> None:
        """Sets the binary point(s) and marks the quantiser calibrated."""
        with torch.no_grad():
            self.frac.copy_(torch.as_tensor(frac, dtype=self.frac.dtype, device=self.frac.device))
            self.calibrated.fill_(True)
        self._ready = True

    def reset(self) -> None:
        """Marks a learned binary point as not set: calibration or the first training batch sets it anew."""
        if not self.stated:
            with torch.no_grad():
                self.calibrated.fill_(False)
            self._ready = False

    def fit(self, x: Tensor) -> None:
        """Sets the binary point(s) to the finest that hold the range of `x`."""
        x = x.detach()
        if self.relu:
            x = x.clamp_min(0.0)
        if not self.per_channel:
            low, high = (v.item() for v in torch.aminmax(x)) if x.numel() else (0.0, 0.0)
            self.set_frac(range_frac(low, high, self.grid))
            return
        rows = self._rows(x)
        lows, highs = rows.amin(1).tolist(), rows.amax(1).tolist()
        self.set_frac(torch.tensor([range_frac(a, b, self.grid) for a, b in zip(lows, highs, strict=True)]))

    def _rows(self, x: Tensor) -> Tensor:
        """One row of values per channel."""
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], -1)

    # -- computation ----------------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """Quantises `x` (any shape); float32, or float64 for formats of more than 24 bits."""
        if exporting():
            return self._emit(x)
        if (x.dtype != torch.float32 and x.dtype != torch.float64) or (
            self.role == "input" and x.dtype == torch.float64
        ):
            x = x.float()
        if self._observer is not None:
            x = x.relu() if self.relu else x
            self._observer.update(x)
            return x
        if not self._ready or self.tracks:
            self._settle(x)
        if compiled.compiling():
            return compiled.quantize(x, self.frac, self.grid, self.relu, self.axis if self.per_channel else None)
        if self.per_channel:
            return QuantizeChannels.apply(x, self.frac, self.grid, self.frac, self.axis, self.relu, None)
        return QuantizeTensor.apply(x, self.frac, self.grid, self.exponent(), self.relu)

    def folded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``Q(weight * scale) / scale`` for weights with a batch norm folded in.

        Args:
            weight: The float weights.
            scale: One factor per channel, float32, none of them 0.
        """
        if not self._ready or self.tracks:
            shape = [1] * weight.dim()
            shape[self.axis] = -1
            self._settle(weight * scale.view(shape))
        frac = self.frac if self.per_channel else self.frac.expand(scale.numel())
        return QuantizeChannels.apply(weight, frac, self.grid, frac, self.axis, self.relu, scale)

    def takes_rows(self, weight: Tensor | None, per_channel: bool = True) -> bool:
        """Whether native code may quantise `weight` row by row: the common format, learned points, in training."""
        return (
            type(self) is FixedQuantizer
            and weight is not None
            and self._ready
            and (self.per_channel or not per_channel)
            and (self.axis == 0 or not self.per_channel)
            and self.grid.common
            and not self.observing
            and weight.requires_grad
            and self.frac.requires_grad
            and torch.is_grad_enabled()
        )

    @property
    def takes_affine(self) -> bool:
        """Whether `affine` may be used: the common format, its binary point set, nobody observing."""
        grid = self.grid
        return (
            self._ready
            and not self.observing
            and not self.per_channel
            and grid.rounding == "RND"
            and grid.overflow in ("SAT", "SAT_SYM")
            and grid.width <= 22
        )

    def affine(self, x: Tensor, a: Tensor, b: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        """Quantises ``a * x + b`` per channel (axis 1), where a and b contain the batch statistics of x."""
        setting = self.grid, self.exponent(), self.relu
        return QuantizedBatchAffine.apply(x, a, b, (mean, var, eps), self.frac, setting)

    def normalized(self, x: Tensor, gamma: Tensor, beta: Tensor, *running: Any) -> Tensor:
        """Quantises a training batch norm of x; `running` are its mean, variance, momentum and eps."""
        return QuantizedBatchNorm.apply(x, gamma, beta, running, self.frac, (self.grid, self.exponent(), self.relu))

    def adopt(self, real: Tensor, exact: Tensor) -> Tensor:
        """`exact` (this quantiser's values, looked up in a table) with the gradients of quantising `real`."""
        return ReplaceForward.apply(real, exact, self.frac, self.grid, self.exponent())

    def codes(self, y: Tensor) -> Tensor:
        """int64 codes of values this quantiser made."""
        exponents = self.exponents()
        if self.per_channel:
            shape = [1] * y.dim()
            shape[self.axis] = -1
            exponents = exponents.view(shape)
        return torch.ldexp(y.detach().double(), exponents).to(torch.int64)

    def _settle(self, x: Tensor) -> None:
        """Sets a binary point that is missing (training only) or tracked (WRAP)."""
        if self.role == "weights" and self.tracks:
            self.fit(x)
            return
        if not self.training:
            self._check_ready()
            return
        if self.role == "weights":
            self.fit(x)
            return
        if not self.tracks:
            self.fit(x)
            return
        values = x.detach().clamp_min(0.0) if self.relu else x.detach()
        if self.per_channel:
            rows = self._rows(values)
            bounds = torch.stack([rows.amin(1), rows.amax(1)])
        else:
            bounds = torch.stack(list(torch.aminmax(values)))
        self.seen[0] = torch.minimum(self.seen[0], bounds[0])
        self.seen[1] = torch.maximum(self.seen[1], bounds[1])
        self.fit(self.seen.movedim(1, self.axis) if self.per_channel else self.seen)

    def _check_ready(self) -> None:
        if not self._ready:
            raise FormatError(
                f"quantiser {self.path or self.role!r} has no binary point yet, expected a calibrated one; call "
                "edgemat.calibrate(q, batches) first, load a calibrated state_dict, or run a training step"
            )

    # -- export and state -----------------------------------------------------------------------------------------
    def freeze(self) -> None:
        """Fixes the format as text for export."""
        self._frozen = str(self.format)

    def _emit(self, x: Tensor) -> Tensor:
        if self._frozen is None:
            raise FormatError(
                f"quantiser {self.path or self.role!r} is exported without preparation, expected a frozen copy; use "
                "edgemat.to_onnx, or edgemat.nn.prepare_export before torch.onnx.export"
            )
        if self.relu:
            x = torch.relu(x)
        op = "Quantize" if self.role == "input" else "Requantize"
        return emit(op, (x,), x.shape, y_format=self._frozen)

    def get_extra_state(self) -> Tensor:
        """Width, signedness, rounding and overflow as int64 numbers, kept in a `state_dict` beside the binary point."""
        grid = self.grid
        modes = ROUNDINGS.index(grid.rounding), OVERFLOWS.index(grid.overflow)
        return torch.tensor([grid.width, int(grid.signed), *modes])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: loading has compared the format already."""

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        # A float checkpoint knows nothing of quantisers: it loads, and leaves them as they are.
        own = [prefix + name for name in ("frac", "calibrated", "seen")]
        if not any(key in state_dict for key in own):
            return
        found = self._other_format(state_dict, prefix)
        if found is not None:
            errors.append(
                f"quantiser {prefix.removesuffix('.')!r} is {self.kind} in this network, but the checkpoint holds "
                f"{found}; quantise with the recipe the checkpoint was trained with"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + EXTRA_STATE in missing:
            missing.remove(prefix + EXTRA_STATE)  # from before formats were kept
        self._ready = bool(self.calibrated.item())

    def _other_format(self, state_dict: dict[str, Any], prefix: str) -> Fixed | str | None:
        """The format a checkpoint holds for this quantiser, or None where it is this one's, or not kept."""
        kept = state_dict.get(prefix + EXTRA_STATE)
        if kept is not None and kept.tolist() != self.get_extra_state().tolist():
            width, signed, rounding, overflow = kept.tolist()[:4]
            if overflow == len(OVERFLOWS):
                return "bipolar"
            fmt = Fixed(width, None, bool(signed), ROUNDINGS[rounding], OVERFLOWS[overflow])
            if kept.numel() > 5:
                return "ternary weights of another kind"
            return fmt if kept.numel() == 4 else f"{fmt} with khot={kept[4]}"
        frac = state_dict.get(prefix + "frac")
        if self.stated and frac is not None and frac.shape == self.frac.shape:
            points = frac.detach().float().round().tolist()
            if points != self.exponents().tolist():
                return f"{points} fractional bits instead of {self.exponents().tolist()}"
        return None

    def extra_repr(self) -> str:
        """The format, for printing."""
        fmt = self._blank
        learned = "" if self.stated else ", learned"
        points = "" if not self._ready else f", frac_bits={self.exponents().tolist()}"
        return f"{fmt}{points}{learned}{', relu' if self.relu else ''}"


def quantizer_of(format: str | Fixed | FixedQuantizer | None, **options: Any) -> FixedQuantizer | None:
    """A quantiser for a format, a text, an existing quantiser or nothing."""
    if format is None or isinstance(format, FixedQuantizer):
        return format
    fmt = Fixed.parse(format) if isinstance(format, str) else format
    if fmt.bipolar:
        from edgemat.nn.bipolar import BipolarQuantizer  # it derives from this module's class

        return BipolarQuantizer(fmt, **options)
    return FixedQuantizer(fmt, **options)


def check_points(format: str | Fixed, channels: int | None, label: str) -> None:
    """Refuses weights with stated binary points per channel for a layer of another number of channels.

    Args:
        format: Format of the weights.
        channels: Output channels of the layer, or None where its weights share one binary point.
        label: What the message calls the layer.
    """
    fmt = Fixed.parse(format) if isinstance(format, str) else format
    if not isinstance(fmt.int_bits, tuple) or len(fmt.int_bits) == channels:
        return
    expected = "one for the whole tensor" if channels is None else f"{channels}, one per output channel"
    raise FormatError(
        f"{label} has weights {fmt} with {len(fmt.int_bits)} binary points, expected {expected}; state them in a rule "
        "for this layer alone, or leave them out and let them be learned"
    )


def codes(values: Tensor, format: str | Fixed, axis: int = 1) -> Tensor:
    """int64 codes of exact values on the grid of a format.

    Args:
        values: What a layer in eval mode returns, float32 or float64.
        format: Their format, or its text; only the binary point(s) matter.
        axis: Channel axis for binary points per channel.

    Raises:
        FormatError: if a value does not lie on the grid.
    """
    fmt = Fixed.parse(format) if isinstance(format, str) else format
    exponents = torch.tensor(fmt.fracs, device=values.device)
    if len(fmt.fracs) > 1:
        shape = [1] * values.dim()
        shape[axis] = -1
        exponents = exponents.view(shape)
    scaled = values.detach().double() * power_of_two(exponents, torch.float64)
    found = scaled.to(torch.int64)
    if not torch.equal(found.double(), scaled):
        raise FormatError(f"values do not lie on the grid of {fmt}, expected exact values; compare in eval mode")
    return found


def unsigned(fmt: str | Fixed) -> Fixed:
    """The unsigned format of the same width; bipolar stays bipolar."""
    fmt = Fixed.parse(fmt) if isinstance(fmt, str) else fmt
    return replace(fmt, signed=False) if fmt.signed and not fmt.bipolar else fmt
