"""Weights whose widths are learned: `LearnedWidthQuantizer`.

Every group of weights (the tensor, an output channel, N inputs of one output, a single weight) learns its fractional
bits ``f``: ``v = round(w * 2**f) / 2**f``. Integer bits follow the values' range, so nothing saturates, and a group's
width is what its codes need: ``max(0, i + f)`` bits and a sign. The recipe's width is the ceiling: no group is finer
than the grid on which its output channel fills that width. Where ``f`` is so low that a weight rounds to 0 it is
pruned; it costs nothing, still learns, and lives again where the loss asks for it.

Gradients are QFX's in range (Dai et al., arXiv 2401.17544; HGQ, arXiv 2405.00645, arrives at the same):
``dv/dw = 1``, ``dv/df = ln2 * (w - v)``; the cost of a live weight falls by one bit with each fractional bit. It falls
by one bit, too, each time the weight halves: its bits grow with ``log2|w|``, whose derivative is ``1 / (ln2 * w)``. HGQ
leaves that gradient out. Times `PULL` it draws weights that the loss hardly needs to zero while the others stay,
because it fades with the magnitude; docs/learned-widths.md shows what it saves.

In the file the weights of one output channel (or tensor) are integer codes on the finest grid that one of them uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import native
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.rounding import EXPONENT_LIMIT, LN2, power_of_two, round_doubled_

PULL = 4.0
"""Factor of the cost's gradient of the weights themselves (0 leaves it out)."""
POINT_LIMIT = 80
"""Largest distance of a learned binary point from the units; float32 holds twice that."""


