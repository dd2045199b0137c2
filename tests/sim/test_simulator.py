"""What people pass to a Simulator and what they get: shapes, dicts, codes, refusals, infinities, slices, threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

import edgemat
from edgemat import formats
from edgemat.errors import FormatError
from edgemat.lower.graph import Graph
from edgemat.sim import reference, simulator
from edgemat.sim.arrays import to_codes

from .graphs import Builder, batch
from .test_avx2 import lowered_file


def plain(fmt: str = "fixed<8,1>") -> Graph:
    build = Builder()
    return build.graph(build.linear(build.input(fmt, (4,)), 3, "fixed<6,0>", "fixed<8,4>", name="fc"))


def forked() -> Graph:
    """Two inputs, three outputs; one output is an input's own codes, one tensor is returned twice."""
    build = Builder()
    a, b = build.input("fixed<8,1>", (4,), "a"), build.input("ufixed<6,2>", (4,), "b")
    total = build.add("Add", "total", [a, b], {"requantize": "fixed<30,4>"})
    return build.graph(total, a, total)


def same(graph: Graph, x: dict[str, np.ndarray] | np.ndarray) -> bool:
    wanted = reference.run(graph, to_codes(graph, x, False))
    found = edgemat.Simulator(graph).codes(x)
    rows = found if isinstance(found, dict) else {graph.output_names[0]: found}
    pairs = zip(graph.output_names, graph.outputs, strict=True)
    return all((rows[name] == wanted[tensor]).all() and rows[name].dtype == np.int64 for name, tensor in pairs)


def test_one_array_in_one_out() -> None:
    graph = plain()
    x = batch(graph.input_type(0).format, (4,), 100)
    simulate = edgemat.Simulator(graph)
    values, codes = simulate(x), simulate.codes(x)
    assert isinstance(values, np.ndarray) and values.dtype == np.float32 and values.shape == (100, 3)
    assert isinstance(codes, np.ndarray) and codes.dtype == np.int64
    assert (values == formats.dequantize(codes, graph.output_type(0).format)).all()
    assert not np.signbit(values[values == 0]).any()


def test_codes_in_codes_out() -> None:
    graph = plain()
    x = batch(graph.input_type(0).format, (4,), 100)
    given = to_codes(graph, x, False)["x"]
    simulate = edgemat.Simulator(graph)
    assert (simulate(given, codes=True) == simulate.codes(x)).all()
    assert (simulate.codes(given.astype(np.int16), codes=True) == simulate.codes(x)).all()


def test_several_inputs_and_outputs() -> None:
    graph = forked()
    x = {"a_real": batch(graph.input_type(0).format, (4,), 50), "b_real": batch(graph.input_type(1).format, (4,), 50)}
    assert same(graph, x)
    values = edgemat.Simulator(graph)(x)
    assert isinstance(values, dict) and list(values) == ["out0", "out1", "out2"]
    assert values["out0"].dtype == np.float64  # 30 bits
    assert (values["out0"] == values["out2"]).all()


def test_npz_is_a_dict(tmp_path: Path) -> None:
    graph = forked()
    x = {"a_real": batch(graph.input_type(0).format, (4,), 5), "b_real": batch(graph.input_type(1).format, (4,), 5)}
    np.savez(tmp_path / "x.npz", **x)
    with np.load(tmp_path / "x.npz") as loaded:
        assert same(graph, dict(loaded))
        found = edgemat.Simulator(graph).codes(loaded)
    assert isinstance(found, dict) and len(found) == 3


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int8, np.int64, np.uint8, bool])
def test_values_of_any_number_type(dtype: type) -> None:
    graph = plain("fixed<8,4>")
    x = np.random.default_rng(0).integers(0, 2, (30, 4)).astype(dtype)
    assert same(graph, x)


def test_float64_is_cast_to_float32_first() -> None:
    """2**-9 + 2**-40 rounds up as float64; as float32 it is the tie 2**-9, which RND_MIN_INF rounds down."""
    build = Builder()
    graph = build.graph(build.add("Relu", "r", [build.input("ufixed<8,0,RND_MIN_INF,SAT>", (1,))], {}))
    tie = np.array([[2.0**-9 + 2.0**-40]])
    assert edgemat.Simulator(graph).codes(tie).item() == 0
    assert same(graph, tie)


