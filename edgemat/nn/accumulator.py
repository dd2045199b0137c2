"""Accumulator-aware weights: a sum that P bits hold whatever the input, in any order, by construction (A2Q, A2Q+).

Let the input's codes span ``lo..hi`` and ``R = 2**(P-1) - 1``. With the sums ``S+`` of the positive and ``S-`` of the
negative weight codes (as magnitudes) every partial sum in any order, bias code b included, lies within ``+-R`` if

* A2Q (arXiv 2308.13504, equation 15): ``(S+ + S-) * max(|lo|, hi) + |b| <= R``; for N-bit inputs this is
  ``||q||_1 <= (2**(P-1) - 1) * 2**(signed - N)`` (an unsigned input reaches ``2**N - 1``, so a little more is allowed);
* A2Q+ (arXiv 2401.10432, equation 7): ``max(S+, S-) * (hi - lo) + |b| <= R``. Weights that sum to zero have
  ``S+ = S- = ||q||_1 / 2``, and the bound is ``||q||_1 <= (2**P - 2) / (2**N - 1)``, for unsigned inputs twice A2Q's.

**Weights.** ``w = g * v / n(v)`` for each output, ``n`` being ``||v||_1``, or ``2 * max(S+, S-)`` of v less its mean.
``g = 2**t`` is learned (`AccumulatorQuantizer.log2_norm`) and clamped to what the bound leaves; weights round toward
zero, so that codes only shrink: neither S+ nor S- can exceed what holds before rounding, and zero-centred weights need
not sum to zero afterwards.

**Bias.** It counts: b saturates at half of R, and the weights get what it leaves. The two caps are taken from the
rounded bias code, half a code wide: a sum of integers that stays below ``cap + 1`` is at most ``cap``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT, range_frac

BOUNDS = ("auto", "a2q", "a2q+")
_CANDIDATES = 8
TINY = 1e-100
"""In place of a norm of 0: any quotient by it exceeds 1, and neither it nor its derivative overflows float64."""
_MARGIN = 1.0 - 2.0**-20
"""More than float32 loses in scaling a weight (six times 2**-24); for caps of less than 2**19 it costs no code."""


@dataclass(frozen=True)
class Sum:
    """What one sum must keep.

    Attributes:
        bits: P.
        low: Smallest code of the input, at most 0.
        high: Largest code of the input, at least 0.
        centred: Whether the bound is A2Q+'s.
        biased: Whether a bias shares the accumulator.
    """

    bits: int
    low: int
    high: int
    centred: bool
    biased: bool

    @property
    def room(self) -> int:
        """R: the largest magnitude of a partial sum."""
        return (1 << (self.bits - 1)) - 1

    @property
    def bias_limit(self) -> int:
        """Largest magnitude of a bias code."""
        return self.room // 2 if self.biased else 0

    @property
    def reach(self) -> int:
        """What one unit of the bounded sum of codes adds at most: of the L1 norm (A2Q), of S+ or S- (A2Q+)."""
        return self.high - self.low if self.centred else max(self.high, -self.low)

    @property
    def factor(self) -> float:
        """M: what one unit of `row_norms` adds at most."""
        return self.reach / 2 if self.centred else float(self.reach)

    def caps(self, bias: Tensor | None) -> Tensor:
        """Largest `row_norms` of weight codes before they round toward zero, float64 ``[outputs]`` or ``[]``.

        Args:
            bias: Integral bias codes, float64, or None.
        """
        left = torch.tensor(float(self.room), dtype=torch.float64) if bias is None else self.room - bias.abs()
        whole = torch.floor(left / max(self.reach, 1)) if self.reach else left.new_full(left.shape, 2.0**52)
        # Float division of integers below 2**53 may round a quotient up to the next integer: give that one back.
        whole = whole - (whole * self.reach > left).double()
        return (whole + 0.5) * _MARGIN * (2.0 if self.centred else 1.0)


def row_norms(weight: Tensor, axis: int, centred: bool) -> Tensor:
    """``||w||_1`` of each output, or, zero-centred, ``2 * max(S+, S-)``; float64 ``[outputs]``."""
    rows = weight.movedim(axis, 0).flatten(1)
    total = rows.abs().sum(1, dtype=torch.float64)
    # S+ and S- are (total + sum) / 2 and (total - sum) / 2.
    return total + rows.sum(1, dtype=torch.float64).abs() if centred else total


def project_onto_ball(rows: Tensor, radius: Tensor, centred: bool = False) -> Tensor:
    """The nearest rows (Euclidean distance) with ``||row||_1 <= radius`` (Duchi et al., ICML 2008, figure 1).

    Args:
        rows: ``[outputs, inputs]``, float64.
        radius: One for each row, at least 0.
        centred: Whether ``S+ <= radius / 2`` and ``S- <= radius / 2`` are asked for instead. The set is a product, so
            positive and negative entries are projected apart; rows that sum to zero go on doing so.
    """
    if centred:
        halves = radius / 2.0
        return project_onto_ball(rows.clamp_min(0.0), halves) - project_onto_ball((-rows).clamp_min(0.0), halves)
    if rows.shape[1] == 0:
        return rows
    size = rows.abs()
    ordered = size.sort(1, descending=True).values
    excess = ordered.cumsum(1) - radius[:, None]
    counts = torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device)
    last = (ordered * counts > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = (excess.gather(1, last - 1) / last).clamp_min(0.0)
    return (size - threshold).clamp_min(0.0).copysign(rows)


class AccumulatorQuantizer(FixedQuantizer):
    """Quantises weights whose sums keep within a given accumulator.

    Attributes:
        log2_norm: t: log2 of each output's norm g before the clamp and before a batch norm is folded in; float32
            ``[outputs]``. Used once `started`.
        started: Whether `log2_norm` is set (by calibration or the first training step); before, g is the weight's own.

    Args:
        format: A format or its text; weights round toward zero (``TRN_ZERO``), which takes the place of the default
            ``RND``. SAT or SAT_SYM.
        bits: P, the accumulator's width, 2 to 64.
        outputs: Number of output channels.
        bound: ``"a2q"``, ``"a2q+"`` (zero-centred), or ``"auto"``, which `meet` settles.
        channels: Number of channels with a binary point each, or None for one.
        axis: Axis of the output channels.

    Raises:
        FormatError: for another rounding or overflow mode.
    """

    def __init__(
        self,
        format: str | Fixed = "fixed<8>",
        bits: int = 16,
        outputs: int = 1,
        bound: str = "auto",
        channels: int | None = None,
        axis: int = 0,
    ):
        fmt = Fixed.parse(format) if isinstance(format, str) else format
        if fmt.rounding not in ("RND", "TRN_ZERO") or fmt.overflow not in ("SAT", "SAT_SYM") or bound not in BOUNDS:
            raise FormatError(
                f"weights {fmt} with accumulator={bits} (bound {bound!r}), expected rounding TRN_ZERO (or none "
                f"stated), overflow SAT or SAT_SYM and one of the bounds {', '.join(BOUNDS)}; only rounding toward "
                "zero keeps a bound"
            )
        super().__init__(replace(fmt, rounding="TRN_ZERO"), channels=channels, axis=axis, role="weights")
        self.bits, self.bound, self.asked = bits, bound, bound
        self.log2_norm = nn.Parameter(torch.zeros(outputs))
        self.register_buffer("started", torch.tensor(False))
        self.sum: Sum | None = None

    def meet(self, signed: bool) -> None:
        """Settles the bound ``"auto"`` for an input: zero-centring gains where it is unsigned, and only costs else."""
        if self.asked == "auto":
            self.bound = "a2q" if signed else "a2q+"

    @property
    def centred(self) -> bool:
        """Whether weights are zero-centred (A2Q+)."""
        return self.bound == "a2q+"

    def along(self, values: Tensor, weight: Tensor) -> Tensor:
        """One value for each output, laid out to broadcast against `weight`."""
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return values.view(shape)

    def real(self, weight: Tensor) -> Tensor:
        """``g * v / n(v)`` of the parameter v; v itself (zero-centred for A2Q+) until `started`."""
        if self.centred:
            axes = [d for d in range(weight.dim()) if d != self.axis]
            weight = weight - weight.mean(axes, keepdim=True) if axes else weight
        if not bool(self.started):
            if not (self.training and weight.requires_grad):
                return weight
            self.start(weight)
        norms = row_norms(weight, self.axis, self.centred)
        scale = self.norms() / norms.clamp_min(TINY)
        return weight * self.along(torch.where(norms > 0.0, scale, 0.0).to(weight.dtype), weight)

    def norms(self) -> Tensor:
        """g of each output, float64."""
        return torch.exp2(self.log2_norm.double().clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT))

    @torch.no_grad()
    def start(self, weight: Tensor) -> None:
        """Sets `log2_norm` to that of `weight`."""
        norms = row_norms(weight, self.axis, self.centred)
        self.log2_norm.copy_(torch.where(norms > 0.0, norms, 1.0).log2().float())
        self.started.fill_(True)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Sets the binary point(s) of least squared error under the bound, from the finest that hold the range down.

        Coarser points leave a larger ball (in real numbers), finer ones round less.
        """
        if self.sum is None:
            super().fit(x)
            return
        rows = x.detach().double().movedim(self.axis, 0).flatten(1)
        if self.per_channel:
            ends = zip(rows.amin(1).tolist(), rows.amax(1).tolist(), strict=True)
            finest = torch.tensor([range_frac(a, b, self.grid) for a, b in ends], dtype=torch.float64)
        else:
            low, high = (v.item() for v in torch.aminmax(rows)) if rows.numel() else (0.0, 0.0)
            finest = torch.full((rows.shape[0],), float(range_frac(low, high, self.grid)), dtype=torch.float64)
        cap = self.sum.caps(None).expand(rows.shape[0])
        fracs = torch.stack([(finest - i).clamp_min(-EXPONENT_LIMIT) for i in range(_CANDIDATES)])
        errors = torch.stack([self._error(rows, frac, cap) for frac in fracs])
        if self.per_channel:
            self.set_frac(fracs.gather(0, errors.argmin(0, keepdim=True))[0].float())
        else:
            self.set_frac(float(fracs[int(errors.sum(1).argmin()), 0]) if rows.shape[0] else 0.0)

    def _error(self, rows: Tensor, frac: Tensor, cap: Tensor) -> Tensor:
        """Squared error of each row's projected and rounded codes."""
        scale = torch.exp2(frac)[:, None]
        codes = project_onto_ball(rows * scale, cap, self.centred).trunc().clamp(self.grid.low, self.grid.high)
        return (codes / scale - rows).square().sum(1)

    def extra_repr(self) -> str:
        """The format, for printing."""
        return f"{super().extra_repr()}, accumulator={self.bits}, bound={self.bound}"
