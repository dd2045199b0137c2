"""Every dossier keeps its word: reference, ONNX body under onnxruntime, interval and an independent oracle agree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from edgemat import formats
from edgemat.body import DOMAIN, IR_VERSION, OPSET, Body, Coded
from edgemat.errors import EdgematError
from edgemat.formats import Fixed
from edgemat.op import REAL, Call, Op, Tensor
from edgemat.ops import BY_NAME, OPS
from edgemat.ops.boundary import Dequantize
from edgemat.ops.cases import constant, feeds, random_codes, tensor
from tests.core import oracle

CASES = [(op, call) for op in OPS for call in op.cases()]


def case_id(value: object) -> str:
    return value.name if isinstance(value, Op) else re.sub(r"\W+", "_", str(getattr(value, "name", value)))


def model_of(call: Call, function: ir.Function) -> ir.Model:
    """A model of one node; weights are ordinary inputs."""

    def typed(name: str, t: Tensor) -> ir.Value:
        shape = ir.Shape(["batch" if d is None else d for d in t.shape])
        return ir.Value(name=name, type=ir.TensorType(ir.DataType.from_numpy(t.dtype)), shape=shape)

    inputs = [typed(f"x{i}", t) for i, t in enumerate(call.x)]
    outputs = [typed(f"y{i}", t) for i, t in enumerate(call.y)]
    if isinstance(call.op, Dequantize):
        outputs[0].dtype = ir.DataType.from_numpy(call.op.value_dtype(call))
    node = ir.Node(DOMAIN, call.op.name, inputs, [], overload=function.overload, outputs=outputs, name="n")
    opsets = {"": OPSET, DOMAIN: 1}
    graph = ir.Graph(inputs, outputs, nodes=[node], opset_imports=opsets, name="one")
    return ir.Model(graph, ir_version=IR_VERSION, functions=[function])


def run_body(call: Call, body: Body, feed: list[np.ndarray]) -> np.ndarray:
    """What onnxruntime's CPU provider makes of a body."""
    model = ir.to_proto(model_of(call, body.function(call.op.name)))
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {f"x{i}": a.astype(t.dtype) for i, (a, t) in enumerate(zip(feed, call.x, strict=True))})[0]


class Runner:
    """One session for all feeds of a call."""

    def __init__(self, call: Call, body: Body | None = None) -> None:
        self.call = call
        body = call.op.body(call) if body is None else body
        proto = ir.to_proto(model_of(call, body.function(call.op.name)))
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def __call__(self, feed: list[np.ndarray]) -> np.ndarray:
        arrays = {f"x{i}": a.astype(t.dtype) for i, (a, t) in enumerate(zip(feed, self.call.x, strict=True))}
        return self.session.run(None, arrays)[0]


def test_every_operator_has_cases() -> None:
    boundary = {"Quantize", "Dequantize", "Literal", "State", "NextState"}
    assert {op.name for op in OPS if not op.cases()} == boundary
    assert list(BY_NAME.values()) == list(OPS)
    assert len({op.stem for op in OPS}) == len(OPS)


@pytest.mark.parametrize(("op", "call"), CASES, ids=case_id)
def test_reference_is_what_onnxruntime_computes(op: Op, call: Call) -> None:
    run = Runner(call)
    for seed, batch in ((0, 4), (1, 1)):
        for feed in feeds(call, batch=batch, seed=seed):
            expected = op.reference(call, *feed)
            found = run(feed)
            assert found.dtype == call.y[0].dtype
            assert found.shape == expected.shape == tuple(batch if d is None else d for d in call.y[0].shape)
            assert (found.astype(np.int64) == expected).all()


@pytest.mark.parametrize(("op", "call"), CASES, ids=case_id)
def test_results_lie_in_the_proved_interval(op: Op, call: Call) -> None:
    y = call.y[0]
    low, high = y.format.rails
    assert (low <= y.lo and y.hi <= high) or y.format.overflow == "SAT_SYM"
    for feed in feeds(call, batch=3, seed=2):
        codes = op.reference(call, *feed)
        assert codes.dtype == np.int64 and formats.holds_codes(codes, y.format)
        assert y.lo <= int(codes.min()) and int(codes.max()) <= y.hi
        exact = op.compute(call, *feed)
        if op.name != "AveragePool":
            lo, hi = call.bounds.final
            assert lo <= int(exact.min()) and int(exact.max()) <= hi
    plo, phi = call.bounds.partial
    assert plo <= min(call.bounds.final[0], 0) and phi >= max(call.bounds.final[1], 0)


@pytest.mark.parametrize(("op", "call"), [c for c in CASES if c[0].name in oracle.OPERATORS], ids=case_id)
def test_reference_is_what_fractions_say(op: Op, call: Call) -> None:
    for feed in list(feeds(call, batch=1, seed=3))[3:6]:
        assert (op.reference(call, *feed) == oracle.codes(call, *feed)).all()


def test_the_oracle_knows_every_operator() -> None:
    """The boundary operators are tested as formats."""
    assert {op.name for op in OPS if op.cases()} <= oracle.OPERATORS


