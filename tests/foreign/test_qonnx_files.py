"""From a torch model to a QONNX file on the command line, and what the qonnx package makes of that file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgemat
from edgemat import cli
from edgemat.errors import EdgematError, LoweringError, UnsupportedOpError
from edgemat.nn import FixedQuantizer, QuantState

from .qonnx_executor import execute
from .test_qonnx_export import NETWORKS, real_feeds


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small convolutional network with batch norm, a residual add and average pooling."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            self.inner = nn.Conv2d(4, 4, 3, padding=1)
            self.pool = nn.AvgPool2d(4)
            self.head = nn.Linear(16, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            x = torch.relu(self.inner(x) + x)
            return self.head(self.pool(x).flatten(1))

    torch.manual_seed(0)
    model = edgemat.quantize(Net().eval(), edgemat.Recipe(weights="fixed<6>", activations="fixed<8>"))
    x = torch.rand(64, 2, 8, 8) * 2 - 1
    edgemat.calibrate(model, [x])
    path = tmp_path_factory.mktemp("lowered") / "net.onnx"
    edgemat.to_onnx(model.eval(), x[:1], path)
    return path


def run(*arguments: object) -> int | str | None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([str(argument) for argument in arguments])
    return leaving.value.code


def test_the_command_line_writes_what_the_library_does(
    lowered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = tmp_path / "command.onnx"
    assert not run("export", lowered, "--target", "qonnx", "-o", command, "--batch", 3)
    assert capsys.readouterr().out.strip() == str(command)
    library = edgemat.to_qonnx(lowered, tmp_path / "library.onnx", batch=3)
    through = edgemat.export(lowered, "qonnx", tmp_path / "through.onnx", batch=3)
    assert command.read_bytes() == library.read_bytes() == through.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["command.onnx", "library.onnx", "through.onnx"]


def test_the_file_is_exact_before_and_behind_cleanup(lowered: Path, tmp_path: Path) -> None:
    """As hls4ml and FINN begin: shapes inferred, constants folded, nodes renamed."""
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.util.cleanup import cleanup_model

    path = edgemat.to_qonnx(lowered, tmp_path / "net.qonnx.onnx", batch=100)
    x = np.random.default_rng(0).normal(0, 1, (100, 2, 8, 8)).astype(np.float32)
    wanted = edgemat.Simulator(lowered)(x)
    assert len(np.unique(wanted)) > 20
    model = onnx.load(path)
    onnx.checker.check_model(model)
    (name,) = [value.name for value in model.graph.input]
    (found,) = execute(model, {name: x}).values()
    assert (found == wanted).all()
    cleaned = cleanup_model(ModelWrapper(str(path))).model
    (name,) = [value.name for value in cleaned.graph.input]
    (found,) = execute(cleaned, {name: x}).values()
    assert (found == wanted).all()


def test_one_sample_by_default(lowered: Path, tmp_path: Path) -> None:
    model = onnx.load(edgemat.to_qonnx(lowered, tmp_path / "net.onnx"))
    assert [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim] == [1, 2, 8, 8]


def test_refusals_of_the_call(lowered: Path, tmp_path: Path) -> None:
    copy = tmp_path / "net.onnx"
    copy.write_bytes(lowered.read_bytes())
    with pytest.raises(EdgematError, match="would replace the model"):
        edgemat.to_qonnx(copy, copy)
    assert copy.read_bytes() == lowered.read_bytes()
    with pytest.raises(EdgematError, match="batch is 0, expected a number of samples of at least 1"):
        edgemat.to_qonnx(lowered, tmp_path / "y.onnx", batch=0)
    with pytest.raises(UnsupportedOpError, match="option 'io' is unknown to the target qonnx, which takes batch"):
        edgemat.export(lowered, "qonnx", tmp_path / "y.onnx", io="stream")
    with pytest.raises(LoweringError, match="cannot be read"):
        edgemat.to_qonnx(tmp_path / "nothing.onnx", tmp_path / "y.onnx")
    with pytest.raises(EdgematError, match="cannot be written"):
        edgemat.to_qonnx(lowered, copy / "y.onnx")
    assert run("export", lowered, "--target", "qonnx", "-o", tmp_path / "y.onnx", "--io", "stream") == 2
    assert run("export", lowered, "--target", "hls", "-o", tmp_path / "y", "--batch", 2) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["net.onnx"]


def test_a_model_with_states_is_refused(tmp_path: Path) -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantizer = FixedQuantizer("fixed<8,3>")
            self.state = QuantState((3,), "fixed<8,3>")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.state.write(self.quantizer(x) + self.state.read(x))

    path = tmp_path / "state.onnx"
    edgemat.to_onnx(Counter().eval(), torch.zeros(1, 3), path)
    with pytest.raises(UnsupportedOpError, match=r"keeps recurrent states \(state\).*export to hls or mcu"):
        edgemat.to_qonnx(path, tmp_path / "y.onnx")


@pytest.mark.parametrize("name", ["mlp", "binary"])
def test_what_was_exported_comes_back(name: str, tmp_path: Path) -> None:
    """The import knows nothing of the export: it compiles the file's float32 arithmetic."""
    graph = NETWORKS[name]()
    edgemat.to_qonnx(graph, tmp_path / "there.onnx")
    edgemat.import_onnx(tmp_path / "there.onnx", tmp_path / "back.onnx")
    x = real_feeds(graph, 300)[graph.input_names[0]]
    assert (edgemat.Simulator(tmp_path / "back.onnx")(x) == edgemat.Simulator(graph)(x)).all()
