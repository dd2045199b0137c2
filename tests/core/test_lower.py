"""Lowering: each pass changes what it says and no result; torch modules become files that compute the same bits."""

from __future__ import annotations

import copy
import hashlib
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.body import DOMAIN
from edgemat.errors import EdgematError, FormatError, LoweringError
from edgemat.lower import passes, read, writer
from edgemat.lower.passes.absorb_relu import AbsorbRelu
from edgemat.lower.passes.align_operands import AlignOperands
from edgemat.lower.passes.drop_dead import DropDead
from edgemat.lower.passes.drop_identity import DropIdentity
from edgemat.lower.passes.fuse_requantize import FuseRequantize
from edgemat.lower.passes.surgery import make_node
from edgemat.lower.typing import type_node
from tests.core.graphs import Sketch, residual, weights


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def outputs(model: ir.Model, *xs: np.ndarray) -> list[np.ndarray]:
    """What onnxruntime computes of a finished copy of the model."""
    proto = ir.to_proto(finished(model))
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: x for i, x in zip(session.get_inputs(), xs, strict=True)})


def finished(model: ir.Model) -> ir.Model:
    made = ir.from_proto(ir.to_proto(model))
    writer.finish(made)
    return made


def samples(*shape: int, seed: int = 0) -> np.ndarray:
    """Real inputs that reach both rails and ties of fixed<8,3>."""
    x = np.random.default_rng(seed).normal(0, 2, shape).astype(np.float32)
    x.flat[:4] = [100, -100, 1 / 64, -1 / 64]
    return x


def fires(model: ir.Model, make: type, *xs: np.ndarray) -> bool:
    """Runs one pass; nothing it does may change a result."""
    before = outputs(model, *xs)
    modified = bool(make()(model).modified)
    after = outputs(model, *xs)
    assert all((a == b).all() and a.dtype == b.dtype for a, b in zip(before, after, strict=True))
    assert not make()(model).modified, "a second run finds nothing"
    return modified


def test_fuse_requantize_where_it_is_the_only_reader() -> None:
    model = residual().model()
    assert fires(model, FuseRequantize, samples(5, 2, 6, 6))
    assert ops(model).count("Requantize") == 0
    fused = {n.name: n.attributes["requantize"].value for n in model.graph if "requantize" in n.attributes}
    assert set(fused) == {"relu1", "conv2", "add"}


def test_fuse_requantize_leaves_a_shared_accumulator() -> None:
    """Two readers of one exact result: each keeps its own Requantize."""
    made = Sketch()
    acc = made.linear(made.input("x", (4,)), weights((3, 4)), "fc")
    made.output(made.requantize(acc, "fixed<6,4,RND,SAT>", "a"), "y1")
    made.output(made.requantize(acc, "fixed<6,4,TRN,WRAP>", "b"), "y2")
    model = made.model()
    assert not fires(model, FuseRequantize, samples(6, 4))
    assert ops(model).count("Requantize") == 2


def test_fuse_requantize_does_not_fuse_twice() -> None:
    """Two roundings in a row are two roundings."""
    made = Sketch()
    acc = made.linear(made.input("x", (4,)), weights((3, 4)), "fc")
    made.output(made.requantize(made.requantize(acc, "fixed<8,4,RND,SAT>", "a"), "fixed<5,4,RND,SAT>", "b"), "y")
    model = made.model()
    assert fires(model, FuseRequantize, samples(64, 4))
    assert ops(model) == ["Quantize", "Linear", "Requantize", "Dequantize"]


def test_absorb_relu_before_an_unsigned_requantize() -> None:
    model = residual().model()
    assert fires(model, AbsorbRelu, samples(5, 2, 6, 6))
    assert "Relu" not in ops(model)


@pytest.mark.parametrize("target", ["fixed<6,4,RND,SAT>", "ufixed<6,4,RND,WRAP>", "ufixed<6,4,RND,SAT_ZERO>"])
def test_absorb_relu_keeps_a_relu_that_matters(target: str) -> None:
    made = Sketch()
    relu = made.add("Relu", [made.linear(made.input("x", (4,)), weights((3, 4)), "fc")], "relu")
    made.output(made.requantize(relu, target, "rq"), "y")
    model = made.model()
    fired = fires(model, AbsorbRelu, samples(9, 4))
    assert ("Relu" in ops(model)) is not fired
    assert not fired or target.endswith("SAT_ZERO>")