def changed(call: Call, **attrs: object) -> Call:
    """The same call with other attributes."""
    return Call(call.op, call.name, call.x, {**call.attrs, **attrs}, call.constants, call.outputs)


def differs(call: Call, mutated: Call) -> bool:
    """Whether the mutated body shows on the case's own feeds."""
    run = Runner(mutated)
    return any((run(feed) != call.op.reference(call, *feed)).any() for feed in feeds(call))


@pytest.mark.parametrize(
    "mutation", ["fixed<6,4,TRN,SAT>", "fixed<6,3,RND,SAT>", "fixed<6,5,RND,SAT>", "fixed<6,4,RND,WRAP>"]
)
@pytest.mark.parametrize(
    "name", ["Linear", "Conv", "ConvTranspose", "Affine", "Relu", "PRelu", "Add", "Sub", "Mul", "MatMul", "AveragePool"]
)
def test_control_a_mutated_epilogue_is_seen(name: str, mutation: str) -> None:
    """One rounding mode, one shift, one overflow mode: each shows as a difference of codes."""
    op = BY_NAME[name]
    calls = [changed(c, requantize="fixed<6,4,RND,SAT>") for c in op.cases() if c.x[0].size > 8][:8]
    assert not any(differs(call, call) for call in calls)
    assert any(differs(call, changed(call, requantize=mutation)) for call in calls)


@pytest.mark.parametrize("name", ["Linear", "Conv", "ConvTranspose", "Affine", "Table", "Thresholds"])
def test_control_a_mutated_weight_is_seen(name: str) -> None:
    """One code of one weight, off by one."""
    op = BY_NAME[name]
    call = next(c for c in op.cases() if c.constants and c.constants[1].size > 2 and not c.attrs.get("requantize"))
    run = Runner(call)
    seen = False
    for feed in feeds(call):
        expected = op.reference(call, *feed)
        assert (run(feed) == expected).all()
        mutated = [a.copy() for a in feed]
        mutated[1].flat[1] += 1 if mutated[1].flat[1] < 0 else -1
        seen = seen or bool((run(mutated) != expected).any())
    assert seen


def test_control_a_mutated_slope_is_seen() -> None:
    """PRelu writes its slopes into the body as constants."""
    call = next(c for c in BY_NAME["PRelu"].cases() if c.constants[1].size == 1)
    mutated = Call(call.op, call.name, call.x, call.attrs, {1: call.constants[1] + 1}, call.outputs)
    assert differs(call, mutated)


def test_control_every_pair_of_rounding_modes_differs() -> None:
    """No two of the seven modes agree on all codes, so a swapped mode cannot pass."""
    from edgemat.formats import ROUNDINGS

    x = tensor("fixed<8,6>", (None, 64))
    every = np.arange(-128, 128).reshape(4, 64)
    found = {}
    for mode in ROUNDINGS:
        call = Call(BY_NAME["Requantize"], mode, [x], {"requantize": f"fixed<8,8,{mode},SAT>"})
        found[mode] = Runner(call)([every]).tobytes()
        assert found[mode] == call.op.reference(call, every).astype(np.int8).tobytes()
    assert len(set(found.values())) == len(ROUNDINGS)


def test_control_a_lying_body_is_seen() -> None:
    """A body that adds where it should subtract."""
    call = next(c for c in BY_NAME["Sub"].cases())

    class Lie(Body):
        def binary(self, op_type: str, a: Coded, b: Coded) -> Coded:
            return super().binary("Add" if op_type == "Sub" else op_type, a, b)

    body = Lie()
    x = [Coded(body.input(f"x{i}"), t.dtype) for i, t in enumerate(call.x)]
    body.output(body.cast(call.op.emit(body, call, *x), call.y[0].dtype).value)
    run = Runner(call, body)
    assert any((run(feed) != call.op.reference(call, *feed)).any() for feed in feeds(call))


def test_calls_refuse_what_they_cannot_mean() -> None:
    linear, conv = BY_NAME["Linear"], BY_NAME["Conv"]
    w = constant("fixed<6,1>", random_codes("fixed<6,1>", (3, 4), 0))
    x = tensor("fixed<8,3>", (None, 4))
    refused: Iterator[tuple[object, str]] = iter(
        [
            (lambda: Call(linear, "n", [x, w[0]], {"w_format": "fixed<6,1>", "speed": 3}, {1: w[1]}), "speed"),
            (lambda: Call(linear, "n", [x, w[0]], {}, {1: w[1]}), "w_format"),
            (lambda: Call(linear, "n", [x], {"w_format": "fixed<6,1>"}), "1 inputs"),
            (lambda: Call(linear, "n", [x, w[0]], {"w_format": "fixed<6,1>"}).y, "initializer"),
            (lambda: Call(linear, "n", [x, w[0]], {"w_format": "fixed<2,1>"}, {1: w[1]}).y, "do not fit"),
            (
                lambda: (
                    Call(linear, "n", [tensor("fixed<8,3>", (None, 5)), w[0]], {"w_format": "fixed<6,1>"}, {1: w[1]}).y
                ),
                "axes",
            ),
            (
                lambda: (
                    Call(
                        conv,
                        "n",
                        [x, w[0]],
                        {"w_format": "fixed<6,1>", "strides": (1,), "pads": (0, 0), "dilations": (1,)},
                        {1: w[1]},
                    ).y
                ),
                "1-D or 2-D",
            ),
            (
                lambda: (
                    Call(
                        linear, "n", [x, w[0]], {"w_format": "fixed<6,1>", "requantize": "fixed<6,[1,2]>"}, {1: w[1]}
                    ).y
                ),
                "binary points",
            ),
        ]
    )
    for make, word in refused:
        with pytest.raises(EdgematError, match=word):
            make()  # type: ignore[operator]