@pytest.mark.parametrize("shape", [(5, 3), (5, 4, 1), (4,), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(FormatError, match=r"has shape .* expected \(N, 4\)"):
        edgemat.Simulator(plain())(np.zeros(shape, np.float32))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(FormatError, match="at least 1"):
        edgemat.Simulator(plain())(np.zeros((0, 4), np.float32))


@pytest.mark.parametrize("spot", [0, 2999])
def test_nan_is_refused_wherever_it_is(spot: int) -> None:
    x = np.zeros((3000, 4), np.float32)
    x[spot, 3] = np.nan
    with pytest.raises(FormatError, match="NaN"):
        edgemat.Simulator(plain())(x)
    with pytest.raises(FormatError, match="NaN"):
        edgemat.Simulator(plain())(x.astype(np.float64))


def test_infinities_saturate() -> None:
    graph = plain()
    x = np.array([[np.inf, -np.inf, 1e300, -1e300]])
    rails = np.array([[127, -128, 127, -128]])
    assert (edgemat.Simulator(graph).codes(x) == edgemat.Simulator(graph).codes(rails, codes=True)).all()
    assert same(graph, x)


def test_infinities_are_refused_under_wrap() -> None:
    graph = plain("fixed<8,1,RND,WRAP>")
    x = np.array([[0.0, 300.25, -77.5, 1e30]], np.float32)
    assert same(graph, x)
    x[0, 0] = np.inf
    with pytest.raises(FormatError, match="infinity"):
        edgemat.Simulator(graph)(x)
    with pytest.raises(FormatError, match="infinity"):
        to_codes(graph, x, False)


def test_codes_outside_the_format_are_refused() -> None:
    simulate = edgemat.Simulator(plain())
    for code in (128, -129):
        with pytest.raises(FormatError, match="expected -128 to 127"):
            simulate(np.full((1, 4), code), codes=True)
    with pytest.raises(FormatError, match="integer codes"):
        simulate(np.zeros((1, 4), np.float32), codes=True)


def test_names_are_checked() -> None:
    simulate = edgemat.Simulator(forked())
    a = np.zeros((2, 4), np.float32)
    with pytest.raises(FormatError, match="expected a dict by name"):
        simulate(a)
    with pytest.raises(FormatError, match="'b_real' is missing"):
        simulate({"a_real": a})
    with pytest.raises(FormatError, match="'c' is unknown"):
        simulate({"a_real": a, "b_real": a, "c": a})
    with pytest.raises(FormatError, match="one number"):
        simulate({"a_real": a, "b_real": np.zeros((3, 4), np.float32)})
    with pytest.raises(FormatError, match="real numbers"):
        edgemat.Simulator(plain())(np.zeros((1, 4), complex))


@pytest.mark.parametrize("samples", [1, 2, 63, 64, 65, 1000])
def test_slices_join_in_order(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = plain()
    x = batch(graph.input_type(0).format, (4,), samples)
    for size, threads in ((16, "1"), (256, "3"), (1 << 20, "2")):
        monkeypatch.setattr(simulator, "SLICE_BYTES", size)
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        assert same(graph, x)


def test_one_simulator_in_several_threads() -> None:
    graph = plain()
    simulate = edgemat.Simulator(graph)
    x = batch(graph.input_type(0).format, (4,), 500)
    wanted = simulate.codes(x)
    with ThreadPoolExecutor(4) as pool:
        assert all((found == wanted).all() for found in pool.map(simulate.codes, [x] * 12))


def test_opening_is_lazy_and_the_trace_runs_the_file(tmp_path: Path) -> None:
    lowered_file(tmp_path / "net.onnx", (6, 8))
    simulate = edgemat.Simulator(tmp_path / "net.onnx")
    assert set(vars(simulate)) == {"graph", "_states"}
    x = batch(simulate.graph.input_type(0).format, (32,), 40)
    wanted = reference.trace(simulate.graph, to_codes(simulate.graph, x, False))
    found = simulate.trace(x)
    assert set(found) == set(wanted)
    assert all((found[name] == wanted[name]).all() for name in wanted)
    assert set(vars(simulate)) == {"graph", "_states"}  # nothing fused was needed
    assert (simulate.codes(x) == wanted[simulate.graph.outputs[0]]).all()


def test_work_is_shared_and_errors_arrive() -> None:
    for workers in (1, 2, 5):
        assert simulator.share(lambda item: item * item, range(0, 40, 3), workers) == {
            i: i * i for i in range(0, 40, 3)
        }

    def fails(item: int) -> int:
        if item == 7:
            raise FormatError("seven")
        return item

    for workers in (1, 3):
        with pytest.raises(FormatError, match="seven"):
            simulator.share(fails, range(50), workers)


def test_a_busy_pool_does_not_hold_a_run_up() -> None:
    """Helpers that never begin are called off: the calling thread does all the work."""
    gate = Event()
    blocked = [simulator._pool(1).submit(gate.wait) for _ in range(2)]
    try:
        assert simulator.share(lambda item: item, range(9), 2) == {i: i for i in range(9)}
    finally:
        gate.set()
    assert all(future.result() for future in blocked)
