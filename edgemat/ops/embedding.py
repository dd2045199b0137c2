"""Embedding: rows of a table of codes by an index, ``y[..., :] = table[x, :]``.

An index is a code with no fractional bits between 0 and the last row, proved: the graph's input quantiser states the
largest index (`Quantize`, attribute ``limit``). No index beyond the table reaches the operator, so none is clipped
here. An input from outside is checked where it comes in: the Simulator refuses an index that is no row, the generated C
returns a status and computes nothing.
"""

from __future__ import annotations

import numpy as np

from edgemat.body import Body, Coded
from edgemat.codes import Codes
from edgemat.formats import holds_codes
from edgemat.op import Attr, Call, Cost, Native, Op, Result
from edgemat.ops.cases import constant, random_codes, tensor


class Embedding(Op):
    """Inputs: indices x [N] or [N, T], table [V, D]; output [N, D] or [N, T, D]."""

    name = "Embedding"
    stem = "embedding"
    arity = (2, 2)
    attributes = {"y_format": Attr(str)}

    def _table(self, call: Call) -> np.ndarray:
        table = self._held(call)
        return table.array() if isinstance(table, Codes) else table

    def _held(self, call: Call) -> np.ndarray | Codes:
        """The table, checked but not widened where it stays in its file."""
        stored, x = call.stored(1), call.x[0]
        table = call.constant(1) if stored is None else stored
        if table is None or table.ndim != 2 or not table.size:
            raise call.refuse(
                f"a table of shape {None if table is None else table.shape}", "expected constant codes [rows, features]"
            )
        if x.format.bipolar or x.format.per_channel or x.format.fracs != (0,):
            raise call.refuse(f"indices of {x.format}", "expected whole numbers such as ufixed<8,8>")
        if len(x.shape) not in (1, 2) or not x.batched:
            raise call.refuse(f"indices of shape {x.shape}", "expected [N] or [N, T]")
        if x.lo < 0 or x.hi >= table.shape[0]:
            raise call.refuse(
                f"indices from {x.lo} to {x.hi} for {table.shape[0]} rows",
                "state the largest index at the input: Quantize(limit=rows - 1), as edgemat.nn.QuantEmbedding does",
            )
        return table

    def infer(self, call: Call) -> tuple[Result, ...]:
        held, fmt = self._held(call), call.format_attr("y_format")
        if isinstance(held, Codes) and (call.x[0].lo, call.x[0].hi + 1) == (0, held.shape[0]) and not fmt.bipolar:
            lo, hi = held.survey.lo, held.survey.hi
            if fmt.per_channel or lo < fmt.min_code or hi > fmt.max_code:
                raise call.refuse(f"table codes {lo} to {hi} do not fit {fmt}", "widen it")
            return (Result((*call.x[0].shape, held.shape[1]), fmt, lo, hi),)
        table = self._table(call)
        reached = table[call.x[0].lo : call.x[0].hi + 1]
        lo, hi = int(reached.min()), int(reached.max())
        if fmt.per_channel or not holds_codes(table, fmt):
            raise call.refuse(f"table codes {int(table.min())} to {int(table.max())} do not fit {fmt}", "widen it")
        return (Result((*call.x[0].shape, table.shape[1]), fmt, lo, hi),)

    def compute(self, call: Call, *x: np.ndarray) -> np.ndarray:
        return self._table(call)[x[0]]

    def emit(self, body: Body, call: Call, *x: Coded) -> Coded:
        dtype = call.y[0].dtype
        index = body.cast(x[0], np.int32)
        return Coded(body.op("Gather", body.cast(x[1], dtype).value, index.value, axis=0), dtype)

    def row_major(self, call: Call) -> bool:
        return len(call.x[0].shape) > 1  # a row of the table stays one row, wherever channels lie

    def native(self, call: Call) -> Native:
        table = self._table(call)
        return Native({"rows": call.x[0].size, "depth": table.shape[1], "entries": len(table)}, {"table": table})

    def cost(self, call: Call) -> Cost:
        return Cost(weight_bits=self._held(call).size * call.format_attr("y_format").width)

    def cases(self) -> list[Call]:
        made = []
        for index, (shape, entries, depth, x_fmt, y_fmt) in enumerate(
            (
                ((None,), 1, 1, "ufixed<1,1>", "fixed<8,3>"),
                ((None,), 65, 16, "ufixed<7,7>", "fixed<8,2>"),
                ((None, 5), 3, 7, "ufixed<2,2>", "ufixed<4,1>"),
                ((None, 4), 256, 3, "ufixed<8,8>", "fixed<20,4>"),
                ((None,), 300, 2, "ufixed<9,9>", "fixed<2,0,RND,SAT_SYM>"),
                ((None, 3), 40, 6, "fixed<8,8>", "fixed<6,2>"),
            )
        ):
            table = constant(y_fmt, random_codes(y_fmt, (entries, depth), index), "table")
            x = tensor(x_fmt, shape, lo=0, hi=entries - 1)
            made.append(Call(self, f"{index}_{entries}x{depth}", [x, table[0]], {"y_format": y_fmt}, {1: table[1]}))
        return made
