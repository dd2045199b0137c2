"""Weights of -1, 0 and +1 (or -1 and +1) and the scales that go with them.

**Codes.** With ``m = mean|W|`` over the tensor, or over each output channel, the trit of a weight is

=============  ========================================================================================================
``absmean``    ``clamp(round(W / m), -1, 1)``: 0 where ``|W| <= m / 2``, else the sign of W (round half to even, as
               published; MatMul-free LM, arXiv 2406.02528, equation 5)
``b1.58``      the same with one m for the tensor, at least 1e-5 (BitNet b1.58, arXiv 2402.17764, as its authors' code)
``learned``    0 where ``|W| <= c * m``, else the sign; c is learned from 0.7 on, and the scale is the mean of ``|W|``
               beyond the threshold (ternary weight networks, arXiv 1605.04711, equations 4 to 6)
``binary``     +1 where ``W >= mean(W)``, else -1 (BitNet, arXiv 2310.11453, equations 1 to 3; a tie is +1 here, as in
               the format ``bipolar``)
=============  ========================================================================================================

Means are taken in float64 and compared with float32 weights exactly.

**Scales.** A weight is ``trit * s`` with ``s = m`` (but for ``learned``). Deployed, s is

* ``power_of_two``: the nearest power of two in the logarithm (from ``sqrt(1/2)`` to ``sqrt(2)`` times it; the lower end
  counts). It is the binary point of ``fixed<2,I,RND,SAT_SYM>`` and costs nothing. For ``binary`` it is a shift behind.
* ``fixed<W>``: a constant of W bits that multiplies the finished sums, an Affine behind the layer; all channels share
  its binary point, the finest that holds the largest scale.
* ``free``: a float, for training alone.

**Gradients** pass to the weights as they are (the identity, as published). The threshold c of ``learned`` has that of
``s * clamp(round(W / (2 c m)))``: ``-s * W / (2 c**2 m)`` where ``|W| < 3 c m``, with s and m as constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgemat.codes import Codes, row_blocks
from edgemat.errors import FormatError, LoweringError
from edgemat.formats import BIPOLAR, Fixed
from edgemat.nn.quantizer import EXTRA_STATE, FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT, Grid, range_frac
from edgemat.recipe import TERNARY, checked_scale

KINDS = ("absmean", "learned", "b1.58", "binary")
B158_EPS = 1e-5
START = 0.7
"""Where the learned threshold starts, in mean magnitudes (arXiv 1605.04711, section 2.2)."""

_SQRT_HALF = 0.5**0.5
_LEARNED = 1 << 16  # no binary point is that far out


@dataclass(frozen=True)
class Scales:
    """What a layer exports beside its trits where the scale is not the format's binary point.

    Attributes:
        trits: The format of the layer's weights, unscaled: ternary with no fractional bits, or bipolar.
        behind: int64 codes that multiply the sums, one per output, and their format.
        before: int64 codes that multiply the inputs, one per input feature or channel, and their format, or None.
        khot: 1 where every such code is a power of two, else None.
    """

    trits: Fixed
    behind: tuple[Tensor, Fixed]
    before: tuple[Tensor, Fixed] | None = None
    khot: int | None = None


def nearest_power(scale: Tensor) -> Tensor:
    """Exponents (int64) of the powers of two nearest to positive numbers in the logarithm; 0 for 0."""
    mantissa, exponent = torch.frexp(scale.double())  # mantissa from 0.5 up to 1, or 0
    exponent = exponent.to(torch.int64)
    nearest = torch.where(mantissa >= _SQRT_HALF, exponent, exponent - 1)
    return torch.where(scale > 0, nearest, 0).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)


class _Ternarize(torch.autograd.Function):
    """The quantised weights, with the identity as the gradient of the weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor | None, quantizer: TernaryQuantizer) -> Tensor:
        y, slope, limit = quantizer.values(x)
        ctx.axis = quantizer.axis
        if ctx.needs_input_grad[1]:
            assert slope is not None and limit is not None
            ctx.save_for_backward(x, slope, limit)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g = grads[0]
        if not ctx.needs_input_grad[1]:
            return g, None, None
        x, slope, limit = ctx.saved_tensors
        moved = g * x * (x.abs() < limit)
        if slope.numel() == 1:
            return g, (moved.sum() * slope.view(())).view(()), None
        axes = [d for d in range(x.dim()) if d != ctx.axis]
        return g, moved.sum(axes) * slope.view(-1), None


