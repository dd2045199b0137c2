"""Every rewrite against the reference: the dossiers' cases, sums that meet every tie and rail, random networks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from importlib import import_module

import numpy as np
import pytest

from edgemat import Simulator, formats
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.op import Op, Tensor
from edgemat.ops import OPS
from edgemat.sim import reference
from edgemat.sim.arrays import to_codes
from edgemat.sim.carriers import FusedBody
from edgemat.sim.fused import fuse
from edgemat.sim.rewrites import epilogue, integer_kernel

from .graphs import Builder, awkward_values, batch, code_feeds, side_by_side

COMPUTING = [op for op in OPS if op.name not in ("Quantize", "Dequantize", "Literal")]
# The package hands out the functions of these names.
FOLD_LINEAR = import_module("edgemat.sim.rewrites.fold_linear")
ROUNDINGS = ("RND", "TRN", "RND_MIN_INF", "RND_CONV")


def kinds(graph: Graph, from_codes: bool = False) -> Counter[str]:
    """Operators of the fused model."""
    return Counter(node.op_type for node in fuse(graph, from_codes).model.graph if node.op_type != "Constant")


def mismatches(graph: Graph, x: dict[str, np.ndarray] | np.ndarray, codes: bool = False) -> int:
    """Elements in which the Simulator differs from the reference."""
    given = to_codes(graph, x, codes)
    wanted = reference.run(graph, given)
    found = Simulator(graph).codes(x, codes=codes)
    rows = found if isinstance(found, dict) else {graph.output_names[0]: found}
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    return sum(int((rows[name] != wanted[tensor]).sum()) for name, tensor in pairs)


@pytest.mark.parametrize("op", COMPUTING, ids=lambda op: op.name)
def test_dossier_cases_from_codes(op: Op) -> None:
    cases = op.cases()
    for start in range(0, len(cases), 40):
        graph = side_by_side(cases[start : start + 40])
        feeds = {f"{name}_real": codes for name, codes in code_feeds(graph, 16).items()}
        assert mismatches(graph, feeds, codes=True) == 0


def exhaustive_sum(requantize: str, x_fmt: str = "fixed<8,8>", wide: int = 32) -> tuple[Graph, np.ndarray]:
    """``16 a + b + bias`` for all 65,536 pairs of 8-bit codes: every integer of an interval, ties and rails included.

    `wide` output channels with different biases make the integer kernel worth its while.
    """
    build = Builder()
    x = build.input(x_fmt, (2,))
    w = np.tile(np.array([[16, 1]]), (wide, 1))
    bias = np.arange(wide) * 3 - 40
    w_tensor = Tensor("w", w.shape, Fixed.parse("fixed<6,6>"), 1, 16)
    b_tensor = Tensor("b", bias.shape, Fixed.parse("fixed<20,20>"), int(bias.min()), int(bias.max()))
    attrs = {"w_format": "fixed<6,6>", "requantize": requantize}
    y = build.add("Linear", "sum", [x, w_tensor, b_tensor], attrs, {1: w, 2: bias})
    low, high = Fixed.parse(x_fmt).rails
    side = np.arange(low, high + 1)
    return build.graph(y), np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(np.float32)


@pytest.mark.parametrize("rounding", formats.ROUNDINGS)
@pytest.mark.parametrize("overflow", formats.OVERFLOWS)
@pytest.mark.parametrize("target", ["fixed<8,10>", "ufixed<8,11>", "ufixed<6,12>", "fixed<5,12>", "fixed<12,13>"])
def test_every_sum_every_mode(target: str, overflow: str, rounding: str) -> None:
    fmt = replace(Fixed.parse(target), rounding=rounding, overflow=overflow)
    graph, x = exhaustive_sum(str(fmt))
    assert mismatches(graph, x[:: 1 if overflow == "SAT" else 7]) == 0


@pytest.mark.parametrize("shift", range(-2, 14))
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_shift_of_the_integer_kernel(shift: int, rounding: str) -> None:
    graph, x = exhaustive_sum(f"fixed<8,{8 + shift},{rounding},SAT>")
    assert kinds(graph)["QGemm"] == 1
    assert mismatches(graph, x[::5]) == 0


def test_control_without_the_tie_break(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = exhaustive_sum("fixed<8,12,RND,SAT>")
    assert mismatches(graph, x) == 0
    monkeypatch.setattr(integer_kernel, "TIE_BREAK", 0.0)
    assert mismatches(graph, x) > 1000


def test_control_a_tie_break_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = exhaustive_sum("fixed<8,14,RND,SAT>")
    monkeypatch.setattr(integer_kernel, "TIE_BREAK", 2.0**-8)
    assert mismatches(graph, x) > 0


def test_control_another_constant_before_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, x = exhaustive_sum("fixed<12,13,RND,SAT>")
    assert kinds(graph)["Gemm"] == 1
    assert mismatches(graph, x) == 0
    monkeypatch.setitem(epilogue._OPERATORS, "RND", ("Floor", 0.5 - 2.0**-5))
    assert mismatches(graph, x) > 1000


def wide_sum() -> Graph:
    """A Linear whose partial sums reach beyond 2**24."""
    build = Builder()
    x = build.input("fixed<14,14>", (40,))
    return build.graph(build.linear(x, 8, "fixed<12,12>", "", 3))


def test_control_a_bound_that_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = wide_sum()
    x = np.random.default_rng(0).integers(-8192, 8191, (400, 40), endpoint=True).astype(np.float32)
    assert "Gemm" not in kinds(graph)
    assert mismatches(graph, x) == 0
    monkeypatch.setattr(epilogue, "SINGLE_LIMIT", 1 << 60)
    monkeypatch.setattr(FOLD_LINEAR, "SINGLE_LIMIT", 1 << 60)
    assert kinds(graph)["Gemm"] == 1
    assert mismatches(graph, x) > 0


@pytest.mark.parametrize("rounding", formats.ROUNDINGS)
@pytest.mark.parametrize(
    "fmt", ["fixed<8,1>", "ufixed<8,0>", "fixed<6,3>", "ufixed<5,9>", "fixed<12,4>", "fixed<20,8>", "fixed<30,9>"]
)
def test_input_quantiser(fmt: str, rounding: str) -> None:
    for overflow in ("SAT", "SAT_SYM", "SAT_ZERO"):
        target = replace(Fixed.parse(fmt), rounding=rounding, overflow=overflow)
        for outs in (0, 33):  # floats for an output, bytes for a Linear
            build = Builder()
            x = build.input(str(target), (1,))
            y = x if not outs else build.linear(x, outs, "fixed<3,3>")
            graph = build.graph(y) if outs else build.graph(build.add("Relu", "r", [x], {}), x)
            assert mismatches(graph, awkward_values(target, 500).reshape(-1, 1)) == 0


def test_control_half_added_in_float32() -> None:
    """Floor(v + 0.5), the obvious spelling, is wrong at 0.49999997 and there alone."""
    values = awkward_values(Fixed.parse("fixed<8,8>"), 500)
    values = values[np.abs(values) < 100]
    wrong = np.floor(values + np.float32(0.5)) != formats.quantize(values, Fixed.parse("fixed<8,8>"))
    assert wrong.any()
    assert set(values[wrong].tolist()) == {float(np.nextafter(np.float32(0.5), np.float32(0)))}


def test_control_half_even_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the first Floor the byte quantiser rounds ties to even."""
    build = Builder()
    graph = build.graph(build.linear(build.input("fixed<8,8>", (1,)), 33, "fixed<3,3>"))
    x = awkward_values(Fixed.parse("fixed<8,8>"), 500).reshape(-1, 1)
    assert kinds(graph)["QuantizeLinear"] == 1
    assert mismatches(graph, x) == 0
    original = FusedBody.unary
    monkeypatch.setattr(FusedBody, "unary", lambda self, op, a: a if op == "Floor" else original(self, op, a))
    assert mismatches(graph, x) > 0


