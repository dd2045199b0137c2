"""Graphs for the tests of the HLS target: all cases of an operator side by side, and small networks of calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from edgemat.op import Call, Op, Tensor
from edgemat.ops.cases import feeds


def rebuilt(call: Call, name: str, inputs: Sequence[str], output: str) -> Call:
    """The same call with other names."""
    x = [replace(t, name=n) for t, n in zip(call.x, inputs, strict=True)]
    return Call(call.op, name, x, dict(call.attrs), dict(call.constants), (output,))


def graph_of(calls: Sequence[Call], inputs: Sequence[Tensor], outputs: Sequence[str], name: str = "case") -> Any:
    """What a target sees of a lowered graph."""
    tensors = {t.name: t for t in inputs} | {y.name: y for call in calls for y in call.y}
    return SimpleNamespace(
        name=name,
        inputs=[t.name for t in inputs],
        outputs=list(outputs),
        nodes=list(calls),
        tensors=tensors,
        constants={},
    )


def side_by_side(calls: Sequence[Call]) -> tuple[Any, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """One graph with every call, its input codes and the codes the reference expects."""
    made, inputs, codes, expected = [], [], {}, {}
    for index, call in enumerate(calls):
        names = [f"x{index}_{i}" for i in range(len(call.x))]
        new = rebuilt(call, f"{call.op.stem}{index}", names, f"y{index}")
        made.append(new)
        data = list(feeds(new, batch=2, seed=index))
        for i, x in enumerate(new.x):
            if new.constant(i) is None:
                inputs.append(x)
                codes[x.name] = np.concatenate([d[i] for d in data])
        expected[f"y{index}"] = np.concatenate([new.op.reference(new, *d) for d in data])
    return graph_of(made, inputs, list(expected)), codes, expected


def apply(op: Op, name: str, x: Sequence[Tensor], constants: dict[int, np.ndarray] | None = None, **attrs: Any) -> Call:
    """A call whose output has the call's name."""
    return Call(op, name, x, attrs, constants, (name,))
