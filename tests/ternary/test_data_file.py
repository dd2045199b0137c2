"""Weights in a data file: the same bits as in the model, nothing believed unread, nothing half-written."""

from __future__ import annotations

import copy
import hashlib
import importlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import edgemat
from edgemat import codes
from edgemat.errors import FormatError, LoweringError
from edgemat.lower import read
from edgemat.lower.data_file import DIGEST_KEY, SIZE_KEY
from edgemat.nn import QuantEmbedding, QuantLinear, TernaryLinear
from edgemat.sim import reference
from edgemat.sim.arrays import to_codes
from edgemat.sim.fused import fuse

# The package gives the function of this name, not the module.
nibble_linear = importlib.import_module("edgemat.sim.rewrites.nibble_linear")
ROWS = 40
EXAMPLE = (torch.zeros(1, dtype=torch.int64),)


class Net(nn.Module):
    """A table, trits with and without a scale of their own for each output, and 8-bit weights with a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = QuantEmbedding(ROWS, 48, "fixed<16>")
        self.first = TernaryLinear(48, 300, input="fixed<8,2>", output="fixed<8>")
        self.second = TernaryLinear(300, 64, ternary="b1.58", input=None, output="fixed<8,RND_CONV>")
        self.last = QuantLinear(64, 33, input=None)
        self.second.link(self.first.output_quantizer)
        self.last.link(self.second.output_quantizer)
        with torch.no_grad():  # ties: half the mean magnitude exactly, whose trit is 0
            self.first.weight[5] = torch.tensor([2.0, -2.0, 1.0, -1.0] * 12) / 64
            self.first.weight[5, :16] = torch.tensor([0.75, -0.75] * 8) / 64
            self.first.weight[6] = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.last(self.second(self.first(self.table(x))))
        return y


@pytest.fixture(scope="module")
def module() -> Net:
    made = Net()
    edgemat.calibrate(made, [torch.arange(ROWS)])
    return made.eval()


@pytest.fixture(scope="module")
def exported(module: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model twice: inside.onnx, and outside.onnx with its data file, written in small blocks."""
    folder = tmp_path_factory.mktemp("exported")
    edgemat.to_onnx(module, EXAMPLE, folder / "inside.onnx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codes, "BLOCK_ELEMENTS", 1000)
        edgemat.to_onnx(module, EXAMPLE, folder / "outside.onnx", external_data=True)
    return folder


@pytest.fixture
def copied(exported: Path, tmp_path: Path) -> Path:
    """A copy of outside.onnx and its data file, to be damaged."""
    for path in exported.glob("outside.onnx*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path / "outside.onnx"


def data_of(model: Path) -> Path:
    (found,) = model.parent.glob(f"{model.name}.*.data")
    return found


def stock(path: Path) -> np.ndarray:
    active = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(active.run(None, {active.get_inputs()[0].name: np.arange(ROWS, dtype=np.float32)})[0])


def test_the_same_codes_and_results(exported: Path, module: Net) -> None:
    inside, outside = read(exported / "inside.onnx"), read(exported / "outside.onnx")
    stored = [name for name in outside.constants if outside.constants.stored(name) is not None]
    assert len(stored) == 4 and not any(inside.constants.stored(name) is not None for name in inside.constants)
    assert {name: (c.dtype, c.tolist()) for name, c in inside.constants.items()} == {
        name: (c.dtype, c.tolist()) for name, c in outside.constants.items()
    }
    assert inside.tensors == outside.tensors
    x = np.arange(ROWS)
    wanted = module(torch.arange(ROWS)).detach().numpy()
    assert np.array_equal(edgemat.Simulator(inside)(x), wanted) and np.array_equal(
        edgemat.Simulator(outside)(x), wanted
    )
    assert np.array_equal(stock(exported / "inside.onnx"), wanted)
    assert np.array_equal(stock(exported / "outside.onnx"), wanted)
    found = [reference.run(graph, to_codes(graph, x, False))[graph.outputs[0]] for graph in (inside, outside)]
    assert np.array_equal(*found) and np.array_equal(found[0], edgemat.Simulator(outside).codes(x))
    traces = [edgemat.Simulator(graph).trace(x) for graph in (inside, outside)]
    assert all(np.array_equal(traces[0][name], traces[1][name]) for name in traces[0])


def test_the_simulator_takes_large_weights_from_a_file_that_is_gone(exported: Path) -> None:
    fused = fuse(read(exported / "outside.onnx"), from_codes=False)
    assert fused.weights is not None
    kinds = Counter(node.op_type for node in fused.model.graph)
    assert kinds["MatMulNBits"] == 2 and kinds["Gather"] == 1
    fused.weights.remove()
    assert not fused.weights.folder.exists()


def test_a_large_matrix_is_several_products(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No node holds much of the model; the outputs keep their order, which a control turns round."""
    graph, x = read(exported / "outside.onnx"), np.arange(ROWS)
    wanted = edgemat.Simulator(graph).codes(x)
    monkeypatch.setattr(nibble_linear, "PART", 1000)
    parts = list(nibble_linear.parts_of((300, 48)))
    assert len(parts) == 15 and parts[0] == (0, 20) and parts[-1] == (280, 300)
    assert list(nibble_linear.parts_of((3, 4000))) == [(0, 1), (1, 2), (2, 3)]
    fused = fuse(graph, from_codes=False)
    assert fused.weights is not None
    fused.weights.remove()
    assert Counter(node.op_type for node in fused.model.graph)["MatMulNBits"] == 15 + 16
    assert np.array_equal(edgemat.Simulator(graph).codes(x), wanted)
    parts_of = nibble_linear.parts_of
    monkeypatch.setattr(nibble_linear, "parts_of", lambda shape: reversed(list(parts_of(shape))))
    assert not np.array_equal(edgemat.Simulator(graph).codes(x), wanted)


def test_verify_holds_every_backend_to_it(exported: Path, module: Net) -> None:
    report = edgemat.verify(exported / "outside.onnx", samples=4, backends=["reference", "onnx"], module=module)
    assert report.ok


def stated(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def place(model: onnx.ModelProto, name: str) -> dict[str, str]:
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    return {entry.key: entry.value for entry in tensor.external_data}


def restate(path: Path, model: onnx.ModelProto, **values: str) -> None:
    """Writes a model with other metadata."""
    for entry in model.metadata_props:
        entry.value = values.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())


def test_a_changed_byte_is_noticed_and_matters(copied: Path) -> None:
    data, x = data_of(copied), np.arange(ROWS)
    before = edgemat.Simulator(copied)(x)
    model = onnx.load(copied, load_external_data=False)
    content = bytearray(data.read_bytes())
    begin = int(place(model, "second.weight_codes")["offset"])
    row = np.frombuffer(content, np.int8, 300, begin)
    changed = begin + int(np.flatnonzero(row[:-1] != row[1:])[0])
    # Two neighbours change places: sums and ranges of the row stay, so nothing but the digest and the results differ.
    content[changed], content[changed + 1] = content[changed + 1], content[changed]
    data.write_bytes(content)
    with pytest.raises(LoweringError, match="SHA-256 differs"):
        read(copied)
    restate(copied, model, **{DIGEST_KEY: hashlib.sha256(content).hexdigest()})
    after = edgemat.Simulator(copied)(x)
    assert not np.array_equal(before, after) and np.array_equal(after, stock(copied))


def refused(path: Path, words: str) -> None:
    with pytest.raises(LoweringError, match=words) as caught:
        edgemat.Simulator(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1200


def test_a_damaged_data_file_is_refused(copied: Path) -> None:
    data = data_of(copied)
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    refused(copied, f"has {len(content) - 1} bytes, expected {len(content)}")
    data.write_bytes(content + b"\0")
    refused(copied, "damaged or another model's")
    data.unlink()
    refused(copied, "cannot be read")
    data.mkdir()
    refused(copied, "cannot be read")


def test_a_place_outside_the_data_file_is_refused(copied: Path) -> None:
    good = copied.read_bytes()

    def changed(key: str, value: str, words: str, name: str = "second.weight_codes") -> None:
        model = onnx.ModelProto.FromString(good)
        (tensor,) = (t for t in model.graph.initializer if t.name == name)
        (entry,) = (e for e in tensor.external_data if e.key == key)
        entry.value = value
        copied.write_bytes(model.SerializeToString())
        refused(copied, words)

    size = data_of(copied).stat().st_size
    changed("offset", str(size - 10), "expected integer codes within")
    changed("offset", "-4096", "expected integer codes within|not a lowered")
    changed("offset", "0", "overlap")
    changed("length", "7", "expected integer codes within")
    changed("location", "../secret", "expected one file name")
    changed("location", str(data_of(copied)), "expected one file name")
    model = onnx.ModelProto.FromString(good)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = ".."
    copied.write_bytes(model.SerializeToString())
    refused(copied, "expected one file name")
    restate(copied, onnx.ModelProto.FromString(good), **{SIZE_KEY: "1"})
    refused(copied, "expected 1:")


def test_a_failed_export_leaves_an_earlier_one(copied: Path, module: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    def names() -> set[str]:
        return {path.name for path in copied.parent.iterdir()}

    before, wanted = names(), edgemat.Simulator(copied)(np.arange(ROWS))
    broken = copy.deepcopy(module)
    with torch.no_grad():
        broken.second.weight[0, 0] = float("nan")
    with pytest.raises(FormatError, match="NaN"):
        edgemat.to_onnx(broken, EXAMPLE, copied, external_data=True)
    assert names() == before
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.second.weight[0] = -other.second.weight[0]
    replace, calls = os.replace, []

    def fail_at_the_model(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_at_the_model)
    with pytest.raises(LoweringError, match="No space left"):
        edgemat.to_onnx(other, EXAMPLE, copied, external_data=True)
    assert names() == before and np.array_equal(edgemat.Simulator(copied)(np.arange(ROWS)), wanted)
    monkeypatch.undo()
    open_before = edgemat.Simulator(copied)
    edgemat.to_onnx(other, EXAMPLE, copied, external_data=True)
    assert len(names()) == 2 and names() != before
    assert not np.array_equal(edgemat.Simulator(copied)(np.arange(ROWS)), wanted)
    assert np.array_equal(open_before(np.arange(ROWS)), wanted)  # the file it opened is there as long as it needs it
    edgemat.to_onnx(module, EXAMPLE, copied)
    assert names() == {copied.name}


def test_row_sums_of_blocks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).integers(-128, 128, (37, 11), dtype=np.int8)
    monkeypatch.setattr(codes, "BLOCK_ELEMENTS", 60)
    held = codes.Codes(values.shape, values.dtype, lambda first, last: values[first:last])
    wide, found = values.astype(np.int64), held.survey
    assert np.array_equal(held.array(), wide) and held.array().dtype == np.int64 and len(list(held.blocks())) == 8
    assert (found.lo, found.hi) == (wide.min(), wide.max())
    assert np.array_equal(found.positive, np.maximum(wide, 0).sum(1))
    assert np.array_equal(found.negative, np.minimum(wide, 0).sum(1))
    assert found.pair == np.sort(abs(wide), axis=1)[:, -2:].sum(1).max()
    assert found.positive.dtype == np.int16
    part = held.part(5, 20)
    assert part.shape == (15, 11) and np.array_equal(part.array(), wide[5:20])


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ([32766, 1], np.int16),
        ([32767, 1], np.int32),
        ([-32767, -1], np.int16),
        ([-32768, -1], np.int32),
        ([2**31 - 2, 1], np.int32),
        ([2**31 - 1, 1], np.int64),
        ([-(2**31), -1], np.int64),
    ],
)
def test_row_sums_take_the_narrowest_type(row: list[int], kind: type) -> None:
    found = codes.Codes((1, 2), np.dtype(np.int32), lambda first, last: np.array([row], np.int32)).survey
    sums = found.positive if row[0] > 0 else found.negative
    assert sums.tolist() == [sum(row)] and sums.dtype == kind


def test_what_stays_in_its_file_is_never_widened(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither trits nor the table become eight bytes a code when a simulator opens; 8-bit weights do, and are seen."""
    widened, array = [], codes.Codes.array
    monkeypatch.setattr(codes.Codes, "array", lambda self: widened.append(self.shape) or array(self))
    simulator = edgemat.Simulator(exported / "outside.onnx")
    simulator(np.arange(ROWS))
    assert (33, 64) in widened
    assert not {(300, 48), (64, 300), (ROWS, 48)} & set(widened)