# -- networks ---------------------------------------------------------------------------------------------------------


def random_format(rng: np.random.Generator, int_bits: int) -> str:
    width = int(rng.choice([3, 4, 6, 8, 8, 11]))
    signed = bool(rng.integers(2))
    rounding = str(rng.choice(formats.ROUNDINGS))
    overflow = str(rng.choice(["SAT", "SAT", "SAT", "SAT_SYM", "WRAP", "SAT_ZERO"]))
    return str(Fixed(width, int_bits + int(rng.integers(-2, 3)), signed, rounding, overflow))


def random_weights(rng: np.random.Generator, outs: int) -> str:
    width = int(rng.choice([2, 4, 6, 8, 9]))
    if rng.integers(2):
        return f"fixed<{width},{int(rng.integers(-1, 2))}>"
    return f"fixed<{width},[{','.join(str(int(v)) for v in rng.integers(-2, 2, outs))}]>"


def random_mlp(seed: int) -> Graph:
    rng = np.random.default_rng(seed)
    build = Builder()
    x = build.input(
        str(rng.choice(["fixed<8,1>", "ufixed<8,0>", "fixed<6,2>", "fixed<12,2>", "fixed<8,3,TRN,WRAP>"])), (9,)
    )
    outputs = []
    for _ in range(4):
        outs = int(rng.choice([3, 33, 40]))
        x = build.linear(x, outs, random_weights(rng, outs), random_format(rng, 3), int(rng.integers(1000)))
        if rng.integers(4) == 0:
            outputs.append(x)
    if x.format.per_channel:
        x = build.add("Requantize", "align", [x], {"requantize": "fixed<8,3>"})
    return build.graph(*outputs, build.linear(x, 5, "fixed<6,0>", "", 7))


