"""`BipolarQuantizer`: the set {-1, +1}, ``x >= 0`` gives +1, with the clipped straight-through gradient.

**Gradient.** The sign's derivative is 0 almost everywhere. As in BinaryNet (Courbariaux et al., arXiv 1602.02830,
equation 4), the gradient passes where ``|x| <= 1`` and is cancelled beyond, which is the derivative of hardtanh. For
weights that cancels the updates of latent values that have saturated; `clip_latent_weights` also keeps the latent
values themselves inside [-1, 1], as that paper does after each update. It is optional: latent weights that start small
(torch's initialisation) rarely leave the interval.

There is no binary point to learn and nothing to calibrate. Signs, not real values, pass while `edgemat.calibrate`
observes, because the layers behind would otherwise be calibrated for values they never see.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.formats import BIPOLAR, OVERFLOWS, ROUNDINGS, Fixed
from edgemat.nn.emission import exporting
from edgemat.nn.quantizer import FixedQuantizer


class Sign(torch.autograd.Function):
    """-1 below 0, else +1; the gradient of hardtanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x < 0, -1.0, 1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, _below(-1.0, x.dtype), -_below(-1.0, x.dtype))


def _below(value: float, dtype: torch.dtype) -> float:
    """The next number below `value`: torch cancels the gradient at the ends of hardtanh, BinaryNet keeps it."""
    return value * (1.0 + torch.finfo(dtype).eps)


class BipolarQuantizer(FixedQuantizer):
    """Rounds to -1 and +1; the arguments are those of `FixedQuantizer`, of which only `role` matters.

    While quantisation is delayed (`edgemat.QuantizationDelay`), activations pass through hardtanh, the function whose
    gradient the sign borrows, and weights as they are.

    Raises:
        FormatError: if a ReLU precedes it (every value would be +1).
    """

    def __init__(
        self,
        format: str | Fixed = BIPOLAR,
        channels: int | None = None,
        axis: int = 1,
        relu: bool = False,
        role: str = "input",
    ):
        fmt = Fixed.parse(format) if isinstance(format, str) else format
        if not fmt.bipolar:
            raise FormatError(f"a bipolar quantiser of {fmt} was asked for, expected 'bipolar'")
        if relu:
            raise FormatError(
                "a bipolar quantiser behind a ReLU was asked for, which would give +1 for every value; leave the ReLU "
                "out (the sign is the activation function) or use Hardtanh"
            )
        super().__init__(fmt, None, axis, False, role)

    def _passes(self) -> bool:
        """Whether real values pass: only before quantisation begins in a delayed training, never in calibration."""
        return self.delayed and self.training

    @property
    def format(self) -> Fixed:
        """``bipolar``."""
        return BIPOLAR

    @property
    def _blank(self) -> Fixed:
        return BIPOLAR

    def exponent(self) -> int:
        """0: codes are values."""
        return 0

    def forward(self, x: Tensor) -> Tensor:
        """The sign of `x` (any shape), 0 included among the positive; float32 or float64 as given."""
        if exporting():
            return self._emit(x)
        if x.dtype not in (torch.float32, torch.float64) or (self.role == "input" and x.dtype == torch.float64):
            x = x.float()
        if self.observing:
            return x if self.role == "weights" else F.hardtanh(x)
        return Sign.apply(x)

    def folded(self, weight: Tensor, scale: Tensor) -> Tensor:
        """Refused: {-1, +1} cannot take a batch norm's scale in."""
        raise FormatError(
            f"quantiser {self.path or self.role!r} is bipolar and a batch norm is to be folded into it, expected a "
            "batch norm of its own behind the layer; use batch_norm='affine'"
        )

    def get_extra_state(self) -> Tensor:
        """Width, signedness, rounding and overflow as int64 numbers; bipolar's overflow follows the others."""
        return torch.tensor([1, 1, ROUNDINGS.index(BIPOLAR.rounding), len(OVERFLOWS)])

    def extra_repr(self) -> str:
        """The format, for printing."""
        return "bipolar"


@torch.no_grad()
def clip_latent_weights(module: nn.Module) -> None:
    """Clips the real weights behind every bipolar weight of `module` to [-1, 1]; call it after ``optimizer.step()``.

    Beyond 1 a latent weight no longer changes the network and gets no gradient, so that only weight decay could bring
    it back (arXiv 1602.02830).

    Raises:
        FormatError: for what is no module.
    """
    from edgemat.nn.arguments import module as checked

    for part in checked("clip_latent_weights", module).modules():
        if isinstance(getattr(part, "weight_quantizer", None), BipolarQuantizer) and isinstance(part.weight, Tensor):
            part.weight.clamp_(-1.0, 1.0)
