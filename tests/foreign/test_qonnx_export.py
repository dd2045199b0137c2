"""Export to QONNX: what the qonnx package computes of the file is what the Simulator computes, to the last bit."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import edgemat
from edgemat import formats
from edgemat.errors import UnsupportedOpError
from edgemat.foreign.qonnx_operators import FORMS
from edgemat.foreign.qonnx_writer import qonnx_model
from edgemat.formats import ROUNDINGS
from edgemat.lower.graph import Graph
from edgemat.op import Call
from edgemat.ops import BY_NAME, OPS
from edgemat.ops.cases import constant
from edgemat.sim import reference
from edgemat.sim.arrays import to_codes

from ..sim.graphs import Builder, awkward_values, batch, code_feeds
from .qonnx_executor import execute

BOUNDARY = ("Quantize", "Dequantize", "Literal", "State", "NextState")
REASONS = (
    "can leave",  # WRAP and SAT_ZERO that can act
    "float32 holds integers below",
    "float32 cannot tell their ties",
    "float32 does not keep apart",
    "windows hang over a padding that counts",
    "entries of its table",
    "expected one of sigmoid",
)
"""Why an operator that has a form may be refused; tests of their own make each of these happen."""


def on_grid(graph: Graph, codes: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float32 values of input codes, by float input name."""
    names = zip(graph.input_names, graph.inputs, strict=True)
    return {
        name: formats.dequantize(codes[code], graph.tensors[code].format).astype(np.float32) for name, code in names
    }


