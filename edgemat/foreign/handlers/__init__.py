"""Which function takes which node of a foreign file, by (domain, operator)."""

from __future__ import annotations

from edgemat.foreign.handlers import (
    channels_last,
    deeploy,
    elementwise,
    joins,
    layout,
    minifloat,
    pooling,
    qdq,
    qonnx,
    qoperator,
    softmax,
    thresholds,
    truncation,
    weighted,
)
from edgemat.foreign.translator import Handler

HANDLERS: dict[tuple[str, str], Handler] = {
    **weighted.HANDLERS,
    **elementwise.HANDLERS,
    **joins.HANDLERS,
    **layout.HANDLERS,
    **pooling.HANDLERS,
    **qdq.HANDLERS,
    **qoperator.HANDLERS,
    **softmax.HANDLERS,
    **qonnx.HANDLERS,
    **thresholds.HANDLERS,
    **channels_last.HANDLERS,
    **deeploy.HANDLERS,
    **minifloat.HANDLERS,
    **truncation.HANDLERS,
}
