"""MaxPool of bytes with channels last; adding an offset keeps the order, and padding is never chosen."""

from __future__ import annotations

from edgemat.op import Call
from edgemat.ops.pooling import MaxPool
from edgemat.sim.carriers import Carried, FusedBody, Packed


def pool_bytes(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a 2-D MaxPool whose input is written with channels last."""
    assert isinstance(call.op, MaxPool)
    if not x[0].is_channels_last:
        return None
    source = x[0].packed(channels_last=True)
    value = body.microsoft(
        "NhwcMaxPool",
        source.value,
        kernel_shape=list(call.attrs["kernel_shape"]),
        strides=list(call.attrs["strides"]),
        pads=list(call.attrs["pads"]),
        dilations=list(call.op.dilations(call)),
        ceil_mode=call.attrs["ceil_mode"],
    )
    return Carried(body, call.y[0], packed=lambda: Packed(value, source.offset, channels_last=True))
