"""Thresholds beyond the dossier's cases: what is refused, whole files, and maps of a network's size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import edgemat
from edgemat.errors import EdgematError
from edgemat.lower.reader import read
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor
from edgemat.ops.thresholds import MAX_THRESHOLDS
from edgemat.report import inspect
from tests.core.graphs import Sketch, weights
from tests.core.test_ops_contract import Runner

OP = BY_NAME["Thresholds"]


def staircase(rows: object, x_format: str, shape: tuple[int | None, ...], **attrs: object) -> Call:
    t, codes = constant("fixed<64,64>", np.asarray(rows, np.int64), "t")
    return Call(OP, "t", [tensor(x_format, shape), t], {"y_format": "fixed<8,8>", "start": 0, **attrs}, {1: codes})


def test_what_it_cannot_mean_is_refused() -> None:
    shape = (None, 2, 3)
    for call, word in (
        (staircase([[1, 0]], "fixed<8,8>", shape), "ascending"),
        (staircase([[1, 2], [5, 4]], "fixed<8,8>", shape), "channel 1 is 4 behind 5"),
        (staircase([[1], [2], [3]], "fixed<8,8>", shape), r"\[2, T\]"),
        (staircase([1, 2], "fixed<8,8>", shape), "shape"),
        (staircase(np.arange(MAX_THRESHOLDS + 1)[None], "fixed<24,24>", shape), "65535"),
        (staircase([[1]], "fixed<8,8>", shape, step=0), "step other than 0"),
        (staircase([[1]], "fixed<8,8>", shape, start=127), "127 to 128 for fixed<8,8"),
        (staircase([[1, 4]], "fixed<8,8>", shape, start=-1, y_format="bipolar"), "bipolar"),
        (staircase([[1]], "fixed<8,8>", shape, y_format="fixed<8,[8,7]>"), "one binary point"),
        (staircase([[1]], "fixed<64,64>", shape), "62 bits"),
        (staircase([[1]], "fixed<8,8>", (None, 2, 3, 1, 1)), "rank 2 to 4"),
        (staircase([[1]], "fixed<8,8>", shape, start=1 << 62, step=1 << 62), "64 bits"),
    ):
        with pytest.raises(EdgematError, match=word):
            _ = call.y
    with pytest.raises(EdgematError, match="a row for each binary point"):
        _ = staircase([[1]], "fixed<8,[3,1]>", shape).y
    t = tensor("fixed<8,8>", (1, 3), "t")
    with pytest.raises(EdgematError, match="no initializer"):
        _ = Call(OP, "t", [tensor("fixed<8,8>", shape), t], {"y_format": "fixed<8,8>", "start": 0}).y


def test_results_that_cannot_occur_need_no_room() -> None:
    """Counts that no code reaches: below thresholds that always count, above ones that never do, between equal ones."""
    call = staircase([[-900, -200, 4, 4, 4, 800]], "fixed<8,8>", (None, 1), start=-2, y_format="ufixed<2,2>")
    assert (call.y[0].lo, call.y[0].hi) == (0, 3)
    native = OP.native(call)
    assert native.params["start"] == 0 and native.arrays["threshold"].tolist() == [[4, 4, 4]]


@pytest.mark.parametrize("bits", [10, 20])
def test_a_map_with_255_thresholds_a_channel(bits: int) -> None:
    """A table at 10 bits, a search at 20; the reference is counted here, one threshold after the other."""
    rng = np.random.default_rng(bits)
    half = 1 << (bits - 1)
    rows = np.sort(rng.integers(-half, half, (64, 255)), axis=1)
    call = staircase(rows, f"fixed<{bits},{bits}>", (None, 64, 16, 16), y_format="ufixed<8,8>")
    x = rng.integers(-half, half, (2, 64, 16, 16))
    x[0, :, 0, :] = rows[:, :16]
    x[0, :, 1, :] = rows[:, 40:56] - 1
    expected = sum((x >= rows[:, i][:, None, None]).astype(np.int64) for i in range(255))
    assert (OP.reference(call, x) == expected).all()
    assert (Runner(call)([x, rows]).astype(np.int64) == expected).all()


def test_control_one_threshold_moved_by_one_moves_one_code() -> None:
    """In the reference and in every form of the body: compared, looked up, searched."""
    for x_format, count in (("fixed<8,8>", 3), ("fixed<8,8>", 40), ("fixed<24,24>", 60)):
        rows = np.arange(count)[None] * 3 - 55
        moved = rows + (np.arange(count) == 1)
        x = np.arange(-100, 100).reshape(1, 1, 200)
        made = [staircase(r, x_format, (None, 1, 200)) for r in (rows, moved)]
        for one, other in (
            (OP.reference(made[0], x), OP.reference(made[1], x)),
            (Runner(made[0])([x, rows]), Runner(made[1])([x, moved])),
        ):
            assert x[one != other].tolist() == [-52]


def network(path: Path) -> Path:
    """A convolution, a staircase of its sums by channel, another one for all channels, a Linear."""
    made = Sketch("staircases")
    conv = made.conv(made.input("x", (2, 4, 4)), weights((3, 2, 3, 3)), "conv")
    rows = np.sort(np.random.default_rng(1).integers(-9000, 9000, (3, 15)), axis=1)
    codes = made.codes(rows, "fixed<64,64,RND,SAT>", "t1")
    first = made.add("Thresholds", [conv, codes], "first", y_format="ufixed<4,4,RND,SAT>", start=0)
    signs = made.codes([[3, 9]], "fixed<64,64,RND,SAT>", "t2")
    second = made.add("Thresholds", [first, signs], "second", y_format="fixed<2,2,RND,SAT>", start=1, step=-1)
    flat = made.add("Reshape", [second], "flat", shape=(48,))
    made.output(made.linear(flat, weights((2, 48)), "fc"), "y")
    return made.write(path)


def test_a_file_is_exact_on_the_backends(tmp_path: Path, cc: object) -> None:
    path = network(tmp_path / "net.onnx")
    x = np.random.default_rng(0).normal(0, 3, (9, 2, 4, 4)).astype(np.float32)
    report = edgemat.verify(path, x, backends=("onnx", "mcu"))
    assert report.ok and report.overflow_proved, report.to_dict()
    found = inspect(path, "hls").to_dict()
    node = next(n for n in found["nodes"] if n["name"] == "first")
    assert (node["multiplies"], node["additions"], node["weight_bits"] > 0) == (0, 48 * 4, True)


def test_a_file_with_unsorted_thresholds_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    path = network(tmp_path / "net.onnx")
    model = onnx.load(path)
    stored = next(t for t in model.graph.initializer if t.name == "t1")
    rows = numpy_helper.to_array(stored).copy()
    rows[1, 3] = rows[1, 2] - 1
    stored.CopyFrom(numpy_helper.from_array(rows, stored.name))
    onnx.save(model, path)
    with pytest.raises(EdgematError, match="ascending"):
        read(path)
