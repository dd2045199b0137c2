"""What bodies rely on in onnxruntime, and what they avoid: integer operators at the edges of 32 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from edgemat.body import Body, Coded
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import tensor
from tests.core.test_ops_contract import Runner

EDGES = [0, 1, 2, 7, (1 << 15) - 1, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 3 << 31, (1 << 40) + 7]
VALUES = np.array(sorted({*EDGES, *(-v for v in EDGES), 3658323633, -3658323633}))


def call_of(op: str, fmt: str = "fixed<48,20>", **attrs: object) -> Call:
    """A call on one row of all values."""
    return Call(BY_NAME[op], op, [tensor(fmt, (None, VALUES.size))], attrs)


@pytest.mark.parametrize(
    "call",
    [
        call_of("Relu"),
        call_of("Relu", requantize="ufixed<33,10>"),
        call_of("Clip", low=-5, high=1 << 33),
        call_of("Clip", low=-(1 << 34), high=3 << 31),
        call_of("Requantize", requantize="fixed<33,5>"),
        call_of("Requantize", requantize="ufixed<32,4,RND_ZERO,SAT>"),
        call_of("Requantize", requantize="fixed<32,4,RND_CONV,SAT_SYM>"),
        call_of("Requantize", requantize="fixed<32,4,RND_INF,SAT_ZERO>"),
        call_of("Requantize", requantize="fixed<32,4,TRN_ZERO,WRAP>"),
        *(call_of("Requantize", f"fixed<{width},20>", requantize="fixed<34,6>") for width in (52, 54, 58, 60)),
    ],
    ids=lambda call: f"{call.op.name} {call.x[0].format} {call.attrs.get('requantize')}",
)
def test_wide_codes_beside_bit_31(call: Call) -> None:
    """Vectorised int64 Max, Min, Clip and Sign of onnxruntime 1.31 are wrong there; bodies must not need them."""
    run = Runner(call)
    rows = np.stack([VALUES + shift for shift in range(-3, 4)])
    rows = np.clip(rows, call.x[0].lo, call.x[0].hi)
    assert (run([rows]).astype(np.int64) == call.op.reference(call, rows)).all()


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float64, np.float32])
def test_maximum_minimum_and_clip_of_the_body(dtype: type) -> None:
    """All pairs of edge values, along a tensor and against a scalar."""
    kept = VALUES[np.abs(VALUES) < {"int32": 1 << 31, "float32": 1 << 24}.get(np.dtype(dtype).name, 1 << 62)]
    first, second = (grid.reshape(-1).astype(dtype) for grid in np.meshgrid(kept, kept))
    for name, expected in (("maximum", np.maximum(first, second)), ("minimum", np.minimum(first, second))):
        body = Body()
        a, b = (Coded(body.input(n), np.dtype(dtype)) for n in "ab")
        body.output(getattr(body, name)(a, b).value)
        assert (evaluate(body, first, second) == expected).all()
    for low, high in zip(kept[:-1].tolist(), kept[1:].tolist(), strict=True):
        body = Body()
        body.output(body.clip(Coded(body.input("a"), np.dtype(dtype)), low, high).value)
        assert (evaluate(body, kept.astype(dtype)) == np.clip(kept, low, high)).all()


def evaluate(body: Body, *arrays: np.ndarray) -> np.ndarray:
    """Runs a body under onnxruntime."""
    import onnxruntime as ort

    from edgemat.body import DOMAIN, IR_VERSION, OPSET

    function = body.function("Body")
    inputs = [
        ir.Value(name=f"x{i}", type=ir.TensorType(ir.DataType.from_numpy(a.dtype)), shape=ir.Shape(["n"]))
        for i, a in enumerate(arrays)
    ]
    output = ir.Value(name="y", type=ir.TensorType(ir.DataType.from_numpy(arrays[0].dtype)), shape=ir.Shape(["n"]))
    node = ir.Node(DOMAIN, "Body", inputs, overload=function.overload, outputs=[output], name="n")
    graph = ir.Graph(inputs, [output], nodes=[node], opset_imports={"": OPSET, DOMAIN: 1}, name="one")
    model = ir.to_proto(ir.Model(graph, ir_version=IR_VERSION, functions=[function]))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": a for i, a in enumerate(arrays)})[0]


@pytest.mark.parametrize("op_type", ["Max", "Min", "Clip", "Sign"])
def test_no_body_uses_an_int64_operator_that_compares_wrongly(op_type: str) -> None:
    """Walks every case's body and the types in it."""
    from edgemat.ops import OPS

    for op in OPS:
        for call in op.cases():
            types: dict[ir.Value, np.dtype] = {}
            function = op.body(call).function(op.name)
            types.update(zip(function.inputs, (t.dtype for t in call.x), strict=True))
            for node in function:
                sources = [types[v] for v in node.inputs if v is not None and v in types]
                if node.op_type == "Constant":
                    made = np.dtype(node.attributes["value"].value.numpy().dtype)
                elif node.op_type == "Cast":
                    made = np.dtype(ir.DataType(node.attributes["to"].value).numpy())
                elif node.op_type == "Where":
                    made = sources[1]
                else:
                    made = sources[0]
                types.update(dict.fromkeys(node.outputs, made))
                assert node.op_type != op_type or sources[0] != np.dtype(np.int64), (op.name, call.name)