@pytest.mark.parametrize("width", [2, 8, 24, 25, 32, 53, 60])
@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM", "SAT_ZERO"])
def test_quantize_body_on_every_width(width: int, overflow: str) -> None:
    """Float inputs at ties, rails and infinities; the body equals the reference up to 60 bits."""
    op = BY_NAME["Quantize"]
    x = Tensor("x", (None, 12), REAL, 0, 0)
    for rounding in ("RND", "TRN", "RND_CONV", "RND_ZERO"):
        call = Call(op, "q", [x], {"y_format": f"fixed<{width},{width - 2},{rounding},{overflow}>"})
        top = 2.0 ** (width - 3)
        data = [0.0, 0.125, -0.125, 0.375, 0.49999997, -1e-30, np.inf, -np.inf, top, -top, top - 0.125, 1e30]
        values = np.array([data, [-v for v in data]], np.float32)
        body = run_body(call, op.body(call), [values])
        assert (body.astype(np.int64) == op.reference(call, values)).all()


@pytest.mark.parametrize(
    "fmt",
    [
        "fixed<[8,0,3,1,20],[3,1,-2,9,4],RND_CONV,SAT>",
        "ufixed<[0,1,12],[-200,1,2],RND,SAT>",
        "fixed<[60,2,0,54],[58,1,0,3],RND_ZERO,SAT_SYM>",
        "fixed<[64,63],[64,0],TRN,SAT>",
        "bipolar",
    ],
)
def test_quantize_body_of_channels_of_their_own_width_and_of_signs(fmt: str) -> None:
    """Ties, rails of each channel, infinities and signed zeros: reference, body and fractions agree."""
    op, parsed = BY_NAME["Quantize"], Fixed.parse(fmt)
    channels = len(parsed.fracs)
    x = Tensor("x", (None, channels, 2), REAL, 0, 0)
    call = Call(op, "q", [x], {"y_format": fmt})
    lsb = np.ldexp(1.0, -np.asarray(parsed.fracs, np.int64))
    rails = np.concatenate([parsed.channel_rails()[0], parsed.channel_rails()[1]]).astype(np.float64)
    codes = np.concatenate(
        [rails, rails + 0.5, rails - 0.5, np.arange(-9, 9) / 4, [1e30, -1e30, np.inf, -np.inf, -0.0]]
    )
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        values = (codes[:, None] * lsb).astype(np.float32)
    values = np.stack([values, -values], axis=2)
    values[np.isnan(values)] = 0.0
    found = run_body(call, op.body(call), [values])
    assert (found.astype(np.int64) == op.reference(call, values)).all()
    for c in range(channels):
        alone = np.array(
            [oracle.to_code(Fraction(float(v)), parsed, c) for v in values[np.isfinite(values[:, c, 0]), c, 0]]
        )
        assert (found[np.isfinite(values[:, c, 0]), c, 0].astype(np.int64) == alone).all()


@pytest.mark.parametrize("fmt", ["fixed<8,3,RND,WRAP>", "ufixed<6,2,TRN,WRAP>", "fixed<40,20,RND_INF,WRAP>"])
def test_quantize_body_wraps(fmt: str) -> None:
    op = BY_NAME["Quantize"]
    call = Call(op, "q", [Tensor("x", (None, 40), REAL, 0, 0)], {"y_format": fmt})
    values = np.ldexp(np.arange(-20, 20, dtype=np.float32) + np.float32(0.3), np.arange(40)[None] * 2 - 20)
    found = run_body(call, op.body(call), [values.astype(np.float32)])
    assert (found.astype(np.int64) == op.reference(call, values.astype(np.float32))).all()


@pytest.mark.parametrize(
    "fmt",
    [
        "fixed<8,3>",
        "ufixed<6,9>",
        "fixed<24,-4>",
        "fixed<25,3>",
        "fixed<40,20>",
        "fixed<8,[3,1,-2]>",
        "bipolar",
        "fixed<[30,0,2],[3,1,-2]>",
    ],
)
def test_dequantize_body(fmt: str) -> None:
    op = BY_NAME["Dequantize"]
    call = Call(op, "d", [tensor(fmt, (None, 3))], {})
    for feed in feeds(call):
        found, expected = run_body(call, op.body(call), feed), op.reference(call, *feed)
        assert found.dtype == expected.dtype == (np.float64 if call.x[0].format.width > 24 else np.float32)
        assert (found == expected).all()