class TernaryQuantizer(FixedQuantizer):
    """Rounds weights to trits with a scale for the tensor or for each channel.

    Attributes:
        ternary: The kind of codes, one of `KINDS`.
        scale: ``"power_of_two"``, ``"free"``, or the format of a fixed multiplier as text.
        frac: Fractional bits of the deployed scale, float32, ``[]`` or ``[channels]`` (a buffer).
        multiplier: The deployed scale in codes with `frac` fractional bits, float32, of the same shape (a buffer).
        held: Whether the deployed scale stays as it is while the weights go on (`hold`; a buffer).
        blend: How far the scale has come from the free one (0) to the deployed one (1) while training
            (`edgemat.ScaleDeployment` sets it); eval mode takes the deployed one at any time.
        threshold: The learned threshold in mean magnitudes, for ``learned``.

    Args:
        ternary: One of `KINDS`.
        scale: See above.
        channels: Number of channels with a scale each, or None for one.
        axis: The channel axis.

    Raises:
        FormatError: for another kind or scale, and for channels with ``b1.58``.
    """

    blend = 1.0

    def __init__(
        self, ternary: str = "absmean", scale: str = "power_of_two", channels: int | None = None, axis: int = 0
    ):
        super().__init__(TERNARY, channels=channels, axis=axis, role="weights")
        if ternary not in KINDS and type(self) is TernaryQuantizer:
            raise FormatError(f"ternary is {ternary!r}, expected one of {', '.join(KINDS)}")
        if ternary == "b1.58" and channels is not None:
            raise FormatError("ternary='b1.58' with a scale per channel was asked for, expected one for the tensor")
        self.ternary = ternary
        self.binary = ternary in ("binary", "onebit")
        shape = self.frac.shape
        del self.frac
        self.register_buffer("frac", torch.zeros(shape))
        self.register_buffer("multiplier", torch.ones(shape))
        self.register_buffer("held", torch.tensor(False))
        self._held = False
        self.threshold = nn.Parameter(torch.full(shape, START)) if ternary == "learned" else None
        self.tracks = True
        self._ready = True  # trits come from statistics: nothing waits for calibration
        self.calibrated.fill_(True)
        self.deploy(scale)

    def deploy(self, scale: str) -> None:
        """Sets the kind of scale that is deployed: ``"power_of_two"``, ``"fixed<W>"``, or ``"free"`` for none.

        Raises:
            FormatError: for another text.
        """
        self.scale = checked_scale(scale, "scale")
        self.factor = None if self.scale in ("power_of_two", "free") else Fixed.parse(self.scale)
        self.grid = self._grid()

    def _grid(self) -> Grid:
        """The grid of the scaled codes: trits times the multiplier."""
        width = 2 if self.factor is None else self.factor.width + (not self.factor.signed)
        return Grid.of(Fixed(width, None, True, "RND", "SAT_SYM"))

    @property
    def free(self) -> bool:
        """Whether the scale is a float that cannot be deployed."""
        return self.scale == "free"

    def _passes(self) -> bool:
        """Whether weights are off their grid: before quantisation begins, and while the scale is a float."""
        return super()._passes() or self.free or (self.training and self.blend < 1.0)

    # -- codes and scales -----------------------------------------------------------------------------------------
    def measure(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Thresholds or centres, and free scales of `x`: float64, laid along its channels (`_lay`).

        For kinds with a 0 the first are the largest magnitudes that become 0, for ``binary`` what separates the signs.
        """
        count = max(1, x.numel() // (x.shape[self.axis] if self.per_channel else 1))
        scale = self._sums(lambda rows: x[rows].abs(), x) / count
        if not bool(torch.isfinite(scale).all()):
            raise FormatError(
                f"the weights of {self.path or 'a ternary layer'!r} are not all finite, expected finite numbers; lower "
                "the learning rate"
            )
        if self.ternary == "binary":
            return self._sums(lambda rows: x[rows], x) / count, scale
        if self.ternary == "b1.58":
            scale = scale.clamp_min(B158_EPS)
        if self.threshold is None:
            return scale * 0.5, scale
        limit = self._lay(self.threshold.detach().double(), x) * scale

        def beyond(rows: slice) -> Tensor:
            return x[rows].abs() > self._of_rows(limit, rows)

        total = self._sums(lambda rows: x[rows].abs() * beyond(rows), x)
        number = self._sums(beyond, x)
        return limit, torch.where(number > 0, total / number.clamp_min(1), 0.0)

    def _sums(self, values: Callable[[slice], Tensor], x: Tensor) -> Tensor:
        """float64 sums over each channel, or over all, of what `values` makes of rows of `x`: of some at a time."""
        axes = [d for d in range(x.dim()) if d != self.axis] if self.per_channel else list(range(x.dim()))
        if not axes:
            return values(slice(None)).double()
        blocks = [slice(*block) for block in row_blocks(tuple(x.shape))]
        if self.axis or x.dim() < 2 or len(blocks) == 1:
            return values(slice(None)).sum(axes, keepdim=True, dtype=torch.float64)
        # Sums go to a place made before: small results kept beside freed blocks would leave holes as large as x.
        count = len(x) if self.per_channel else len(blocks)
        parts = torch.empty(count, *[1] * (x.dim() - 1), dtype=torch.float64, device=x.device)
        for index, rows in enumerate(blocks):
            place = rows if self.per_channel else slice(index, index + 1)
            parts[place] = values(rows).sum(axes, keepdim=True, dtype=torch.float64)
        return parts if self.per_channel else parts.sum(0, keepdim=True)

    def _of_rows(self, laid: Tensor, rows: slice) -> Tensor:
        """The entries that belong to rows of a tensor, of values laid along its channels."""
        return laid[rows] if self.per_channel and not self.axis else laid

    def rows(self, x: Tensor, limit: Tensor) -> Codes:
        """The trits of weights ``[outputs, ...]`` by what `measure` gave first for them, made block by block; int8."""

        @torch.no_grad()
        def read(first: int, last: int) -> np.ndarray:
            rows = slice(first, last)
            made: np.ndarray = self.trits(x[rows], self._of_rows(limit, rows)).to(torch.int8).cpu().numpy()
            return made

        return Codes(tuple(x.shape), np.dtype(np.int8), read)

    def trits(self, x: Tensor, limit: Tensor) -> Tensor:
        """-1, 0 and +1 as float32 of the shape of `x`."""
        if self.binary:
            return torch.where(x >= limit, 1.0, -1.0)
        return torch.sign(x).masked_fill_(x.abs() <= limit, 0.0).float()

    def _lay(self, values: Tensor, x: Tensor) -> Tensor:
        shape = [1] * x.dim()
        if self.per_channel:
            shape[self.axis] = -1
        return values.view(shape)

    def settle_scale(self, scale: Tensor) -> None:
        """Sets `frac` and `multiplier` for free scales (any shape of as many numbers), unless they are held."""
        if self._held:
            return
        scale = scale.reshape(self.frac.shape).double()
        if self.factor is None:
            frac, codes = -nearest_power(scale), torch.ones_like(scale)
        else:
            grid = Grid.of(self.factor)
            point = self.factor.fracs[0] if self.factor.int_bits is not None else None
            if point is None:
                point = range_frac(0.0, float(scale.max()), grid)
            frac = torch.full_like(scale, point)
            codes = torch.floor(scale * math.ldexp(1.0, point) + 0.5).clamp(0, grid.high)
        self.frac.copy_(frac)
        self.multiplier.copy_(codes)

    @torch.no_grad()
    def values(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Quantised weights (float32), and for a learned threshold the slope and the limit of its gradient."""
        limit, scale = self.measure(x)
        self.settle_scale(scale)
        deployed = self._lay(torch.ldexp(self.multiplier.double(), -self.frac.to(torch.int32)), x)
        real = self.free or (self.training and self.blend < 1.0)
        used = deployed if not real else self._between(scale, deployed)
        y = self.trits(x, limit).mul_(used.float())
        if self.threshold is None:
            return y, None, None
        # c * m is `limit`, so that s / (2 c**2 m) is s / (2 c limit); a threshold at 0 has no slope.
        c = self._lay(self.threshold.double(), x)
        slope = torch.where(limit != 0, -used / (2.0 * c * limit), 0.0)
        return y, slope.to(x.dtype), (3.0 * limit).to(x.dtype)

    def _between(self, free: Tensor, deployed: Tensor) -> Tensor:
        """The geometric mean of both scales with the weight `blend` (0: free)."""
        if self.free or self.blend <= 0.0:
            return free
        tiny = torch.finfo(torch.float64).tiny
        return torch.where(free > 0, free * (deployed.clamp_min(tiny) / free.clamp_min(tiny)) ** self.blend, free)

    # -- what layers call -----------------------------------------------------------------------------------------
    def forward(self, x: Tensor) -> Tensor:
        """Quantises weights of any shape; float32."""
        return _Ternarize.apply(x if x.dtype == torch.float32 else x.float(), self.threshold, self)

    def folded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``Q(weight * scale) / scale`` for weights with a batch norm folded in."""
        laid = scale.view([-1 if d == self.axis else 1 for d in range(weight.dim())])
        return self(weight * laid) / laid

    def hold(self, held: bool = True) -> None:
        """Keeps the deployed scale as it is (or lets it follow the weights again); trits follow the weights always."""
        self.held.fill_(held)
        self._held = held

    def set_frac(self, frac: float | Tensor) -> None:
        """Nothing to do: the scale follows the weights, or is held."""

    def reset(self) -> None:
        """Lets the scale follow the weights again."""
        self.hold(False)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Sets the deployed scale by the statistics of `x`."""
        self.settle_scale(self.measure(x.detach())[1])

    # -- export and state -----------------------------------------------------------------------------------------
    @property
    def format(self) -> Fixed:
        """The format of the exported codes: with the scale as its binary point, or without it (`scales`)."""
        if self.scales is not None:
            return self.scales.trits
        return TERNARY.with_frac(self.exponents().tolist() if self.per_channel else self.exponent())

    @property
    def scales(self) -> Scales | None:
        """The scales to be exported beside the trits, or None where the binary point is the scale."""
        if self.factor is None and not self.binary:
            return None
        trits = BIPOLAR if self.binary else TERNARY.with_frac(0)
        codes, fracs = self.multiplier.to(torch.int64), self.exponents().tolist()
        if self.factor is not None:
            fmt = self.factor if self.factor.int_bits is not None else self.factor.with_frac(_first(fracs))
            return Scales(trits, (codes, fmt))
        return Scales(trits, (codes, TERNARY.with_frac(fracs)), khot=1)

    def check_deployable(self) -> None:
        """Refuses a free scale.

        Raises:
            LoweringError: names the layer and the remedy.
        """
        if self.free:
            raise LoweringError(
                f"layer {self.path.removesuffix('.weight_quantizer') or 'with ternary weights'!r} has a free scale (a "
                "float), expected a power of two or a fixed multiplier, which integers can carry out; train it with "
                "scale='power_of_two' or 'fixed<8>', or bring it there with edgemat.ScaleDeployment"
            )

    @property
    def kind(self) -> str:
        """What the weights are, as messages spell it."""
        return f"ternary ({self.ternary}) with scale {self.scale}"

    def get_extra_state(self) -> Tensor:
        """The ternary format, the kind of codes, and the deployed scale: its kind, format and point; int64 numbers."""
        number = {"power_of_two": 0, "free": 1}.get(self.scale, 2)
        width, point = 0, _LEARNED
        if self.factor is not None:
            width = 2 * self.factor.width + self.factor.signed
            point = _LEARNED if self.factor.int_bits is None else int(self.factor.int_bits)  # type: ignore[arg-type]
        return torch.tensor([2, 1, 2, 2, (*KINDS, "onebit").index(self.ternary), number, width, point])

    def set_extra_state(self, state: Tensor) -> None:
        """Takes the scale over: a schedule may have brought a free one to another while the checkpoint was trained."""
        number, width, point = state.tolist()[5:]
        stated = None if point == _LEARNED else point
        self.deploy(("power_of_two", "free")[number] if number < 2 else str(Fixed(width // 2, stated, bool(width % 2))))

    def _other_format(self, state_dict: dict[str, Any], prefix: str) -> Fixed | str | None:
        kept = state_dict.get(prefix + EXTRA_STATE)
        if kept is not None and kept.numel() > 5 and kept.tolist()[:5] == self.get_extra_state().tolist()[:5]:
            return None
        return super()._other_format(state_dict, prefix)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._ready, self._held = True, bool(self.held.item())

    def extra_repr(self) -> str:
        """The kind, for printing."""
        return self.kind


def _first(values: int | Sequence[int]) -> int:
    return values if isinstance(values, int) else int(values[0])
