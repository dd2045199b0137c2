"""Random attributes, shapes and formats in every operator's cases: refused in one sentence, or exact.

What a stranger's file can say about a node is tried here in numbers: each mutated call either raises an EdgematError or
its body computes what the reference does, inside the proved interval.
"""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

from edgemat.errors import EdgematError
from edgemat.formats import Fixed
from edgemat.op import Call, Op
from edgemat.ops import OPS
from edgemat.ops.cases import feeds
from tests.core.test_ops_contract import Runner

EXTREME = [0, 1, -1, 2, 3, 7, -7, 31, 64, 1 << 20, 1 << 26, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63)]
FORMATS = [
    "fixed<1,0,RND,SAT>", "ufixed<63,1,TRN,WRAP>", "fixed<64,3,RND,SAT>", "fixed<61,3,RND,SAT>", "fixed<8,256,RND,SAT>",
    "fixed<8,-256,RND_CONV,WRAP>", "fixed<8,[1,2,3],RND,SAT>", "fixed<40,3,TRN_ZERO,SAT_ZERO>", "fixed<8>", "x", "",
    "fixed<8,4,RND_INF,SAT_SYM>", "ufixed<8,2,RND_MIN_INF,SAT_ZERO>", "fixed<30,10,RND_ZERO,WRAP>",
    "fixed<12,60,RND,SAT>",
]  # fmt: skip
EXTENTS = [1, 2, 3, 1000, 1 << 20, (1 << 26) - 1]


def mutated(call: Call, chance: random.Random) -> Call:
    """The call with one or two attributes, and sometimes an input's format or shape, replaced."""
    attrs = dict(call.attrs)
    for _ in range(chance.choice([1, 1, 2]) if attrs else 0):
        key = chance.choice(list(attrs))
        value = attrs[key]
        if isinstance(value, tuple):
            items = list(value)
            kind = chance.random()
            if items and kind < 0.7:
                items[chance.randrange(len(items))] = chance.choice(EXTREME)
            else:
                items = [*items, chance.choice(EXTREME)] if kind < 0.85 else items[:-1]
            attrs[key] = tuple(items)
        else:
            attrs[key] = chance.choice(EXTREME) if isinstance(value, int) else chance.choice(FORMATS)
    x = list(call.x)
    index = chance.randrange(len(x))
    if chance.random() < 0.3 and call.constant(index) is None:
        fmt = Fixed.parse(chance.choice(FORMATS[:8]))
        low, high = fmt.rails
        x[index] = replace(x[index], format=fmt, lo=low, hi=high)
        shape = list(x[index].shape)
        axis = chance.randrange(len(shape))
        if shape[axis] is not None and chance.random() < 0.5:
            shape[axis] = chance.choice(EXTENTS)
            x[index] = replace(x[index], shape=tuple(shape))
    return Call(call.op, call.name, x, attrs, call.constants)


@pytest.mark.parametrize("op", [op for op in OPS if op.cases()], ids=lambda op: op.name)
def test_mutated_calls_are_refused_or_exact(op: Op) -> None:
    chance = random.Random(op.name)
    cases = op.cases()
    refused = exact = 0
    for trial in range(80):
        try:
            call = mutated(chance.choice(cases), chance)
            assert call.y and call.bounds
            body = op.body(call)
            op.cost(call)
        except EdgematError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 1500
            refused += 1
            continue
        exact += 1
        if exact > 12 or max(t.size for t in (*call.x, *call.y)) > 5000:
            continue
        run = Runner(call, body)
        for feed in feeds(call, batch=2, seed=trial):
            expected = op.reference(call, *feed)
            found = run(feed)
            assert found.shape == expected.shape and (found.astype(np.int64) == expected).all(), call.attrs
            assert call.y[0].lo <= expected.min() and expected.max() <= call.y[0].hi
    assert refused + exact == 80 and exact
