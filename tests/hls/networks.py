"""Small networks of calls with branches, for the tests of streams."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgemat.op import Call, Tensor
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, random_codes, tensor

from .graphs import graph_of


def conv(x: Tensor, name: str, out: int, kernel: int, *, stride: int = 1, seed: int = 0, groups: int = 1) -> Call:
    """A padded convolution whose output is six bits, unsigned."""
    pad = kernel // 2
    assert x.shape[1] is not None
    w = constant(
        "fixed<4,1>", random_codes("fixed<4,1>", (out, x.shape[1] // groups, kernel, kernel), seed), f"{name}_w"
    )
    attrs = {
        "w_format": "fixed<4,1>",
        "strides": (stride, stride),
        "pads": (pad,) * 4,
        "dilations": (1, 1),
        "groups": groups,
        "requantize": "ufixed<6,4,RND,SAT>",
    }
    return Call(BY_NAME["Conv"], name, [x, w[0]], attrs, {1: w[1]}, (name,))


def add(a: Tensor, b: Tensor, name: str) -> Call:
    """A sum, six bits."""
    return Call(BY_NAME["Add"], name, [a, b], {"requantize": "ufixed<6,4,RND,SAT>"}, None, (name,))


def residual(size: int = 8, channels: int = 3) -> Any:
    """Two convolutions with a shortcut around them, then a pooling."""
    x = tensor("ufixed<6,4>", (None, channels, size, size))
    first = conv(x, "first", channels, 3, seed=1)
    second = conv(first.y[0], "second", channels, 3, seed=2)
    joined = add(second.y[0], x, "joined")
    pool = Call(
        BY_NAME["MaxPool"], "pooled", [joined.y[0]], {"kernel_shape": (2, 2), "strides": (2, 2), "pads": (0,) * 4},
        None, ("pooled",),
    )  # fmt: skip
    return graph_of([first, second, joined, pool], [x], ["pooled"], "residual")


def branches(size: int = 6) -> Any:
    """A concatenation of three branches of different delay, one of which is also an output."""
    x = tensor("ufixed<6,4>", (None, 2, size, size))
    left = conv(x, "left", 4, 1, seed=3)
    middle = conv(x, "middle", 2, 3, seed=4)
    right = conv(middle.y[0], "right", 3, 5, seed=5)
    joined = Call(BY_NAME["Concat"], "joined", [left.y[0], middle.y[0], right.y[0]], {"axis": 0}, None, ("joined",))
    last = conv(joined.y[0], "last", 2, 3, stride=2, seed=6)
    return graph_of([left, middle, right, joined, last], [x], ["last", "middle"], "branches")


def feed(graph: Any, samples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Random codes for a graph's inputs, rails among them."""
    rng = np.random.default_rng(seed)
    codes = {}
    for name in graph.inputs:
        t = graph.tensors[name]
        codes[name] = rng.integers(t.lo, t.hi, (samples, *t.sample_shape), np.int64, endpoint=True)
        codes[name].flat[0], codes[name].flat[-1] = t.lo, t.hi
    return codes