class Groups:
    """Which weights share one entry of a parameter.

    Args:
        shape: Shape of the weights.
        axis: Axis of the output channels.
        rows: Whether binary points may differ by output channel.
        groups: ``"tensor"``, ``"channel"``, ``"weight"``, or a number of inputs of one output.

    Attributes:
        shape: Shape of the parameter.
        row_axes: Axes over which an output channel's weights extend (all, where `rows` is false).
    """

    def __init__(self, shape: Sequence[int], axis: int, rows: bool, groups: str | int):
        dims = range(len(shape))
        self.row_axes = [d for d in dims if not rows or d != axis]
        self.size, self.inputs, self.input_axis = 0, 0, 0
        if groups == "weight":
            self.shape: tuple[int, ...] = tuple(shape)
        elif isinstance(groups, int) and rows and len(shape) > 1:
            self.input_axis = 1 - axis
            self.size, self.inputs = groups, shape[self.input_axis]
            count = -(-self.inputs // groups)
            self.shape = tuple(shape[d] if d == axis else count if d == self.input_axis else 1 for d in dims)
        elif groups == "tensor" or not rows:
            self.shape = ()
        else:
            self.shape = tuple(shape[d] if d == axis else 1 for d in dims)
        self.rows = self._rows(shape, axis, rows)

    def _rows(self, shape: Sequence[int], axis: int, rows: bool) -> tuple[int, int, int, int] | None:
        """Rows, their size, weights of an entry and entries of a row, where weights lie row by row; else None."""
        if rows and (axis != 0 or not self.shape):
            return None
        count = shape[0] if rows else 1
        size = math.prod(shape) // max(count, 1)
        entries = math.prod(self.shape) // max(count, 1)
        per = self.size * math.prod(shape[2:]) if self.size else size // max(entries, 1)
        return count, size, max(per, 1), entries

    def highest(self, values: Tensor) -> Tensor:
        """Largest value of each output channel, dimensions kept."""
        return values.amax(self.row_axes, keepdim=True) if self.row_axes else values

    def spread(self, values: Tensor) -> Tensor:
        """Entries laid along the weights: a tensor that broadcasts against them."""
        if not self.size:
            return values
        return values.repeat_interleave(self.size, self.input_axis).narrow(self.input_axis, 0, self.inputs)

    def gather(self, values: Tensor) -> Tensor:
        """Sums of a tensor of the weights' shape over each group."""
        if not self.size:
            return values.sum_to_size(self.shape)
        count = self.shape[self.input_axis]
        index = torch.arange(self.inputs, device=values.device) // self.size
        axes = [d for d in range(values.dim()) if self.shape[d] == 1 and d != self.input_axis]
        rows = values.sum(axes, keepdim=True) if axes else values
        shape = list(rows.shape)
        shape[self.input_axis] = count
        return rows.new_zeros(shape).index_add_(self.input_axis, index, rows)


class _Rounded(torch.autograd.Function):
    """Value `v` with the straight-through gradients of rounding `w` to groups of `frac` fractional bits."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, v: Tensor, frac: Tensor, groups: Groups) -> Tensor:
        ctx.groups = groups
        ctx.save_for_backward(w, v)
        return v.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        w, v = ctx.saved_tensors
        g = grads[0]
        df = None
        if ctx.needs_input_grad[2]:
            df = ctx.groups.gather((w - v).mul_(g).mul_(LN2))
        return g, None, df, None


class _Bits(torch.autograd.Function):
    """Bits of each weight; a live one costs a bit more with each fractional bit and each time it doubles."""

    @staticmethod
    def forward(ctx: Any, frac: Tensor, w: Tensor, bits: Tensor, slope: float, pull: float, groups: Groups) -> Tensor:
        ctx.groups, ctx.slope, ctx.pull = groups, slope, pull
        ctx.save_for_backward(bits, w)
        return bits.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        bits, w = ctx.saved_tensors
        live = (bits > 0) & (w != 0)
        g = torch.where(live, grads[0] * ctx.slope, 0.0)
        df = ctx.groups.gather(g) if ctx.needs_input_grad[0] else None
        dw = torch.where(live, g * (ctx.pull / LN2) / w, 0.0) if ctx.needs_input_grad[1] else None
        return df, dw, None, None, None, None


def enclosed_bits(codes: Tensor) -> Tensor:
    """Bits from the highest to the lowest one of ``|code|``, float32: 0 for 0, 1 for powers of two, 2 for 3 and 6.

    Args:
        codes: Integers below 2**53 in magnitude, int64.
    """
    magnitude = codes.abs()
    lowest = magnitude & -magnitude
    span = torch.frexp(magnitude.double()).exponent - torch.frexp(lowest.double()).exponent + 1
    return torch.where(magnitude > 0, span, torch.zeros_like(span)).float()


def signed_digits(codes: Tensor) -> Tensor:
    """Nonzero digits of the canonical signed digit form, float32: 1 for 4, 2 for 3 and 7, 0 for 0.

    The digits of ``n`` are nonzero where ``n`` and ``3 * n`` differ in binary.

    Args:
        codes: Integers below 2**61 in magnitude, int64.
    """
    magnitude = codes.abs()
    different = (magnitude * 3) ^ magnitude
    count = torch.zeros_like(different)
    for shift in range(1, int(different.max().item()).bit_length() if codes.numel() else 1):
        count += (different >> shift) & 1
    return count.float()


class LearnedWidthQuantizer(FixedQuantizer):
    """Rounds weights to groups of learned width, from the format's width down to 0 (pruned).

    Attributes:
        frac: Fractional bits of each group, a float parameter of the shape `Groups` gives it, rounded half to even.
        pull: Factor of the cost's gradient of the weights, `PULL`.
        points: Fractional bits of the codes as deployed, int32, ``[outputs]`` or ``[]``: the finest a weight uses.
        span: Bits of the widest code as deployed, sign included, int32.

    Args:
        format: Ceiling of the width; signed, of at least 2 bits, its binary point left open.
        shape: Shape of the weights.
        outputs: Number of output channels, or None where binary points cannot differ by channel.
        axis: Axis of the output channels.
        groups: ``"tensor"``, ``"channel"``, ``"weight"``, or a number of inputs of one output.
    """

    def __init__(
        self,
        format: str | Fixed,
        shape: Sequence[int],
        outputs: int | None,
        axis: int = 0,
        groups: str | int = "weight",
    ):
        fmt = Fixed.parse(format) if isinstance(format, str) else format
        if fmt.bipolar or not fmt.signed or fmt.width < 2 or fmt.int_bits is not None:
            raise FormatError(
                f"weights of learned width are {fmt}, expected a signed ceiling of at least 2 bits with a learned "
                f"binary point, such as 'fixed<{max(fmt.width, 2)}>'"
            )
        super().__init__(fmt, outputs, axis, role="weights")
        self.tracks = False
        self.groups = Groups(shape, axis, outputs is not None, groups)
        self.frac = nn.Parameter(torch.zeros(self.groups.shape))
        self.register_buffer("points", torch.zeros(() if outputs is None else (outputs,), dtype=torch.int32))
        self.register_buffer("span", torch.tensor(fmt.width, dtype=torch.int32))
        self.pull = PULL
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None  # codes, the weights they come from, and their bits

    # -- formats ---------------------------------------------------------------------------------------------------
    @property
    def format(self) -> Fixed:
        """The format of the codes as deployed, each channel's binary point at the finest its weights use."""
        self._check_ready()
        blank = Fixed(int(self.span), None, True, self.grid.rounding, self.grid.overflow)
        return blank.with_frac(self.points.tolist())

    def exponent(self) -> int:
        """Fractional bits of the codes, where the tensor has one binary point."""
        return int(self.points.item())

    def exponents(self) -> Tensor:
        """Fractional bits of the codes, int32, shape ``[]`` or ``[outputs]``."""
        return self.points

    @torch.no_grad()
    def set_frac(self, frac: float | Tensor) -> None:
        """Sets the fractional bits of all groups (a number), or of each output channel's groups."""
        found = torch.as_tensor(frac, dtype=torch.float32, device=self.frac.device)
        if found.dim() == 1 and self.per_channel:
            shape = [1] * max(self.frac.dim(), 1)
            shape[self.axis if self.frac.dim() > 1 else 0] = -1
            found = found.amin() if self.frac.dim() == 0 else found.view(shape)
        self.frac.copy_(found.expand_as(self.frac))
        self.calibrated.fill_(True)
        self._ready = True

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Every group as fine as the ceiling of its channel allows."""
        limit = self._ceiling(x.detach().float())
        lowest = limit if self.groups.shape else limit.amin()
        self.frac.copy_(lowest.expand(self.groups.shape))
        self.calibrated.fill_(True)
        self._ready = True
        self._round(x.detach())
        self._kept = None

    def _ceiling(self, w: Tensor) -> Tensor:
        """The finest fractional bits of each channel, int32, dimensions kept: its largest weight fills the width."""
        top = self.groups.highest(w.abs()) if w.numel() else w.new_zeros([1] * w.dim())
        bits = torch.frexp(top).exponent
        return (self.grid.width - 1 - bits).clamp_(-POINT_LIMIT, POINT_LIMIT)

    # -- computation -----------------------------------------------------------------------------------------------
    @torch.no_grad()
    def _round(self, w: Tensor) -> Tensor:
        """Rounded weights; keeps their codes and the binary points they lie on."""
        w = w.float()
        values = self._round_natively(w)
        if values is not None:
            return values
        ceiling = self._ceiling(w)
        if self.training and self._ready:
            top = ceiling if self.groups.shape else ceiling.amax()
            low = (top - self.grid.width - 1).expand(self.groups.shape)
            self.frac.copy_(torch.minimum(torch.maximum(self.frac, low.float()), top.float()))
        wanted = self.groups.spread(self.frac).round().clamp(min=-EXPONENT_LIMIT).to(torch.int32)
        values = self._values(w, wanted, ceiling)
        grown = self._ceiling(values)  # rounding up may have reached the next power of two
        if bool((grown < ceiling).any()):
            ceiling = torch.minimum(ceiling, grown)
            values = self._values(w, wanted, ceiling)
        codes = (values.double() * power_of_two(ceiling, torch.float64)).to(torch.int64)
        self._settle_points(codes, ceiling)
        self._kept = codes, w, enclosed_bits(codes)
        return values

    def _round_natively(self, w: Tensor) -> Tensor | None:
        """What `_round` does in one pass, or None where that is not possible."""
        rows = self.groups.rows
        passes = native.kernel(w, self.frac) if rows is not None and self.grid.rounding == "RND" else None
        if passes is None:
            return None
        values, bits, codes = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w, dtype=torch.int64)
        tensors = values, codes, bits, self.points, self.span, self.frac, w
        modes = self.grid.width, int(self.training and self._ready), int(self.grid.overflow == "SAT_SYM")
        if passes.edgemat_round_groups(*(t.data_ptr() for t in tensors), *rows, *modes):
            return None
        torch.autograd.graph.increment_version(self.frac)
        self._kept = codes, w, bits
        return values

    def _values(self, w: Tensor, wanted: Tensor, ceiling: Tensor) -> Tensor:
        frac = torch.minimum(wanted, ceiling)
        return round_doubled_(w * power_of_two(frac + 1), self.grid.rounding).mul_(power_of_two(-frac))

    def _settle_points(self, codes: Tensor, ceiling: Tensor) -> None:
        """The coarsest grid of each channel that still holds its codes; a channel of zeros takes the others' finest."""
        magnitude = codes.abs()
        lowest = torch.where(magnitude > 0, magnitude & -magnitude, 1 << 62)
        lowest = -self.groups.highest(-lowest)
        spare = (torch.frexp(lowest.double()).exponent - 1).to(torch.int32)
        alive = spare < 62
        points = ceiling - spare
        finest = torch.where(alive, points, -POINT_LIMIT).amax()
        points = torch.where(alive, points, torch.where(alive.any(), finest, 0))
        self.points.copy_(points.reshape(self.points.shape))
        reduced = codes >> torch.where(alive, spare, 0).long()
        low = -reduced.amin() - int(self.grid.overflow != "SAT_SYM")
        top = torch.maximum(reduced.amax(), low) if codes.numel() else low
        self.span.copy_(torch.frexp(top.clamp_min(0).double()).exponent + 1)

    def forward(self, x: Tensor) -> Tensor:
        """Quantises the weights `x`; float32."""
        return self._quantize(x, None)

    def folded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``Q(weight * scale) / scale`` for weights with a batch norm folded in; `scale` has one entry per channel."""
        shape = [1] * weight.dim()
        shape[self.axis] = -1
        return self._quantize(weight, scale.view(shape))

    @torch.compiler.disable  # native passes: nothing for a compiler
    def _quantize(self, x: Tensor, scale: Tensor | None) -> Tensor:
        x = x.float()
        if self.observing:
            return x
        deployed = x.detach() if scale is None else x.detach() * scale
        if not self._ready:
            if not self.training:
                self._check_ready()
            self.fit(deployed)
        values = self._round(deployed)
        assert self._kept is not None
        self._kept = self._kept[0], x, self._kept[2]
        if scale is not None:
            values = values / scale
        return _Rounded.apply(x, values, self.frac, self.groups)

    @property
    def takes_affine(self) -> bool:
        """Never: the single pass knows no groups."""
        return False

    # -- cost ------------------------------------------------------------------------------------------------------
    @property
    def has_codes(self) -> bool:
        """Whether a forward has left its codes."""
        return self._kept is not None

    def codes_now(self) -> Tensor:
        """int64 codes of the latest forward's weights, on grids of their own; only zeros and ratios carry meaning.

        Raises:
            FormatError: if there was no forward yet.
        """
        if self._kept is None:
            raise FormatError(
                f"quantiser {self.path or self.role!r} has quantised no weights yet, expected a forward before its cost"
            )
        return self._kept[0]

    def bits(self) -> Tensor:
        """Bits of the latest forward's codes between their highest and lowest one.

        Differentiable in `frac` and in the weights; add what comes of it to the loss of that forward.
        """
        self.codes_now()
        assert self._kept is not None
        return self._counted(self._kept[2], 1.0)

    def digits(self) -> Tensor:
        """Nonzero signed digits of the latest forward's codes; differentiable as `bits`, a third of a digit per bit."""
        return self._counted(signed_digits(self.codes_now()), 1.0 / 3.0)

    def _counted(self, found: Tensor, slope: float) -> Tensor:
        assert self._kept is not None
        return _Bits.apply(self.frac, self._kept[1], found, slope, self.pull, self.groups)

    # -- state -----------------------------------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take along: everything but the codes of the latest forward."""
        return {**self.__dict__, "_kept": None}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._kept = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Ceiling and groups, for printing."""
        shared = math.prod(self.groups.shape)
        return f"{self._blank}, learned width of {shared} group{'' if shared == 1 else 's'}"
