"""Whole networks with widths and binary points by channel, and with signs: one file, the same integers everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

import edgemat
from edgemat import formats
from edgemat.errors import LoweringError
from edgemat.formats import Fixed
from edgemat.lower import read
from edgemat.lower.reader import read_bytes
from edgemat.sim.reference import trace
from edgemat.verification import backends as rooms
from edgemat.verification.corners import corner_codes
from edgemat.verification.isolated import isolated
from tests.core import oracle
from tests.core.channel_graphs import HIDDEN, MAP, NETWORKS, VECTOR, dense, maps, model_bytes, signs
from tests.core.graphs import Sketch, weights


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("channels")
    return {name: make().write(folder / f"{name}.onnx") for name, make in NETWORKS.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_backend_gives_the_same_integers(name, paths):
    for backend in ("hls", "mcu"):
        reason = rooms.make(backend, None).missing()
        if reason is not None:
            pytest.skip(reason)
    report = edgemat.verify(paths[name], samples=40)
    assert report.ok and report.overflow_proved, report.to_dict()
    assert {row.status for row in report.backends.values()} == {"exact"}
    assert set(report.backends) >= {"onnx", "hls", "mcu"}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_node_is_what_fractions_say(name, paths):
    graph = read(paths[name])
    codes = {key: array[:6] for key, array in corner_codes(graph)[0].items()}
    known = trace(graph, codes)
    for call in graph.nodes:
        feed = [call.constant(i) if call.constant(i) is not None else known[key] for i, key in enumerate(call.inputs)]
        expected = oracle.codes(call, *feed)
        assert (known[call.outputs[0]] == expected).all(), call
        assert formats.holds_codes(expected, call.y[0].format)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_simulator_from_values_and_from_codes(name, paths):
    graph = read(paths[name])
    simulator = edgemat.Simulator(paths[name])
    codes = corner_codes(graph)[0]
    tensor = graph.input_type(0)
    found = simulator(codes[tensor.name], codes=True)
    values = formats.dequantize(codes[tensor.name], tensor.format)
    again = simulator.codes(values)
    expected = trace(graph, codes)
    for name_out, tensor_out in zip(graph.output_names, graph.outputs, strict=True):
        assert (found[name_out] == expected[tensor_out]).all()
        assert (again[name_out] == expected[tensor_out]).all()
    wrong = codes[tensor.name].copy()
    wrong[0, 0] = 0 if tensor.format.bipolar else tensor.format.rails[1] + 1
    with pytest.raises(edgemat.EdgematError, match="codes"):
        simulator(wrong, codes=True)
    if tensor.format.widths is not None:
        wrong = codes[tensor.name].copy()
        wrong[:, tensor.format.widths.index(0)] = 1
        with pytest.raises(edgemat.EdgematError, match="codes of each channel"):
            simulator(wrong, codes=True)


def test_corners_drive_sums_of_channels_to_both_ends(paths):
    """Every sum of the three networks, alone, meets both ends of its proved interval."""
    for path in paths.values():
        graph = read(path)
        taken = [isolated(graph)] if isolated(graph) is not None else []
        alone = [(g, c) for g, c in taken] + [(graph, corner_codes(graph)[0])]
        for part, codes in alone:
            known = trace(part, codes)
            for call in part.nodes:
                if call.op.name not in ("Linear", "Conv") or call.inputs[0] not in codes:
                    continue
                exact = call.op.compute(call, codes[call.inputs[0]])
                assert (int(exact.min()), int(exact.max())) == call.bounds.final, call
                assert known[call.outputs[0]] is not None


def test_weights_are_aligned_by_input_channel_and_pruned_ones_left_out(paths):
    graph = read(paths["dense"])
    call = next(node for node in graph.nodes if node.name == "fc1")
    w, _ = call.op.aligned(call)
    fmt = Fixed.parse(VECTOR)
    for c, (width, frac) in enumerate(zip(fmt.widths, fmt.fracs, strict=True)):
        shift = fmt.finest - frac
        assert (w[:, c] == (call.constants[1][:, c] << shift if width else 0)).all()
    assert call.exact[0].format.fracs == tuple(f + fmt.finest for f in Fixed.parse(call.attrs["w_format"]).fracs)
    # The bound follows from each feature's own rails: tighter than from the widest one's.
    plain = replace(call.x[0], format=Fixed(8, 0).with_frac(fmt.fracs))
    loose = type(call)(call.op, "loose", (plain, call.x[1]), dict(call.attrs), dict(call.constants))
    assert call.bounds.magnitude < loose.bounds.magnitude / 4


RIGHT = "fixed<[4,0,6,3,2,5],[2,1,3,2,1,3],RND,SAT>"
CHANGED = [
    "fixed<[5,0,6,3,2,5],[3,1,3,2,1,3],RND,SAT>",  # one channel a bit wider
    "fixed<[4,3,6,3,2,5],[2,3,3,2,1,3],RND,SAT>",  # a pruned channel revived
    "fixed<[4,0,6,3,2,5],[2,1,3,3,1,3],RND,SAT>",  # one channel's binary point moved
    "fixed<[4,0,6,3,2,5],[2,1,3,2,1,3],RND_CONV,SAT>",
    "fixed<[4,0,6,3,2,5],[2,1,3,2,1,3],RND,SAT_SYM>",
]


def requantized(formats_by_output: list[str]) -> Sketch:
    """One sum, requantised to a format for each output, and once to signs (or, changed, to -1, 0 and +1)."""
    made = Sketch("formats")
    x = made.input("x", (5,))
    for index, fmt in enumerate(formats_by_output):
        total = made.linear(x, weights((6, 5)), f"fc{index}")
        made.output(made.requantize(total, fmt, f"rq{index}"), f"y{index}")
    return made


@pytest.mark.parametrize("name", ["onnx", "mcu"])  # HLS: tests/hls/test_channels.py
def test_control_one_bit_of_one_channel_shows_in_every_backend(name):
    """A width, a pruned channel, a binary point, a mode, a sign of 0: each of them changed alone gives other codes."""
    reason = rooms.make(name, None).missing()
    if reason is not None:
        pytest.skip(reason)
    right = read_bytes(model_bytes(requantized([*[RIGHT] * len(CHANGED), "bipolar"])))
    wrong = read_bytes(model_bytes(requantized([*CHANGED, "fixed<2,2,TRN,SAT_SYM>"])))
    codes, _ = corner_codes(right)
    drawn = np.random.default_rng(0).integers(-128, 127, (2000, 5), np.int64, endpoint=True)
    codes = {key: np.concatenate([array, drawn]) for key, array in codes.items()}
    expected = trace(right, codes)
    equal = rooms.make(name, None).run(right, codes, None)
    other = rooms.make(name, None).run(wrong, codes, None)
    for mine, theirs in zip(right.outputs, wrong.outputs, strict=True):
        assert (equal[mine] == expected[mine]).all()
        assert (other[theirs] != expected[mine]).any(), theirs


def tampered(made: Sketch, old: str, new: str, words: str) -> None:
    """Replaces a format everywhere in a file; reading must fail."""
    proto = onnx.ModelProto()
    proto.ParseFromString(model_bytes(made))
    count = 0
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.s == old.encode():
                attribute.s, count = new.encode(), count + 1
    assert count
    with pytest.raises(LoweringError, match=words):
        read_bytes(proto.SerializeToString())


def test_a_file_whose_widths_were_changed_is_refused():
    tampered(dense(), VECTOR, VECTOR.replace("[6,3,0", "[6,3,1"), "graph implies|do not fit|fractional")
    tampered(dense(), HIDDEN, HIDDEN.replace("[4,0,", "[5,0,"), "graph implies|changed after|fractional")
    tampered(maps(), MAP, "fixed<[6,0],[2,3],RND_CONV,SAT>", "binary points")
    tampered(signs(), "bipolar", "fixed<2,2,TRN,SAT>", "graph implies|changed after|do not fit|formats")


def test_weights_outside_their_channel_are_refused():
    made = Sketch("n")
    x = made.input("x", (2,))
    with pytest.raises(LoweringError, match="do not fit"):
        made.linear(x, [[3, 3], [1, 4]], "fc", "fixed<[3,1],[1,1],RND,SAT>")
    with pytest.raises(LoweringError, match="do not fit"):
        made.linear(x, [[1, 0], [1, -1]], "fc", "bipolar")
    with pytest.raises(LoweringError, match=r"62|bits apart"):
        far = made.input("far", (2,), "fixed<[4,4],[100,-100],RND,SAT>")
        made.linear(far, [[3, 3]], "wide")


def test_a_requantize_by_channel_stays_behind_a_sum_in_another_order(tmp_path):
    """Linear over rank 3 has its outputs on the last axis; formats on axis 1 are no epilogue of it."""
    made = Sketch("rows")
    x = made.input("x", (4, 5))
    rows = made.linear(x, weights((3, 5)), "fc")
    made.output(made.requantize(rows, "fixed<[8,3,0,5],[5,6,1,2],RND,SAT>", "rq"), "y")
    path = made.write(tmp_path / "rows.onnx")
    assert [node.op.name for node in read(path).nodes] == ["Linear", "Requantize"]
    report = edgemat.verify(path, samples=20)
    assert report.ok and not any(row.status == "differs" for row in report.backends.values())