def random_cnn(seed: int) -> Graph:
    """Convolutions, a residual, pooling, a concatenation, a dense layer: several readers and outputs."""
    rng = np.random.default_rng(seed)
    build = Builder()
    x = build.input(str(rng.choice(["fixed<8,1>", "ufixed<8,0>", "fixed<6,2>"])), (2, 7, 6))

    def conv(source: Tensor, outs: int) -> Tensor:
        return build.conv(source, outs, random_weights(rng, outs), random_format(rng, 4), int(rng.integers(1000)))

    a = conv(x, 4)
    b = conv(a, 4)
    operation = str(rng.choice(["Add", "Sub", "Mul"]))
    joined = build.add(operation, "join", [a, b], {"requantize": random_format(rng, 5)})
    pooled = build.pool(conv(joined, 4) if rng.integers(2) else joined)
    both = build.pool(a)
    scaled = [build.add("Requantize", f"r{i}", [t], {"requantize": "fixed<8,4>"}) for i, t in enumerate((pooled, both))]
    flat = build.flatten(build.add("Concat", "concat", scaled, {"axis": 0}))
    return build.graph(build.linear(flat, 34, random_weights(rng, 34), random_format(rng, 5), 3), pooled)


def random_wide(seed: int) -> Graph:
    """Convolutions wide enough for the integer kernel: dense, depthwise, strided, dilated, with shortcuts and pools."""
    rng = np.random.default_rng(seed)
    build = Builder()
    x = build.input(str(rng.choice(["fixed<8,1>", "ufixed<8,0>", "fixed<6,2>"])), (16, 7, 6))
    outputs = []
    for _ in range(4):
        channels = x.shape[1] or 1
        depthwise = bool(rng.integers(2))
        outs = channels if depthwise else int(rng.choice([16, 19, 32]))
        kernel, stride, dilation = int(rng.choice([1, 3])), int(rng.choice([1, 1, 2])), int(rng.choice([1, 1, 2]))
        groups = channels if depthwise else 1
        width = int(rng.choice([2, 4, 6, 8]))
        w_fmt = f"fixed<{width},[{','.join(str(int(v)) for v in rng.integers(-1, 1, outs))}]>"
        w_fmt = w_fmt if rng.integers(2) else f"fixed<{width},0>"
        target = Fixed(int(rng.choice([5, 6, 8])), int(rng.integers(2, 5)), bool(rng.integers(2)))
        target = replace(
            target, rounding=str(rng.choice(formats.ROUNDINGS)), overflow=str(rng.choice(["SAT", "SAT_SYM"]))
        )
        y = build.conv(x, outs, w_fmt, str(target), int(rng.integers(1000)), kernel, stride, dilation, groups)
        if y.shape == x.shape and rng.integers(2):
            name = f"join{len(build.made.nodes)}"
            y = build.add(str(rng.choice(["Add", "Sub"])), name, [y, x], {"requantize": random_format(rng, 4)})
        x = build.pool(y) if rng.integers(3) == 0 and min(y.sample_shape[1:]) > 1 else y
        if rng.integers(4) == 0:
            outputs.append(x)
    return build.graph(*outputs, build.linear(build.flatten(x), 5, "fixed<6,0>", "", 7))


