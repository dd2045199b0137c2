"""The float network inside a quantised one: its own graph with every quantiser letting real values pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from edgemat.nn.bipolar import BipolarQuantizer
from edgemat.nn.quantizer import FixedQuantizer


class Silent:
    """An observer that takes note of nothing."""

    def update(self, x: Tensor) -> None:
        """Does nothing."""


def real(quantizer: FixedQuantizer, x: Tensor) -> Tensor:
    """What a quantiser would round: `x` as float32 (or float64), behind the fused ReLU."""
    x = x if x.is_floating_point() and x.dtype.itemsize >= 4 else x.float()
    return x.relu() if quantizer.relu else x


@contextlib.contextmanager
def real_values(q: nn.Module) -> Iterator[None]:
    """Within this context `q` computes in eval mode what its float network computes, folded batch norms included.

    A bipolar quantiser is the network's own sign function and stays; weights that bound an accumulator keep the bound.
    """
    quantizers = [
        part for part in q.modules() if isinstance(part, FixedQuantizer) and not isinstance(part, BipolarQuantizer)
    ]
    with contextlib.ExitStack() as stack:
        for quantizer in quantizers:
            stack.callback(setattr, quantizer, "_observer", quantizer._observer)
            quantizer._observer = Silent()
            hook = quantizer.register_forward_hook(lambda part, inputs, rounded: real(part, inputs[0]))
            stack.callback(hook.remove)
        yield