def test_drop_identity() -> None:
    made = Sketch()
    x = made.input("x", (2, 3))
    same = made.requantize(x, "fixed<8,3,RND,SAT>", "same")
    reshaped = made.add("Reshape", [same], "reshape", shape=(2, 3))
    turned = made.add("Transpose", [reshaped], "transpose", perm=(0, 1))
    made.output(made.add("Relu", [turned], "relu"), "y")
    model = made.model()
    assert fires(model, DropIdentity, samples(5, 2, 3))
    assert ops(model) == ["Quantize", "Relu", "Dequantize"]


def test_drop_identity_keeps_what_changes_something() -> None:
    made = Sketch()
    x = made.input("x", (2, 2))
    finer = made.requantize(x, "fixed<9,3,RND,SAT>", "finer")
    turned = made.add("Transpose", [finer], "transpose", perm=(1, 0))
    narrower = made.requantize(turned, "fixed<8,2,RND,SAT>", "narrower")
    made.output(made.add("Relu", [narrower], "relu"), "y")
    model = made.model()
    assert not fires(model, DropIdentity, samples(5, 2, 2))


def test_drop_dead() -> None:
    made = Sketch()
    x = made.input("x", (4,))
    made.linear(made.add("Relu", [x], "unused"), weights((3, 4)), "fc")
    made.output(made.add("Relu", [x], "used"), "y")
    model = made.model()
    assert fires(model, DropDead, samples(3, 4))
    assert ops(model) == ["Quantize", "Relu", "Dequantize"] and not model.graph.initializers


def test_align_operands_by_shifting_left_only() -> None:
    """A Concat of two formats: both come to the finest grid and lose nothing."""
    made = Sketch()
    a, b = made.input("a", (3,), "fixed<8,3,RND,SAT>"), made.input("b", (3,), "ufixed<6,4,RND,SAT>")
    node = make_node("Concat", [a, a], {"axis": 0}, "concat")
    made.imp.graph.append(node)
    type_node(node)
    made.output(node.outputs[0], "y")
    node.replace_input_with(1, b)
    model = made.model()
    assert AlignOperands()(model).modified and not AlignOperands()(model).modified
    (concat,) = [n for n in model.graph if n.op_type == "Concat"]
    assert {str(v.meta["edgemat"].format) for v in concat.inputs} == {"fixed<10,5,RND,SAT>"}
    xs = samples(5, 3), np.abs(samples(5, 3, seed=1))
    (found,) = outputs(model, *xs)
    exact = [np.clip(np.floor(xs[0] * 32 + 0.5), -128, 127) / 32, np.clip(np.floor(xs[1] * 4 + 0.5), 0, 63) / 4]
    assert (found == np.concatenate(exact, 1)).all()


def test_all_passes_together_change_no_result() -> None:
    model = residual().model()
    before = outputs(model, samples(20, 2, 6, 6))
    count = len(ops(model))
    passes.simplify(model)
    assert len(ops(model)) < count
    assert (outputs(model, samples(20, 2, 6, 6))[0] == before[0]).all()


