"""Lowered networks whose channels have widths and binary points of their own, pruned channels and bipolar codes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edgemat.formats import Fixed
from edgemat.ops.softmax import make_softmax_table
from edgemat.ops.table import make_table
from tests.core.graphs import Sketch, weights

VECTOR = "fixed<[6,3,0,8,1],[1,2,9,-1,3],RND,SAT>"
MAP = "fixed<[6,0,4],[2,3,-1],RND_CONV,SAT>"
HIDDEN = "ufixed<[4,0,6,3,2,5],[2,1,3,5,-1,3],RND,SAT>"
TABLE = "ufixed<16,1,RND,SAT>"


def geometry(rank: int, pad: int, groups: int = 1) -> dict[str, object]:
    """Attributes of a convolution of stride 1."""
    return {"strides": (1,) * rank, "pads": (pad,) * 2 * rank, "dilations": (1,) * rank, "groups": groups}


def dense() -> Sketch:
    """Linear layers that take per-feature formats as they are, and operators that get them aligned."""
    made = Sketch("dense")
    x = made.input("x", (5,), VECTOR)
    first = made.requantize(made.linear(x, weights((6, 5)), "fc1", "fixed<6,[1,0,2,1,-1,3],RND,SAT>"), HIDDEN, "rq1")
    second = made.requantize(made.linear(first, weights((4, 6), 1), "fc2"), "fixed<8,5,RND,SAT>", "rq2")
    made.output(second, "aligned")
    rectified = made.add(
        "Relu", [made.requantize(first, "fixed<[5,0,4,2,1,6],[3,1,2,0,9,4],TRN,SAT_SYM>", "rq3")], "relu"
    )
    both = made.add("Add", [rectified, first], "add")
    joined = made.add("Concat", [both, first], "concat", axis=0)
    made.output(made.requantize(joined, "fixed<12,6,RND,SAT>", "rq4"), "joined")
    narrow = made.requantize(first, "ufixed<6,4,RND,SAT>", "rq5")
    table = make_table("tanh", Fixed.parse("ufixed<6,4>"), Fixed.parse("fixed<6,1>"))
    bent = made.add(
        "Table",
        [narrow, made.codes(table, "fixed<6,1>", "tanh")],
        "tanh",
        function="tanh",
        y_format="fixed<6,1,RND,SAT>",
    )
    made.output(made.linear(bent, weights((3, 6), 2), "fc3"), "bent")
    exponentials = make_softmax_table(Fixed.parse("ufixed<6,4>"), Fixed.parse(TABLE))
    shares = made.add(
        "Softmax", [narrow, made.codes(exponentials, TABLE, "exp")], "softmax", axis=0, table_format=TABLE,
        y_format="ufixed<8,0,RND,SAT>",
    )  # fmt: skip
    made.output(shares, "shares")
    return made


def maps() -> Sketch:
    """Dense, depthwise and transposed convolutions, pools, an affine, slopes, and a flattening, all by channel."""
    made = Sketch("maps")
    x = made.input("x", (3, 6, 5), MAP)
    w = made.codes(weights((6, 3, 3, 3)), "fixed<6,1>", "conv1.weight")
    first = made.add("Conv", [x, w], "conv1", w_format="fixed<6,1,RND,SAT>", **geometry(2, 1))
    first = made.requantize(first, HIDDEN, "rq1")
    w = made.codes(weights((6, 1, 3, 3), 1), "fixed<6,[1,2,0,1,1,3]>", "depthwise.weight")
    second = made.add("Conv", [first, w], "depthwise", w_format="fixed<6,[1,2,0,1,1,3],RND,SAT>", **geometry(2, 1, 6))
    second = made.requantize(second, "fixed<[7,0,5,1,3,8],[5,0,4,9,2,6],RND,SAT>", "rq2")
    scale, offset = (
        made.codes(weights((6,), 2), "fixed<6,2>", "a"),
        made.imp.initializer(weights((6,), 3), np.dtype(np.int32), "b"),
    )
    normed = made.add("Affine", [second, scale, offset], "affine", w_format="fixed<6,2,RND,SAT>")
    slopes = made.codes(weights((6,), 4, 7), "fixed<4,0>", "slope")
    bent = made.add("PRelu", [normed, slopes], "prelu", slope_format="fixed<4,0,RND,SAT>")
    bent = made.requantize(bent, "fixed<[6,0,6,5,0,6],[5,1,3,8,2,7],RND_INF,SAT>", "rq3")
    pooled = made.add(
        "MaxPool", [bent], "pool", kernel_shape=(2, 2), strides=(2, 2), pads=(0, 0, 0, 0), dilations=(1, 1), ceil_mode=0
    )
    w = made.codes(weights((6, 2, 2, 2), 5), "fixed<6,1>", "up.weight")
    up = made.add(
        "ConvTranspose",
        [pooled, w],
        "up",
        w_format="fixed<6,1,RND,SAT>",
        output_padding=(0, 0),
        **{**geometry(2, 0), "strides": (2, 2)},
    )
    made.output(made.requantize(up, "fixed<8,7,RND,SAT>", "rq4"), "enlarged")
    average = made.add(
        "AveragePool",
        [bent],
        "average",
        kernel_shape=(3, 2),
        strides=(1, 1),
        pads=(0, 0, 0, 0),
        requantize="fixed<8,6,RND,SAT>",
    )
    made.output(average, "averages")
    flat = made.add("Reshape", [pooled], "flatten", shape=(36,))
    made.output(made.linear(flat, weights((3, 36), 6), "fc"), "y")
    turned = made.add("Transpose", [made.requantize(pooled, "fixed<6,5,RND,SAT>", "rq5")], "turn", perm=(1, 2, 0))
    made.output(turned, "turned")
    return made


def signs() -> Sketch:
    """Signs in, through a convolution with padding, requantised to signs, and out."""
    made = Sketch("signs")
    x = made.input("x", (4, 5, 5), "bipolar")
    half = made.add("Upsample", [x], "repeat", scales=(1, 2))
    first = made.requantize(made.conv(half, weights((4, 4, 3, 3)), "conv1"), "bipolar", "rq1")
    pooled = made.add(
        "MaxPool",
        [first],
        "pool",
        kernel_shape=(2, 2),
        strides=(1, 2),
        pads=(0, 0, 0, 0),
        dilations=(1, 1),
        ceil_mode=0,
    )
    both = made.add(
        "Concat",
        [pooled, made.add("Slice", [x], "slice", starts=(0, 1, 0), sizes=(4, 4, 5), steps=(1, 1, 1))],
        "join",
        axis=0,
    )
    made.output(both, "joined")
    average = made.add(
        "AveragePool", [both], "average", kernel_shape=(4, 5), strides=(1, 1), pads=(0, 0, 0, 0), requantize="bipolar"
    )
    flat = made.add("Reshape", [average], "flatten", shape=(8,))
    w = np.where(weights((5, 8), 2) < 0, -1, 1)
    last = made.add("Linear", [flat, made.codes(w, "bipolar", "fc.weight")], "fc", w_format="bipolar")
    made.output(made.requantize(last, "fixed<[4,0,3,1,2],[4,0,3,1,2],RND,SAT>", "rq2"), "y")
    made.output(
        made.requantize(
            made.add("Sub", [flat, made.requantize(flat, "fixed<3,1,RND,SAT>", "rq3")], "sub"), "bipolar", "rq4"
        ),
        "rest",
    )
    return made


NETWORKS = {"dense": dense, "maps": maps, "signs": signs}


def model_bytes(made: Sketch) -> bytes:
    """The written file."""
    return ir.to_proto(made.finished()).SerializeToString(deterministic=True)