@pytest.mark.parametrize("seed", range(40))
def test_random_wide(seed: int) -> None:
    graph = random_wide(seed)
    x = batch(graph.input_type(0).format, (16, 7, 6), 40, seed)
    assert mismatches(graph, x) == 0
    assert mismatches(graph, code_feeds(graph, 12)[graph.inputs[0]], codes=True) == 0


def test_the_wide_networks_use_what_they_are_for() -> None:
    found: Counter[str] = Counter()
    for seed in range(40):
        found += kinds(random_wide(seed))
    assert found["QLinearConv"] > 80 and found["NhwcMaxPool"] > 3 and found["DequantizeLinear"] > 10


@pytest.mark.parametrize("seed", range(30))
def test_random_mlp(seed: int) -> None:
    graph = random_mlp(seed)
    x = batch(graph.input_type(0).format, (9,), 600, seed)
    if graph.input_type(0).format.overflow == "WRAP":
        x = np.clip(x, -1000, 1000)
    assert mismatches(graph, x) == 0
    assert mismatches(graph, code_feeds(graph, 50)[graph.inputs[0]], codes=True) == 0


@pytest.mark.parametrize("seed", range(30))
def test_random_cnn(seed: int) -> None:
    graph = random_cnn(seed)
    x = batch(graph.input_type(0).format, (2, 7, 6), 60, seed)
    assert mismatches(graph, x) == 0
    assert mismatches(graph, code_feeds(graph, 20)[graph.inputs[0]], codes=True) == 0


def test_a_rounding_without_its_sign_rule_widens_the_interval() -> None:
    """TRN_ZERO of sums within one LSB is always 0; TRN stands in for it and needs the clip that TRN_ZERO does not."""
    build = Builder()
    x = build.input("fixed<4,4>", (3,))
    graph = build.graph(build.linear(x, 3, "fixed<4,4>", "ufixed<3,18,TRN_ZERO,SAT>"))
    assert (graph.output_type(0).lo, graph.output_type(0).hi) == (0, 0)
    assert mismatches(graph, batch(Fixed.parse("fixed<4,4>"), (3,), 200)) == 0


def test_control_a_changed_weight() -> None:
    graph = random_mlp(1)
    x = batch(graph.input_type(0).format, (9,), 100)
    wanted = reference.run(graph, to_codes(graph, x, False))
    graph.nodes[-1].constants[1][0, 0] ^= 1
    found = Simulator(graph).codes(x)
    last = found[graph.output_names[-1]] if isinstance(found, dict) else found
    assert (last != wanted[graph.outputs[-1]]).any()


# -- which rewrites apply ---------------------------------------------------------------------------------------------