# -- from torch ---------------------------------------------------------------------------------------------------
class Branches(nn.Module):
    """Two inputs, a shortcut, a concat, three outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(3, 8)
        self.head = nn.Linear(8 + 4, 5)

    def forward(self, image, extra):  # type: ignore[no-untyped-def]
        x = F.relu(self.a(image))
        x = F.relu(x + self.bn(self.b(x)))
        pooled = x.mean((2, 3))
        joined = torch.cat([pooled, F.relu(self.fc(extra))], 1)
        return self.head(joined), pooled, torch.argmax(joined, 1)


SHAPES = ((2, 7, 5), (3,))


@pytest.fixture(scope="module")
def branches() -> nn.Module:
    torch.manual_seed(0)
    recipe = edgemat.Recipe(input="fixed<8,3>", weights="fixed<6>", activations="fixed<7>")
    module = edgemat.quantize(Branches(), recipe)
    edgemat.calibrate(module, [tuple(torch.randn(16, *shape) for shape in SHAPES)])
    return module.eval()


@pytest.fixture(scope="module")
def branches_file(branches: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lower") / "branches.onnx"
    edgemat.to_onnx(branches, tuple(torch.randn(1, *shape) for shape in SHAPES), path)
    return path


@pytest.mark.parametrize("batch", [1, 2, 33])
def test_a_branching_network_on_any_batch(branches: nn.Module, branches_file: Path, batch: int) -> None:
    """torch eval, onnxruntime and the numpy reference, for batches the example did not have."""
    xs = [torch.from_numpy(samples(batch, *shape, seed=batch)) for shape in SHAPES]
    with torch.no_grad():
        expected = branches(*xs)
    session = ort.InferenceSession(branches_file)
    found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), xs, strict=True)})
    simulated = edgemat.Simulator(branches_file)(
        {i.name: x.numpy() for i, x in zip(session.get_inputs(), xs, strict=True)}
    )
    assert len(found) == len(expected) == 3 and len(simulated) == 3
    for a, b, c in zip(found, expected, simulated.values(), strict=True):
        assert a.shape == tuple(b.shape) and (a == b.numpy()).all() and (a == c).all()


def test_the_control_a_changed_weight_is_seen(branches: nn.Module, branches_file: Path) -> None:
    """One weight of torch moved by an LSB: the results are no longer equal."""
    changed = copy.deepcopy(branches)
    with torch.no_grad():
        changed.get_parameter("head.weight")[0] += 0.25
    xs = [torch.from_numpy(samples(33, *shape)) for shape in SHAPES]
    session = ort.InferenceSession(branches_file)
    found = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), xs, strict=True)})
    with torch.no_grad():
        assert (changed(*xs)[0].numpy() != found[0]).any()


def test_every_node_states_formats_and_ranges(branches_file: Path) -> None:
    model = onnx.load(branches_file)
    onnx.checker.check_model(model)
    assert {p.key: p.value for p in model.metadata_props} == {writer.VERSION_KEY: writer.FORMAT_VERSION}
    for node in model.graph.node:
        attrs = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert node.domain == DOMAIN and len(attrs["x_formats"]) == len(node.input)
        assert len(attrs["y_formats"]) == len(node.output) and len(attrs["y_ranges"]) == 2 * len(node.output)
    graph = read(branches_file)
    for call in graph.nodes:
        for tensor in call.y:
            low, high = tensor.format.rails
            assert low <= tensor.lo <= tensor.hi <= high


def test_two_exports_give_the_same_bytes(branches: nn.Module, branches_file: Path, tmp_path: Path) -> None:
    edgemat.to_onnx(branches, tuple(torch.randn(9, *shape) for shape in SHAPES), tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == branches_file.read_bytes()


def test_the_module_is_untouched_and_its_mode_restored(branches: nn.Module, tmp_path: Path) -> None:
    module = copy.deepcopy(branches)
    module.train()
    module.get_submodule("fc").eval()
    modes = {name: part.training for name, part in module.named_modules()}

    def fingerprint() -> str:
        state = b"".join(k.encode() + v.numpy().tobytes() for k, v in module.state_dict().items())
        return hashlib.sha256(state).hexdigest()

    before = fingerprint()
    edgemat.to_onnx(module, tuple(torch.randn(2, *shape) for shape in SHAPES), tmp_path / "net.onnx")
    assert {name: part.training for name, part in module.named_modules()} == modes
    assert fingerprint() == before
    assert all(p.requires_grad for p in module.parameters())


def test_inputs_by_name_and_a_model_name(branches: nn.Module, branches_file: Path, tmp_path: Path) -> None:
    example = {"image": torch.randn(1, *SHAPES[0]), "extra": torch.randn(1, *SHAPES[1])}
    edgemat.to_onnx(branches, example, tmp_path / "named.onnx", name='my "net"; rm -rf')
    graph = read(tmp_path / "named.onnx")
    assert graph.name == "my__net___rm__rf" and graph.input_names == ["image", "extra"]


# -- refusals ------------------------------------------------------------------------------------------------------
def quantized(model: nn.Module, shape: tuple[int, ...], **recipe: object) -> nn.Module:
    options = {"input": "fixed<8,3>", "weights": "fixed<6>", "activations": "fixed<6>", **recipe}
    module = edgemat.quantize(model, edgemat.Recipe(**options))  # type: ignore[arg-type]
    edgemat.calibrate(module, [torch.randn(8, *shape)])
    return module


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers(value: float, tmp_path: Path) -> None:
    module = quantized(nn.Sequential(nn.Linear(4, 3)), (4,))
    with torch.no_grad():
        next(p for n, p in module.named_parameters() if n.endswith("weight")).view(-1)[1] = value
    with pytest.raises(FormatError, match=r"weight.*NaN or infinities"):
        edgemat.to_onnx(module, torch.randn(1, 4), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(0, 4), (1, 0), ()])
def test_zero_size_axes(shape: tuple[int, ...], tmp_path: Path) -> None:
    module = quantized(nn.Sequential(nn.Linear(4, 3)), (4,))
    with pytest.raises(LoweringError, match="expected"):
        edgemat.to_onnx(module, torch.zeros(shape), tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_a_float_layer_is_named(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = edgemat.nn.FixedQuantizer("fixed<8,3>")

        def forward(self, x):  # type: ignore[no-untyped-def]
            return torch.erfinv(self.q(x))

    with pytest.raises(EdgematError, match=r"(?i)erf|no exact integer form|trace"):
        edgemat.to_onnx(Mixed(), torch.randn(2, 4), tmp_path / "net.onnx")


def test_an_accumulator_of_more_than_64_bits() -> None:
    made = Sketch()
    x = made.input("x", (4,), "fixed<40,3,RND,SAT>")
    with pytest.raises(EdgematError, match="at most 64"):
        made.linear(x, weights((2, 4), bound=2**30), "fc", fmt="fixed<32,1,RND,SAT>")


# -- files ----------------------------------------------------------------------------------------------------------
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel refuses to write beyond 1,000 bytes, in a process of its own."""
    target = tmp_path / "out" / "net.onnx"
    residual().write(tmp_path / "whole.onnx")
    program = (
        "import resource, signal, sys\n"
        "from tests.core.graphs import residual\n"
        "from edgemat.errors import EdgematError\n"
        "from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "made = residual()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    made.write(Path(sys.argv[1]))\n"
        "except EdgematError as error:\n"
        "    print(error)\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "cannot be written" in done.stdout and len(done.stdout.splitlines()) == 1
    assert not list(target.parent.iterdir())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_ctrl_c_half_way_leaves_the_old_file(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = residual().write(tmp_path / "net.onnx")
    before = path.read_bytes()

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    model = Sketch("other")
    model.output(model.add("Relu", [model.input("x", (4,))], "relu"), "y")
    made = model.finished()
    if moment == "write":
        monkeypatch.setattr(os, "fdopen", interrupt)
    else:
        monkeypatch.setattr(os, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        writer.write(made, path)
    monkeypatch.undo()
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize("place", ["file/net.onnx", "folder"])
def test_a_place_that_cannot_be_written(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgematError, match="cannot be written"):
        residual().write(tmp_path / place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("pads", [0, 1])
def test_padding_stays_apart_from_max_pooling(tmp_path, pads):
    """onnxruntime fuses a zero Pad into MaxPool, whose own padding is the lowest number; the file must not let it."""

    class Padded(nn.Module):
        def forward(self, x):
            return F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 2, stride=1, padding=pads)

    module = edgemat.quantize(Padded(), edgemat.Recipe(input="fixed<8,1>"))
    x = -torch.rand(4, 2, 3, 3)
    edgemat.calibrate(module, [x])
    edgemat.to_onnx(module.eval(), x, tmp_path / "padded.onnx")
    session = ort.InferenceSession(tmp_path / "padded.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert (found == module(x).numpy()).all()
    assert edgemat.verify(tmp_path / "padded.onnx", x.numpy(), backends=("onnx",), module=module).ok


def test_padding_keeps_its_axes_where_onnxruntime_moves_a_transpose_past_it(tmp_path):
    """It permutes the pads of a Pad as if they named every axis: those of three axes of four were out of bounds."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.inner = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
            self.pad, self.down = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(16, 32, 3, stride=2)
            self.end, self.skip = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(16, 32, 1, stride=2)
            self.pool, self.head = nn.AvgPool2d(4), nn.Linear(32, 4)

        def forward(self, x):
            x = torch.relu(self.stem(x))
            x = torch.relu(self.inner(x) + x)
            x = torch.relu(self.skip(x) + self.end(torch.relu(self.down(self.pad(x)))))
            return self.head(self.pool(x).permute(0, 2, 3, 1).flatten(1))

    torch.manual_seed(0)
    module = edgemat.calibrate(edgemat.quantize(Padded()), [torch.randn(4, 3, 8, 8)])
    edgemat.to_onnx(module.eval(), torch.zeros(1, 3, 8, 8), tmp_path / "padded.onnx")
    assert edgemat.verify(tmp_path / "padded.onnx", samples=2, backends=("onnx",)).ok


def test_inputs_by_name_may_come_in_any_order(tmp_path):
    class Sum(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 3), torch.nn.Linear(2, 3)

        def forward(self, left, right):
            return self.a(left) + self.b(right)

    left, right = torch.randn(8, 4), torch.randn(8, 2)
    q = edgemat.calibrate(edgemat.quantize(Sum()), [(left, right)])
    for name, example in (("a", {"left": left, "right": right}), ("b", {"right": right, "left": left})):
        edgemat.to_onnx(q, example, tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
