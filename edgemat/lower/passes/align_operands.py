"""Aligns operands exactly and visibly.

1. An operator that does not take per-channel binary points gets its input on the finest grid of the channels.
2. An operator that wants one format for all inputs (Concat) gets them in the narrowest common format.

Both are Requantize nodes that lose nothing: they only shift left.
"""

from __future__ import annotations

import onnx_ir as ir

from edgemat.formats import accumulator
from edgemat.lower.passes.surgery import insert_requantize
from edgemat.lower.typing import CALL, type_node, type_of
from edgemat.op import Tensor
from edgemat.ops import BY_NAME


class AlignOperands(ir.passes.InPlacePass):
    """Requires every value typed; ensures that every dossier's wishes about input formats hold."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Walks the graph in order and retypes behind every change."""
        modified = False
        for node in list(model.graph):
            op = BY_NAME[node.op_type]
            for index, value in enumerate(node.inputs):
                if value is None or value.is_initializer():
                    continue
                tensor = type_of(value)
                if tensor is not None and tensor.format.per_channel and not op.takes_channels(tensor):
                    insert_requantize(model.graph, node, index, common_format([tensor]))
                    modified = True
            if op.same_format:
                types = [t for t in map(type_of, node.inputs) if t is not None]  # type: ignore[arg-type]
                target = common_format(types)
                for index, tensor in enumerate(types):
                    if str(tensor.format) != target and len({str(t.format) for t in types}) > 1:
                        insert_requantize(model.graph, node, index, target)
                        modified = True
            node.meta.pop(CALL, None)
            type_node(node)
        return ir.passes.PassResult(model, modified=modified)


def common_format(types: list[Tensor]) -> str:
    """Narrowest format on the finest grid of all `types` that holds all of them."""
    finest = max(t.format.finest for t in types)
    ends = [0] if any(t.format.widths is not None for t in types) else []
    for t in types:
        lows, highs = t.channel_intervals()
        for i, frac in enumerate(t.format.fracs):
            lo, hi = int(lows[i % lows.size]), int(highs[i % highs.size])
            ends += [lo << (finest - frac), hi << (finest - frac)] if lo or hi else [0]
    return str(accumulator(min(ends), max(ends), (finest,)))