def expected(graph: Graph, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values of the definition, by output name."""
    found = reference.run(graph, to_codes(graph, feeds, False))
    names = zip(graph.output_names, graph.outputs, strict=True)
    return {name: formats.dequantize(found[code], graph.tensors[code].format) for name, code in names}


def differences(model: onnx.ModelProto, graph: Graph, feeds: dict[str, np.ndarray]) -> int:
    """Elements of the outputs that differ."""
    found, wanted = execute(model, feeds), expected(graph, feeds)
    assert {name: array.shape for name, array in found.items()} == {name: a.shape for name, a in wanted.items()}
    return sum(int((found[name] != wanted[name]).sum()) for name in wanted)


def alone(case: Call, rounding: str | None = None) -> Graph:
    """A graph of one node, its inputs quantised to the formats of a case."""
    build = Builder()
    x = [
        replace(tensor, name=f"k{i}")
        if case.constant(i) is not None
        else build.input(str(tensor.format), tensor.sample_shape, f"x{i}")
        for i, tensor in enumerate(case.x)
    ]
    attrs = {key: value for key, value in case.attrs.items() if value is not None}
    return build.graph(build.add(case.op.name, "a.node", x, attrs, case.constants))


def sampled(op_name: str, every: int) -> list[Call]:
    cases = BY_NAME[op_name].cases()
    return cases[:: 1 if len(cases) < 20 else every]


def check_cases(op_name: str, every: int) -> None:
    exact = 0
    for number, case in enumerate(sampled(op_name, every)):
        graph = alone(case)
        try:
            model = qonnx_model(graph, 12)
        except UnsupportedOpError as error:
            assert any(reason in str(error) for reason in REASONS), error
            continue
        onnx.checker.check_model(model)
        assert differences(model, graph, on_grid(graph, code_feeds(graph, 12, number))) == 0, case.name
        exact += 1
    assert exact > 0


@pytest.mark.parametrize("op_name", FORMS)
def test_cases_are_exact_or_refused(op_name: str) -> None:
    check_cases(op_name, 10)


@pytest.mark.slow
@pytest.mark.parametrize("op_name", FORMS)
def test_all_cases_are_exact_or_refused(op_name: str) -> None:
    check_cases(op_name, 1)


def test_what_has_no_form_is_refused_by_name() -> None:
    without = [op for op in OPS if op.name not in FORMS and op.name not in BOUNDARY]
    assert {op.name for op in without} >= {"Softmax", "Embedding", "RmsNorm"}
    with pytest.raises(UnsupportedOpError, match=r"node 'a.node' \(Softmax\): QONNX has no exact form"):
        qonnx_model(alone(BY_NAME["Softmax"].cases()[0]))


# -- rounding -----------------------------------------------------------------------------------------------------


def narrowing(source: str, target: str) -> Graph:
    build = Builder()
    return build.graph(build.add("Requantize", "n", [build.input(source, (1,))], {"requantize": target}))


def every_code(graph: Graph) -> dict[str, np.ndarray]:
    tensor = graph.input_type(0)
    return on_grid(graph, {graph.inputs[0]: np.arange(tensor.lo, tensor.hi + 1)[:, None]})


@pytest.mark.parametrize("overflow", ["SAT", "SAT_SYM"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_code_is_rounded_as_stated(rounding: str, overflow: str) -> None:
    """All codes of fixed<9,4>: ties of both signs, both rails and beyond; signed and unsigned, coarse and fine."""
    for target in ("fixed<5,3", "ufixed<5,3", "fixed<3,7", "fixed<1,1", "ufixed<1,1", "fixed<12,5"):
        graph = narrowing("fixed<9,4,RND_CONV,SAT>", f"{target},{rounding},{overflow}>")
        feeds = every_code(graph)
        assert differences(qonnx_model(graph, 512), graph, feeds) == 0, target


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_code_is_rounded_where_float32_has_no_bit_left(rounding: str) -> None:
    """Codes up to 2**23: half an LSB more does not fit, half an LSB of the result does."""
    graph = narrowing("fixed<24,9,RND_CONV,SAT>", f"fixed<20,9,{rounding},SAT>")
    model = qonnx_model(graph, 4096)
    lo, hi = graph.input_type(0).lo, graph.input_type(0).hi
    codes = np.concatenate([np.arange(lo, lo + 1024), np.arange(-1024, 1024), np.arange(hi - 1023, hi + 1)])
    assert differences(model, graph, on_grid(graph, {graph.inputs[0]: codes[:, None]})) == 0
    modes = {"RND": "FLOOR", "RND_MIN_INF": "CEIL", "TRN": "FLOOR"}
    if rounding in modes:
        assert _modes(model)[-1] == modes[rounding]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_inputs_on_no_grid_are_rounded_as_stated(rounding: str) -> None:
    """Ties, their float32 neighbours, 0.49999997, subnormals, infinities; one binary point, channels, one bit."""
    for fmt in ("fixed<8,3", "ufixed<8,3", "fixed<1,1", "fixed<8,-2", "fixed<4,[1,3,-2]", "ufixed<[3,0,6],[3,9,-2]"):
        build = Builder()
        x = build.input(f"{fmt},{rounding},SAT>", (3,))
        graph = build.graph(build.add("Reshape", "same", [x], {"shape": (3,)}))
        values = awkward_values(replace(x.format, int_bits=x.format.width, widths=None), 64)
        values = np.resize(values * np.float32(0.25), (len(values) // 3 * 3, 3)).astype(np.float32)
        assert differences(qonnx_model(graph, len(values)), graph, {"x_real": values}) == 0, fmt


def _modes(model: onnx.ModelProto) -> list[str]:
    quants = [node for node in model.graph.node if node.op_type == "Quant"]
    return [next(a.s.decode() for a in node.attribute if a.name == "rounding_mode") for node in quants]


def _with_mode(model: onnx.ModelProto, index: int, mode: str) -> onnx.ModelProto:
    changed = copy.deepcopy(model)
    quant = [node for node in changed.graph.node if node.op_type == "Quant"][index]
    next(a for a in quant.attribute if a.name == "rounding_mode").s = mode.encode()
    return changed


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_another_mode_is_seen(rounding: str) -> None:
    """The control: any other mode in the file's Quant, or any other in the format, changes a value."""
    graph = narrowing("fixed<9,4,RND_CONV,SAT>", f"fixed<5,3,{rounding},SAT>")
    model, feeds = qonnx_model(graph, 512), every_code(graph)
    ties = _modes(model)[-1] in ("HALF_UP", "HALF_DOWN") or rounding == "RND_CONV"
    others = ["FLOOR", "CEIL", "DOWN", "UP"] + (["ROUND", "HALF_UP", "HALF_DOWN"] if ties else [])
    for mode in set(others) - {_modes(model)[-1]}:
        assert differences(_with_mode(model, -1, mode), graph, feeds) > 0, mode
    for other in set(ROUNDINGS) - {rounding}:
        assert differences(model, narrowing("fixed<9,4,RND_CONV,SAT>", f"fixed<5,3,{other},SAT>"), feeds) > 0, other


def _half_toward_infinity(x: np.ndarray) -> np.ndarray:
    return np.floor(x + np.float32(0.5))


@pytest.mark.parametrize("rounding", ["RND", "RND_MIN_INF", "TRN"])
def test_no_tie_is_left_to_readers(rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FINN takes a Quant for thresholds at the halves, whatever mode it names: half toward +inf."""
    graph = narrowing("fixed<9,4,RND_CONV,SAT>", f"fixed<5,3,{rounding},SAT>")
    conv = narrowing("fixed<9,4,RND_CONV,SAT>", "fixed<5,3,RND_CONV,SAT>")
    model, feeds = qonnx_model(graph, 512), every_code(graph)
    monkeypatch.setattr("qonnx.custom_op.general.intquant.resolve_rounding_mode", lambda mode: _half_toward_infinity)
    assert differences(model, graph, feeds) == 0
    assert differences(qonnx_model(conv, 512), conv, feeds) > 0  # the control: ties that reach a Quant are seen


# -- networks -----------------------------------------------------------------------------------------------------


def mlp(rounding: str = "RND") -> Graph:
    build = Builder()
    x = build.input("fixed<8,3>", (12,))
    hidden = build.linear(x, 10, "fixed<6,[1,2,0,1,1,2,0,1,-1,1]>", f"ufixed<8,6,{rounding},SAT>", 1, "fc1")
    hidden = build.linear(hidden, 8, "fixed<2,1,RND,SAT_SYM>", f"fixed<8,8,{rounding},SAT_SYM>", 2, "ternary")
    return build.graph(build.linear(hidden, 4, "fixed<6,1>", f"fixed<12,11,{rounding},SAT>", 3, "fc3"))


def cnn() -> Graph:
    """Padding, stride, groups, batch norm as an affine, a residual add, formats by channel, poolings, a concat."""
    build = Builder()
    x = build.input("fixed<8,1>", (2, 8, 8))
    x = build.conv(x, 4, "fixed<6,[1,0,2,1]>", "ufixed<8,[3,4,2,3]>", 1)
    a, b = (
        constant("fixed<8,2>", np.array([77, -128, 5, 127]), "a"),
        constant("fixed<16,8>", np.arange(4) * 99 - 150, "b"),
    )
    attrs = {"w_format": "fixed<8,2>", "requantize": "fixed<9,6,RND,SAT>"}
    x = build.add("Affine", "bn", [x, a[0], b[0]], attrs, {1: a[1], 2: b[1]})
    y = build.conv(x, 4, "fixed<4,0>", "fixed<9,6>", 2, groups=2)
    x = build.add("Add", "join", [x, y], {"requantize": "ufixed<8,6,RND_CONV,SAT>"})
    x = build.pool(x)
    pooled = {"kernel_shape": (3, 3), "strides": (1, 1), "pads": (1, 1, 1, 1), "requantize": "ufixed<8,6,RND,SAT>"}
    y = build.add("AveragePool", "average", [x], pooled)
    x = build.add("Concat", "both", [x, y], {"axis": 0})
    whole = {"kernel_shape": (4, 4), "strides": (1, 1), "pads": (0, 0, 0, 0), "requantize": "ufixed<11,6,RND,SAT>"}
    x = build.add("AveragePool", "whole", [x], whole)
    return build.graph(build.linear(build.flatten(x), 5, "fixed<6,1>", "fixed<12,6>", 5))


def binary() -> Graph:
    build = Builder()
    x = build.input("bipolar", (16,))
    for number in range(2):
        codes = np.where(np.random.default_rng(number).integers(0, 2, (16, 16)) > 0, 1, -1)
        w, b = constant("bipolar", codes, f"w{number}"), constant("fixed<8,8>", np.arange(16) - 8, f"b{number}")
        attrs = {"w_format": "bipolar", "requantize": "bipolar"}
        x = build.add("Linear", f"signs{number}", [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]})
    return build.graph(x)


NETWORKS = {"mlp": mlp, "cnn": cnn, "binary": binary}


def real_feeds(graph: Graph, samples: int) -> dict[str, np.ndarray]:
    """Values on no grid, rails and ties among them, and beyond."""
    shape = graph.input_type(0).sample_shape
    return {graph.input_names[0]: batch(graph.input_type(0).format, shape, samples, 3)}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_exact(name: str) -> None:
    graph = NETWORKS[name]()
    feeds = real_feeds(graph, 48)
    assert differences(qonnx_model(graph, 48), graph, feeds) == 0
    values = edgemat.Simulator(graph)(feeds[graph.input_names[0]])
    assert (execute(qonnx_model(graph, 48), feeds)["out0"] == values).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_one_weight_is_seen(name: str) -> None:
    """The control: a weight of each layer, moved by one LSB, changes a value; so does a bias, by 1024 of its own."""
    graph = NETWORKS[name]()
    model, feeds = qonnx_model(graph, 256), real_feeds(graph, 256)
    stored = [t.name for t in model.graph.initializer if t.name.endswith(("_weight", "_bias_param"))]
    assert len(stored) >= 4
    for wanted in stored:
        changed = copy.deepcopy(model)
        tensors = {t.name: t for t in changed.graph.initializer}
        values = numpy_helper.to_array(tensors[wanted]).copy()
        behind = next(node for node in changed.graph.node if node.input[0] == wanted)
        lsb = np.broadcast_to(numpy_helper.to_array(tensors[behind.input[1]]), values.shape).ravel()[-1]
        step = 2 * abs(values.ravel()[-1]) if behind.op_type == "BipolarQuant" else lsb
        step *= 1024 if "bias" in wanted else 1
        values.ravel()[-1] -= step if values.ravel()[-1] > 0 else -step  # towards 0, where no rail holds it
        tensors[wanted].CopyFrom(numpy_helper.from_array(values, wanted))
        assert differences(changed, graph, feeds) > 0, wanted


def test_readers_find_what_they_expect() -> None:
    """Weights [in, out] behind their own Quant, a MatMul and an Add; a Relu before an unsigned Quant; no other mode."""
    model = qonnx_model(mlp())
    assert {node.op_type for node in model.graph.node} == {"Quant", "Add", "MatMul", "Relu"}
    assert set(_modes(model)) == {"ROUND", "FLOOR"}  # hls4ml knows no other
    producers = {node.output[0]: node for node in model.graph.node}
    for node in model.graph.node:
        if node.op_type == "MatMul":
            assert producers[node.input[1]].op_type == "Quant"
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    scale = next(array for name, array in arrays.items() if name.startswith("fc1_weight") and "scale" in name)
    assert scale.shape == (1, 10) and (np.frexp(scale)[0] == 0.5).all()
    assert model.opset_import[1].domain == "qonnx.custom_op.general"
    shapes = {i.name for i in [*model.graph.value_info, *model.graph.output]}
    assert {name for node in model.graph.node for name in node.output} == shapes


def test_two_outputs_that_are_one_tensor() -> None:
    build = Builder()
    a, b = build.input("fixed<8,1>", (4,), "a"), build.input("ufixed<6,2>", (4,), "b")
    total = build.add("Add", "total", [a, b], {"requantize": "fixed<9,4>"})
    graph = build.graph(total, a, total)
    feeds = {"a_real": batch(a.format, (4,), 20), "b_real": batch(b.format, (4,), 20)}
    assert differences(qonnx_model(graph, 20), graph, feeds) == 0


def test_real_scales_at_the_boundary() -> None:
    """Codes of another tool's file: float32 division and multiplication around the integers."""
    build = Builder()
    codes = build.input("fixed<8,8,RND_CONV,SAT>", (6,))
    graph = build.graph(build.linear(codes, 4, "fixed<6,6>", "fixed<12,12,RND,SAT>"))
    real, given = graph.quantizers["x_real"].x[0], graph.tensors[graph.outputs[0]]
    attrs = {"y_format": str(codes.format), "scale": float(np.float32(0.0173)).hex(), "low": -127, "high": 120}
    quantizer = Call(BY_NAME["Quantize"], "x_quantize", [real], attrs, {}, ("x",))
    dequantizer = Call(BY_NAME["Dequantize"], "y", [given], {"scale": float(np.float32(3.3e-3)).hex()})
    graph.quantizers["x_real"], graph.dequantizers["out0"] = quantizer, dequantizer
    x = np.random.default_rng(1).normal(0, 1.5, (400, 6)).astype(np.float32)
    x[:2] = np.array([[np.inf], [-np.inf]])
    found = reference.run(graph, {"x": quantizer.op.compute(quantizer, x)})[graph.outputs[0]]
    wanted = dequantizer.op.compute(dequantizer, found)
    model = qonnx_model(graph, 400)
    assert (execute(model, {"x_real": x})["out0"] == wanted).all()
    (stored,) = [t for t in model.graph.initializer if t.name == "x_quantize_scale"]
    stored.CopyFrom(numpy_helper.from_array(np.nextafter(numpy_helper.to_array(stored), np.float32(1)), stored.name))
    x = (np.arange(-100, 100)[:, None] + 0.5).repeat(6, 1).astype(np.float32) * np.float32(0.0173)
    x = np.concatenate([x, x])
    found = reference.run(graph, {"x": quantizer.op.compute(quantizer, x)})[graph.outputs[0]]
    assert (execute(model, {"x_real": x})["out0"] != dequantizer.op.compute(dequantizer, found)).any()


# -- refusals -----------------------------------------------------------------------------------------------------


def test_all_refusals_come_together() -> None:
    build = Builder()
    x = build.input("fixed<8,3,RND,WRAP>", (4,))
    wide = build.linear(build.input("fixed<16,3>", (4,), "z"), 4, "fixed<12,1>", name="wide")
    y = build.linear(x, 4, "fixed<6,1>", "fixed<4,2,TRN,WRAP>", name="narrow")
    with pytest.raises(UnsupportedOpError) as caught:
        qonnx_model(build.graph(y, wide))
    text = str(caught.value)
    assert text.startswith("3 nodes have no exact form in QONNX: ")
    for part in (
        "node 'x_quantize' (Quantize): an input is quantised to fixed<8,3,RND,WRAP>",
        "node 'narrow' (Linear): rounded codes",
        "can leave fixed<4,2,TRN,WRAP>",
        "node 'wide' (Linear): its codes or partial sums reach",
        "float32 holds integers below 16777216",
    ):
        assert part in text


def test_wrap_that_cannot_act_is_exact() -> None:
    graph = narrowing("fixed<8,4,RND,SAT>", "fixed<8,6,RND,WRAP>")
    assert differences(qonnx_model(graph, 256), graph, every_code(graph)) == 0


@pytest.mark.parametrize(
    ("source", "target", "found"),
    [
        ("fixed<8,3>", "fixed<8,3,RND_CONV,SAT>", "float32 cannot tell their ties"),
        ("fixed<12,3>", "fixed<24,3,RND,SAT>", "float32 does not keep apart"),
        ("fixed<12,3>", "fixed<20,-100,RND,SAT>", "lies more than 100 bits from 1"),
    ],
)
def test_averages_that_float32_cannot_round(source: str, target: str, found: str) -> None:
    build = Builder()
    attrs = {"kernel_shape": (2, 3), "strides": (1, 1), "pads": (0, 0, 0, 0), "requantize": target}
    y = build.add("AveragePool", "mean", [build.input(source, (1, 4, 4))], attrs)
    with pytest.raises(UnsupportedOpError, match=f"node 'mean'.*{found}"):
        qonnx_model(build.graph(y))


def test_a_table_of_its_own_is_refused() -> None:
    """One changed entry of a sigmoid's table is enough."""
    case = next(c for c in BY_NAME["Table"].cases() if c.name == "sigmoid_fixed<8,4>")
    model = qonnx_model(alone(case))
    assert "Sigmoid" in {node.op_type for node in model.graph.node}
    codes = case.constants[1].copy()
    codes[100] += 1
    changed = Call(case.op, case.name, case.x, case.attrs, {1: codes})
    with pytest.raises(UnsupportedOpError, match="1 of 256 entries of its table are not what float32 sigmoid"):
        qonnx_model(alone(changed))


@pytest.mark.parametrize(("bias", "fits"), [((1 << 24) - 129, True), ((1 << 24) - 128, False)])
def test_the_bias_counts(bias: int, fits: bool) -> None:
    """x is -128 to 127, so sums reach bias + 127: a step below 2**24 they are exact, at it they are refused."""
    build = Builder()
    w, b = constant("fixed<8,8>", np.array([[1]]), "w"), constant("fixed<32,32>", np.array([bias + 1]), "b")
    x = [build.input("fixed<8,8>", (1,)), w[0], b[0]]
    graph = build.graph(build.add("Linear", "fc", x, {"w_format": "fixed<8,8>"}, {1: w[1], 2: b[1]}))
    if fits:
        assert differences(qonnx_model(graph, 256), graph, every_code(graph)) == 0
    else:
        with pytest.raises(UnsupportedOpError, match=r"node 'fc'.*reach 16777216, and float32 holds"):
            qonnx_model(graph)
