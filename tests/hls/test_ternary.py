"""Ternary layers in HLS C++: every unit and packing against the reference, and controls that must differ."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.targets.hls import NodePlan, Plan, PlanError, Simulation, model_cost, project
from edgemat.targets.hls.simulation import SANITIZE, STRICT
from edgemat.targets.hls.ternary import one_word, pack_steps, packed_folding, term_lists, tree_bits
from edgemat.trits import unpack_trits

from .graphs import graph_of, side_by_side
from .networks import residual

W_FORMAT = "fixed<2,0,RND,SAT_SYM>"
REQUANTIZE = "fixed<6,8,RND_CONV,SAT>"
X_FORMATS = ("fixed<8,3>", "ufixed<4,4>", "fixed<5,5>")

PLANS = {
    "parallel": Plan(),
    "parallel_folded": Plan(reuse=7),
    "parallel_axi": Plan(weights="axi", packing="1.6", axi_bits=32),
    "parallel_uram": Plan(weights="uram", reuse=5),
    "stream": Plan(io="stream"),
    "stream_rom": Plan(io="stream", weights="rom", packing="1.6", reuse=6),
    "stream_axi": Plan(io="stream", weights="axi", axi_bits=64),
    "stream_uram": Plan(io="stream", weights="uram", packing="1.6", axi_bits=1024),
}


def trits(shape, seed):
    """Random trits; every row of at least two has both signs, as corner vectors need."""
    codes = np.random.default_rng(seed).integers(-1, 2, shape)
    if codes[0].size > 1:
        codes.reshape(len(codes), -1)[:, :2] = 1, -1
    return codes


def linear(codes, name, x_format="fixed<8,3>", bias=True, rows=(), w_format=W_FORMAT):
    """A Linear over weights of these codes."""
    outputs, inputs = codes.shape
    w = constant(w_format, codes)
    b = constant("fixed<10,0>", np.arange(outputs) * 7 - 3 * outputs, "b")
    x = tensor(x_format, (None, *rows, inputs))
    if not bias:
        return Call(BY_NAME["Linear"], name, [x, w[0]], {"w_format": w_format}, {1: w[1]}, (name,))
    attrs = {"w_format": w_format, "requantize": REQUANTIZE}
    return Call(BY_NAME["Linear"], name, [x, w[0], b[0]], attrs, {1: w[1], 2: b[1]}, (name,))


def conv(codes, name, size, stride, pads, groups=1, x_format="fixed<8,3>", dilation=1):
    """A Conv over weights of these codes."""
    w = constant(W_FORMAT, codes)
    dims = codes.ndim - 2
    attrs = {
        "w_format": W_FORMAT, "strides": (stride,) * dims, "pads": pads, "dilations": (dilation,) * dims,
        "groups": groups,
        "requantize": REQUANTIZE,
    }  # fmt: skip
    x = tensor(x_format, (None, codes.shape[1] * groups, *size))
    return Call(BY_NAME["Conv"], name, [x, w[0]], attrs, {1: w[1]}, (name,))


def layers():
    """Sizes around whole bytes of trits, one row, one column, all zeros; every kind of convolution."""
    made = [
        linear(trits(shape, seed), f"linear{seed}", X_FORMATS[seed % 3], bias=seed % 2 == 0)
        for seed, shape in enumerate([(1, 1), (1, 9), (5, 1), (3, 4), (4, 5), (2, 6), (6, 11), (8, 32), (7, 21)])
    ]
    made += [
        linear(np.zeros((3, 7), np.int64), "zeros"),
        linear(np.zeros((2, 5), np.int64), "zeros_exact", bias=False),
        linear(np.array([[1] * 6, [-1] * 6, [0] * 6, [1, 0, 0, 0, 0, 0]]), "one_sided"),
        linear(trits((3, 6), 20), "rows", rows=(4,)),
        linear(trits((3, 6), 27), "scaled_rows", rows=(4,), w_format="fixed<2,[1,-2,4],RND,SAT_SYM>"),
        linear(-np.ones((1, 641), np.int64), "long", "fixed<4,2>", bias=False),
        linear(trits((3, 7), 28), "wide", "fixed<32,3>", bias=False),
        conv(trits((4, 3, 3, 3), 21), "conv3", (5, 6), 1, (1, 1, 1, 1)),
        conv(trits((3, 2, 3, 2), 22), "strided", (7, 5), 2, (0, 1, 2, 0), x_format="ufixed<4,4>"),
        conv(trits((5, 7, 1, 1), 23), "pointwise", (3, 3), 1, (0, 0, 0, 0)),
        conv(trits((4, 2, 3, 3), 24), "grouped", (4, 4), 1, (1, 1, 1, 1), groups=2),
        conv(trits((6, 1, 3, 3), 25), "depthwise", (4, 4), 1, (1, 1, 1, 1), groups=6),
        conv(trits((3, 4, 5), 26), "conv1d", (9,), 2, (2, 2)),
        conv(trits((4, 3, 2, 3), 29), "dilated", (6, 7), 1, (3, 0, 1, 2), groups=2, dilation=2),
        conv(np.zeros((2, 3, 2, 2), np.int64), "conv_zeros", (3, 3), 1, (0, 0, 0, 0)),
    ]
    return made


@pytest.mark.parametrize("types", ["native", "hardware"])
@pytest.mark.parametrize("plan", PLANS)
def test_equals_the_reference(compiler, plan, types):
    graph, codes, expected = side_by_side(layers())
    defines = {"EDGEMAT_HARDWARE_TYPES": None} if types == "hardware" else {}
    with Simulation(graph, PLANS[plan], compiler=compiler, optimize="0", defines=defines) as simulation:
        found = simulation.run(codes)
    assert [name for name in expected if not np.array_equal(found[name], expected[name])] == []


@pytest.mark.parametrize("plan", ["stream", "stream_rom", "parallel_axi"])
def test_warnings_and_sanitizers_stay_silent(compiler, plan):
    if compiler.name == "zig":
        pytest.skip("zig ships no AddressSanitizer runtime; install g++ (make toolchains)")
    graph, codes, expected = side_by_side(layers())
    options = {"compiler": compiler, "standard": "c++20", "optimize": "0", "flags": (*STRICT, *SANITIZE)}
    with Simulation(graph, PLANS[plan], **options) as simulation:
        found = simulation.run(codes)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("defines", [{}, {"EDGEMAT_HARDWARE_TYPES": None}], ids=["native", "hardware"])
def test_cpp14_without_warnings(compiler, defines):
    graph, _, _ = side_by_side(layers()[4:9])
    for plan in (Plan(), Plan(io="stream", weights="axi")):
        options = {"compiler": compiler, "flags": (*STRICT, "-pedantic"), "optimize": "0", "defines": defines}
        Simulation(graph, plan, **options).close()


def test_bounded_fifos_and_threads(compiler):
    graph, codes, expected = side_by_side([layers()[7], layers()[13]])
    with Simulation(graph, PLANS["stream_uram"], compiler=compiler, optimize="0", threads=True) as simulation:
        found = simulation.run(codes)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


# -- controls ----------------------------------------------------------------------------------------------------
def one_layer():
    """A layer without a zero among its weights, whose sums no epilogue hides; rails are among its codes."""
    codes = trits((4, 11), 3)
    codes[codes == 0] = 1
    return side_by_side([linear(codes, "layer", bias=False)])


class Changed:
    """A project with one file changed."""

    def __init__(self, made, file, change):
        self.made, self.file, self.change = made, file, change
        self.design, self.top, self.trace_channels = made.design, made.top, made.trace_channels

    def files(self, *, vectors=True):
        found = self.made.files(vectors=vectors)
        changed = self.change(found[self.file])
        assert changed != found[self.file]
        return found | {self.file: changed}


def replaced(old, new):
    return lambda data: data.replace(old, new, 1)


def flipped(packing):
    """The first trit of a memory becomes its negative."""

    def change(data):
        first = data[0] ^ 2 if packing == "2" else data[0] + (2 if data[0] % 3 == 0 else -2)
        return bytes([first]) + data[1:]

    return change


def other_order(packing):
    """The trits of the first byte in the other order, its zeros behind them kept out of it."""

    def change(data):
        per = 4 if packing == "2" else 5
        row = unpack_trits(np.frombuffer(data[:1], np.uint8), per, packing)[::-1]
        return pack_steps(row.reshape(1, -1), 1, per, packing).tobytes() + data[1:]

    return change


MEMORY = "memory/linear0_weights.bin"
CONTROLS = {
    "structure": (
        Plan(),
        "parameters.hpp",
        replaced(b"linear0_splits[4] = {\n    ", b"linear0_splits[4] = {\n    1 + "),
    ),
    "rom": (
        Plan(weights="rom"),
        "parameters.hpp",
        replaced(b"linear0_weight[12] = {\n    ", b"linear0_weight[12] = {\n    2 ^ "),
    ),
    "axi": (Plan(weights="axi"), MEMORY, flipped("2")),
    "axi five": (Plan(io="stream", weights="axi", packing="1.6"), MEMORY, flipped("1.6")),
    "uram five": (Plan(weights="uram", packing="1.6"), MEMORY, flipped("1.6")),
    "order": (Plan(weights="axi"), MEMORY, other_order("2")),
    "order five": (Plan(weights="axi", packing="1.6"), MEMORY, other_order("1.6")),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_flipped_trit_is_noticed(compiler, monkeypatch, control):
    plan, file, change = CONTROLS[control]
    graph, codes, expected = one_layer()
    made = project(graph, plan)
    monkeypatch.setattr("edgemat.targets.hls.simulation.Project", (type(made), Changed))
    for program, same in ((made, True), (Changed(made, file, change), False)):
        with Simulation(program, compiler=compiler, optimize="0") as simulation:
            found = simulation.run(codes)
        assert all(np.array_equal(found[name], expected[name]) for name in expected) == same


def test_the_other_packing_is_noticed(compiler, monkeypatch):
    graph, codes, expected = one_layer()
    made, other = (project(graph, Plan(weights="axi", packing=packing, axi_bits=32)) for packing in ("2", "1.6"))
    data = other.files(vectors=False)[MEMORY]
    monkeypatch.setattr("edgemat.targets.hls.simulation.Project", (type(made), Changed))
    size = len(made.files(vectors=False)[MEMORY])
    mixed = Changed(made, MEMORY, lambda _: (data + bytes(size))[:size])
    with Simulation(mixed, compiler=compiler, optimize="0") as simulation:
        found = simulation.run(codes)
    assert not all(np.array_equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"\0"], ids=["short", "long"])
def test_a_memory_of_another_size_is_refused(compiler, monkeypatch, change):
    graph, codes, _ = one_layer()
    made = project(graph, Plan(weights="axi"))
    monkeypatch.setattr("edgemat.targets.hls.simulation.Project", (type(made), Changed))
    with (
        Simulation(Changed(made, MEMORY, change), compiler=compiler, optimize="0") as simulation,
        pytest.raises(Exception, match=r"linear0_weights.bin does not hold \d+ words"),
    ):
        simulation.run(codes)


# -- the plan and what follows from it ---------------------------------------------------------------------------
@pytest.mark.parametrize("packing", ["2", "1.6"])
@pytest.mark.parametrize(("pe", "simd"), [(1, 1), (2, 4), (3, 5), (6, 7), (6, 13), (1, 15)])
def test_steps_hold_every_trit_once(packing, pe, simd):
    weight = trits((6, 13), 1)
    packed = pack_steps(weight, pe, simd, packing)
    chunks = -(-13 // simd)
    rows = unpack_trits(packed.reshape(6 // pe, chunks, pe, -1), simd, packing)
    whole = rows.transpose(0, 2, 1, 3).reshape(6, chunks * simd)
    assert np.array_equal(whole[:, :13], weight) and not whole[:, 13:].any()


def test_zeros_leave_no_term():
    weight = trits((4, 6), 2)
    first, split, taps = term_lists(weight, 6, 1)
    assert len(taps) == np.count_nonzero(weight) and first[-1] == len(taps)
    for o, row in enumerate(weight):
        assert taps[first[o] : split[o]].tolist() == np.flatnonzero(row > 0).tolist()
        assert taps[split[o] : first[o + 1]].tolist() == np.flatnonzero(row < 0).tolist()


def test_the_packed_project_takes_a_quarter_of_a_byte_a_weight():
    call = linear(trits((16, 64), 5), "big")
    graph = graph_of([call], call.x[:1], ["big"], "network")
    sizes = {p: len(project(graph, Plan(weights="axi", packing=p)).files(vectors=False)["memory/big_weights.bin"])
             for p in ("2", "1.6")}  # fmt: skip
    assert sizes == {"2": 256, "1.6": 208}
    ports = project(graph, Plan(weights="axi", axi_bits=64)).files(vectors=False)["em_network.cpp"].decode()
    assert "const ap_uint<64>* big_weights)" in ports
    assert "#pragma HLS INTERFACE mode=m_axi port=big_weights bundle=big_weights offset=slave depth=32" in ports


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "flash"}, "weights is 'flash', expected one of auto, rom, uram, axi"),
        ({"weights": "axe"}, "did you mean 'axi'"),
        ({"packing": "1.5"}, "packing is '1.5', expected one of 2, 1.6"),
        ({"packing": 2}, "packing is the number 2, expected the text '2'; put it in quotes"),
        ({"packing": 1.6}, "packing is the number 1.6, expected the text '1.6'"),
        ({"packing": ["2"]}, "packing is ['2'], expected one of 2, 1.6"),
        ({"weights": None}, "weights is None, expected one of auto"),
        ({"axi_bits": 100}, "axi_bits is 100, expected one of 32, 64"),
        ({"axi_bits": 128.0}, "axi_bits is 128.0, expected one of 32, 64"),
        ({"axi_bits": True}, "axi_bits is True, expected one of 32, 64"),
    ],
)
def test_a_bad_choice_is_refused(options, words):
    with pytest.raises(PlanError) as error:
        Plan(**options)
    assert words in str(error.value)
    if "axi_bits" not in options and None not in options.values():  # None leaves a node to the project's choice
        with pytest.raises(PlanError):
            NodePlan(**options)


def test_choices_that_do_not_fit_the_node_are_refused():
    with pytest.raises(PlanError, match="'first', whose weights are not ternary"):
        project(residual(), Plan(nodes={"first": NodePlan(packing="1.6")}))
    for options, words in (({"packing": "2"}, "packing='2'"), ({"weights": "uram"}, "weights='uram'")):
        with pytest.raises(PlanError, match=rf"the plan states {words}, and no node of .* has ternary weights"):
            project(residual(), Plan(**options))
    graph, _, _ = one_layer()
    for choice, words in ((NodePlan(pe=3), "pe is 3, expected a divisor of its 4"), (NodePlan(simd=13), "at most 12")):
        with pytest.raises(PlanError, match=words):
            project(graph, Plan(nodes={"linear0": choice}))


def test_foldings():
    free = NodePlan(reuse=1)
    assert packed_folding(6, 13, free, "2", "n") == (6, 13)
    assert packed_folding(6, 13, NodePlan(reuse=6), "2", "n") in {(1, 13), (4, 12), (2, 8)}
    assert packed_folding(8, 64, NodePlan(reuse=8, simd=10), "1.6", "n")[1] == 10
    assert one_word(16, 64, "2", 128) == (1, 64)
    assert one_word(16, 64, "1.6", 128) == (16, 5)
    assert one_word(16, 8, "2", 128) == (8, 8)
    assert one_word(7, 4096, "1.6", 128) == (1, 80)


def test_the_modelled_cost_counts_adders():
    assert tree_bits(1, 8, 20) == 0 and tree_bits(2, 8, 20) == 9 and tree_bits(4, 8, 20) == 9 + 9 + 10
    assert tree_bits(4, 8, 9) == 27
    call = linear(np.array([[1, 1, -1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]), "n", bias=False)
    graph = graph_of([call], call.x[:1], ["n"])
    cost = model_cost(graph, Plan())
    acc = 10  # -3 * 128 .. 3 * 128
    assert (cost.multipliers, cost.macs) == (0, 0)
    assert (cost.adders, cost.adder_luts) == (2, 9 + acc)
    folded = model_cost(graph, Plan(weights="axi", axi_bits=32))
    assert folded.multipliers == 0 and folded.memory_bytes == 4 and folded.adder_luts > 0
    assert model_cost(residual()).adder_luts == 0