def test_mlp_is_one_kernel_a_layer() -> None:
    build = Builder()
    x = build.input("fixed<8,1>", (16,))
    for outs in (64, 32, 32):
        x = build.linear(x, outs, "fixed<8,0>", "ufixed<8,6>", outs)
    graph = build.graph(build.linear(x, 5, "fixed<8,0>"))
    found = kinds(graph)
    assert found["QGemm"] == 4
    assert not found["Cast"] and not found["Clip"] and found["QuantizeLinear"] == 1


def test_residual_network_stays_in_bytes() -> None:
    build = Builder()
    x = build.conv(build.input("fixed<8,1>", (16, 6, 6)), 16, "fixed<6,0>", "ufixed<6,4>")
    y = build.conv(build.conv(x, 16, "fixed<6,0>", "ufixed<6,4>"), 16, "fixed<6,0>", "fixed<6,4>")
    total = build.add("Add", "shortcut", [x, y], {"requantize": "ufixed<6,4>"})
    graph = build.graph(build.linear(build.flatten(build.pool(total)), 10, "fixed<6,0>"))
    found = kinds(graph)
    assert found["QLinearConv"] == 3 and found["NhwcMaxPool"] == 1 and found["QGemm"] == 1
    assert found["Transpose"] == 2  # into channels last and out again
    assert mismatches(graph, batch(Fixed.parse("fixed<8,1>"), (16, 6, 6), 60)) == 0


def test_control_another_offset_in_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    build = Builder()
    graph = build.graph(build.conv(build.input("fixed<8,1>", (16, 6, 6)), 16, "fixed<6,0>", "fixed<8,6>"))
    x = batch(Fixed.parse("fixed<8,1>"), (16, 6, 6), 30)
    assert kinds(graph)["QLinearConv"] == 1 and mismatches(graph, x) == 0
    monkeypatch.setattr(integer_kernel, "byte_offset", lambda tensor: 127)
    assert mismatches(graph, x) > 0


def test_pool_comes_before_rounding() -> None:
    build = Builder()
    x = build.conv(build.input("fixed<8,1>", (1, 8, 8)), 4, "fixed<6,0>", "ufixed<6,3>")
    graph = build.graph(build.pool(x))
    order = [node.op_type for node in fuse(graph, False).model.graph if node.op_type != "Constant"]
    assert order[order.index("Conv") :] == ["Conv", "Clip", "MaxPool", "Cast", "Cast"]


def test_pool_waits_where_wrapping_breaks_the_order() -> None:
    build = Builder()
    x = build.conv(build.input("fixed<8,1>", (1, 8, 8)), 4, "fixed<6,0>", "fixed<4,0,RND,WRAP>")
    graph = build.graph(build.pool(x))
    order = [node.op_type for node in fuse(graph, False).model.graph]
    assert order.index("MaxPool") > order.index("Floor")
    assert mismatches(graph, batch(Fixed.parse("fixed<8,1>"), (1, 8, 8), 50)) == 0


def test_unsafe_pairs_are_halved() -> None:
    """No pair of products leaves 16 bits: 8-bit weights meet the input twice."""
    for width, rows in ((6, 16), (8, 32)):
        build = Builder()
        graph = build.graph(build.linear(build.input("fixed<8,1>", (16,)), 8, f"fixed<{width},0>"))
        (gemm,) = (node for node in fuse(graph, False).model.graph if node.op_type == "QGemm")
        weight = gemm.inputs[3].producer().attributes["value"].value.numpy()
        assert weight.dtype == np.int8 and weight.shape == (rows, 8)
        assert integer_kernel.pairs_are_safe(weight.T.astype(np.int64), 255)


def test_halves_of_every_weight() -> None:
    weight = np.arange(-128, 128).reshape(2, 128)
    halved = integer_kernel.halves(weight)
    assert (halved[:, :128] + halved[:, 128:] == weight).all()
    assert np.abs(halved).max() == 64 and integer_kernel.pairs_are_safe(halved, 255)
    assert not integer_kernel.pairs_are_safe(weight, 255)
