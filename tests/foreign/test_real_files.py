"""Every third-party file of ``EDGEMAT_DATA`` through the import, against the file as it came; what is refused, and why.

The quick form compares the Simulator with the file on some samples, and the backends on few; the slow one runs every
backend on each file. `docs/foreign.md` has the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

import edgemat
from edgemat.errors import LoweringError
from edgemat.foreign.report import ImportReport

from .real_files import (
    by_onnxruntime,
    by_qonnx,
    dory_text,
    inputs_of,
    met,
    stored_tensor,
    traced,
    unpacked,
    with_batch,
    without_tail,
)

ALL = ("reference", "onnx", "mcu", "hls")
DORY, DEEPLOY = "dory:Nemo_examples", "deeploy:"


@dataclass(frozen=True)
class Real:
    """A file that comes in.

    Attributes:
        path: Below ``EDGEMAT_DATA``, or below an archive ("deeploy:", "dory:").
        format: What its inputs are said to be; empty where the file quantises them itself.
        small: Shape of a smaller input on which the backends are compared, where a convolutional network takes one.
    """

    path: str
    format: str = ""
    small: tuple[int, ...] = ()


TFC_1, TFC_2 = Real("qonnx_zoo/TFC_1W1A.onnx", "ufixed<8,0>"), Real("qonnx_zoo/TFC_2W2A.onnx", "ufixed<8,0>")
JETS = Real("qonnx_zoo/qkeras_jettagging.onnx", "fixed<16,6>")
ESPCN = Real("qonnx_testdata/bsd300x3-espcn/nn_resize/quant_model.onnx", "", (1, 3, 12, 12))
BRANCHED = Real("hls4ml_example_models/branched_model_ch_last.onnx", "", (1, 12, 12, 3))
RESNET = Real("mlperf_qdq_onnx/resnet.onnx")
TCN = Real(f"{DORY}/8-bits-1D/TCN_T/TCN.onnx", "ufixed<8,8>")
RESIDUAL = Real(f"{DORY}/8-bits-2D/Residual_connection_test_1/model_int.onnx", "ufixed<8,8>")
DSCNN = Real(f"{DORY}/8-bits-2D/dscnn_test/model_int.onnx", "ufixed<8,8>")
CNN = Real(f"{DEEPLOY}Models/CNN_Linear1/network.onnx", "fixed<8,8>")
KERNELS = [
    Real(f"{DEEPLOY}Kernels/Integer/{name}/network.onnx", "fixed<8,8>")
    for name in (
        "Add/Large",
        "Add/MultIO",
        "Add/Regular",
        "Add/Regular_RQ",
        "MatMul/Batch",
        "MatMul/Regular",
        "MatMul/Regular_RQ",
        "MaxPool/Regular_1D",
        "MaxPool/Regular_2D",
        "Pad/Regular_1D",
        "Pad/Regular_2D",
        "ReduceMean",
    )
]
TAKEN = [TFC_1, TFC_2, JETS, ESPCN, BRANCHED, RESNET, TCN, RESIDUAL, DSCNN, CNN, *KERNELS]


def name_of(file: Real) -> str:
    parts = [part for part in file.path.split("/") if part not in ("network.onnx", "model_int.onnx", "Kernels")]
    return "-".join(parts[-2:]).removesuffix(".onnx")


class Files:
    """The files and what the import made of them, once each."""

    def __init__(self, data: Path, folder: Path) -> None:
        self._data, self._folder = data, folder
        self._archives: dict[str, Path] = {}
        self._made: dict[str, tuple[Path, ImportReport]] = {}

    def path(self, place: str) -> Path:
        archive, colon, rest = place.partition(":")
        if not colon:
            return self._data / place
        if archive not in self._archives:
            stored = {"dory": "dory_examples", "deeploy": "deeploy_tests"}[archive]
            self._archives[archive] = unpacked(self._data / stored / f"{stored}.zip", self._folder / archive)
        return self._archives[archive] / rest

    def model(self, file: Real) -> onnx.ModelProto:
        return onnx.load(self.path(file.path))

    def imported(self, file: Real) -> tuple[Path, ImportReport]:
        if file.path not in self._made:
            names = [value.name for value in inputs_of(self.model(file))] if file.format else []
            made = self._folder / f"{len(self._made)}.onnx"
            report = edgemat.import_onnx(self.path(file.path), made, inputs=dict.fromkeys(names, file.format))
            self._made[file.path] = made, report
        return self._made[file.path]

    def compact(self, file: Real) -> Path:
        """The lowered file for the backends: of the smaller input, if there is one."""
        if not file.small:
            return self.imported(file)[0]
        model = self.model(file)
        for dim, size in zip(inputs_of(model)[0].type.tensor_type.shape.dim, file.small, strict=True):
            dim.dim_value = size
        del model.graph.value_info[:]
        onnx.save(model, self._folder / "small.onnx")
        edgemat.import_onnx(self._folder / "small.onnx", self._folder / "small_net.onnx")
        return self._folder / "small_net.onnx"

    def simulated(self, file: Real, *x: np.ndarray) -> np.ndarray:
        """The first output of the Simulator."""
        path = self.imported(file)[0]
        names = [value.name for value in inputs_of(self.model(file))]
        found = edgemat.Simulator(path)(dict(zip(names, x, strict=True)))
        return next(iter(found.values())) if isinstance(found, dict) else np.asarray(found)


@pytest.fixture(scope="module")
def files(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(data_dir, tmp_path_factory.mktemp("real"))


@pytest.fixture(scope="module")
def digits(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """50 digits of MNIST's test set as values b / 256, and their labels."""
    with np.load(data_dir / "mnist" / "mnist.npz") as stored:
        return (stored["x_test"][:50, None] / np.float32(256)).astype(np.float32), stored["y_test"][:50]


@pytest.fixture(scope="module")
def images(data_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The 284 lossless test images of CIFAR-10 as bytes, [N, 32, 32, 3], and their labels."""
    with np.load(data_dir / "cifar10_raw" / "cifar10_raw.npz") as stored:
        return stored["x"], stored["y"]


@pytest.mark.parametrize("file", [file for file in TAKEN if file not in (DSCNN, RESIDUAL)], ids=name_of)
def test_every_node_is_taken_exactly(file: Real, files: Files) -> None:
    _, report = files.imported(file)
    assert report.rows and not report.refused and not report.inexact


# -- QONNX ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [TFC_1, TFC_2], ids=name_of)
def test_digits_are_read_as_by_qonnx(file: Real, files: Files, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """One real scale for each class behind the last sums: equal up to the rounding that the report prints."""
    x, labels = digits
    wanted, found = by_qonnx(files.model(file), x), files.simulated(file, x)
    (note,) = files.imported(file)[1].notes
    printed = float(note.split("at most ")[1].split(" off")[0])
    assert np.abs(found - wanted).max() <= printed + 2e-7 * np.abs(wanted).max()
    assert np.array_equal(found.argmax(1), wanted.argmax(1))
    assert (found.argmax(1) == labels).mean() > 0.9


def test_jets_are_tagged_as_by_qonnx(files: Files) -> None:
    x = np.round(np.random.default_rng(0).normal(0, 2, (200, 16)) * 1024) / 1024
    wanted = by_qonnx(without_tail(files.model(JETS), "Softmax"), x.astype(np.float32))
    assert np.array_equal(files.simulated(JETS, x.astype(np.float32)), wanted)
    assert len(np.unique(wanted.argmax(1))) > 1


def test_channels_last_branches(files: Files) -> None:
    """Powers of two throughout: equal to the last bit."""
    x = np.random.default_rng(0).normal(0, 0.3, (1, 256, 256, 3)).astype(np.float32)
    wanted = by_qonnx(files.model(BRANCHED), x)
    assert np.array_equal(files.simulated(BRANCHED, x), wanted)
    assert len(np.unique(wanted)) > 10


def test_super_resolution(files: Files) -> None:
    """Real scales: qonnx adds float32 products, whose sum is not exact; few numbers come out one step off."""
    x = stored_tensor(files.path("qonnx_testdata/bsd300x3-espcn/test_data/input_0.pb"))
    wanted, found = by_qonnx(files.model(ESPCN), x), files.simulated(ESPCN, x)
    step = 0.003921568859368563
    differ = np.abs(found - wanted) > step / 2
    assert differ.mean() < 1e-3 and np.abs(found - wanted).max() < 1.5 * step
    assert len(np.unique(found)) > 100


# -- QDQ --------------------------------------------------------------------------------------------------------------
def test_images_are_classified_as_by_onnxruntime(files: Files, images: tuple[np.ndarray, np.ndarray]) -> None:
    """onnxruntime runs six of the nine convolutions in float32: some outputs come out one step off."""
    model = files.model(RESNET)
    value = inputs_of(model)[0]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    x = images[0][:16].astype(np.float32)
    x = x.transpose(0, 3, 1, 2) if shape[1] == 3 else x
    wanted = np.concatenate([by_onnxruntime(without_tail(model, "Softmax"), one[None]) for one in x])
    found = files.simulated(RESNET, x)
    step = np.diff(np.unique(wanted)).min()
    assert np.array_equal(found.argmax(1), wanted.argmax(1))
    assert np.abs(found - wanted).max() < 1.5 * step and (np.abs(found - wanted) > step / 2).mean() < 0.05
    assert (found.argmax(1) == images[1][:16]).mean() > 0.6


# -- DORY -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("file", "shape"),
    [(TCN, (1, 1, 140)), pytest.param(RESIDUAL, (1, 1, 200, 200), marks=pytest.mark.slow)],
    ids=["TCN", "residual"],
)
def test_every_layer_is_what_dory_stored(file: Real, shape: tuple[int, ...], files: Files) -> None:
    folder = files.path(file.path).parent
    x = dory_text(folder / "input.txt", channels_last=False).reshape(shape).astype(np.float32)
    made, report = files.imported(file)
    assert report.rows and not report.inexact
    tensors = traced(made, x)
    layers = sorted(folder.glob("out_layer*.txt"), key=lambda path: int(path.stem[9:]))
    assert len(layers) == (12 if file is TCN else 8)
    assert [path.name for path in layers if not met(tensors, dory_text(path))] == []
    last = dory_text(layers[-1])
    assert np.array_equal(files.simulated(file, x)[0], last)
    last[0] += 1  # the control
    assert not met(tensors, last)


@pytest.mark.parametrize(
    ("file", "shape"),
    [(TCN, (4, 1, 140)), pytest.param(DSCNN, (4, 1, 49, 10), marks=pytest.mark.slow)],
    ids=["TCN", "dscnn"],
)
def test_dory_files_on_other_data(file: Real, shape: tuple[int, ...], files: Files) -> None:
    """DSCNN's goldens are not its file's; onnxruntime runs both node by node, in float32."""
    _, report = files.imported(file)
    assert report.rows and not report.inexact
    x = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    model = without_tail(files.model(file), "LogSoftmax")
    wanted = np.concatenate([by_onnxruntime(model, one[None], optimised=False) for one in x])
    assert np.array_equal(files.simulated(file, x), wanted)


# -- Deeploy ----------------------------------------------------------------------------------------------------------
def npz(path: Path) -> list[np.ndarray]:
    with np.load(path) as stored:
        return [stored[name] for name in stored]


def test_every_layer_is_what_deeploy_stored(files: Files) -> None:
    folder = files.path(CNN.path).parent
    (x,) = npz(folder / "inputs.npz")
    tensors = traced(files.imported(CNN)[0], x.astype(np.float32))
    with np.load(folder / "activations.npz") as stored:
        assert len(stored.files) == 14
        assert [name for name in stored.files if not met(tensors, stored[name])] == []
    assert np.array_equal(files.simulated(CNN, x.astype(np.float32)), npz(folder / "outputs.npz")[0])


@pytest.mark.parametrize("file", KERNELS, ids=name_of)
def test_kernels_give_what_deeploy_stored(file: Real, files: Files) -> None:
    folder = files.path(file.path).parent
    given, wanted = npz(folder / "inputs.npz"), npz(folder / "outputs.npz")[0]
    found = files.simulated(file, *(x.astype(np.float32) for x in given))
    if "ReduceMean" in file.path:  # the file averages; Deeploy's kernel rounds the average, halves up
        assert np.array_equal(found * 32, np.rint(found * 32))
        found = np.floor(found + 0.5)
    assert np.array_equal(found, wanted)
    assert len(np.unique(found)) > 20


# -- float ------------------------------------------------------------------------------------------------------------
FLOATS = [
    "hls4ml_example_models/two_layer_keras.onnx",
    "hls4ml_example_models/three_layer_keras.onnx",
    "hls4ml_example_models/three_layer_pytorch.onnx",
    "hls4ml_example_models/conv1d_small_keras.onnx",
    "hls4ml_example_models/conv2d_small_keras.onnx",
    "mlperf_float_onnx/pretrainedResnet.onnx",
    "qonnx_testdata/mnist-conv/model.onnx",
    "qonnx_testdata/residual_block_clean.onnx",
    "qonnx_testdata/bsd300x3-espcn/nn_resize/float_model.onnx",
]


def float_pair(path: Path, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Results of the file and of its torch layers."""
    import torch

    model = without_tail(with_batch(onnx.load(path), 1), "Softmax")
    wanted = np.concatenate([by_onnxruntime(model, one[None]) for one in x])
    with torch.no_grad():
        return wanted, edgemat.float_model(path)(torch.from_numpy(x)).numpy()


def float_shape(path: Path) -> list[int]:
    return [dim.dim_value for dim in inputs_of(onnx.load(path))[0].type.tensor_type.shape.dim][1:]


@pytest.mark.parametrize("place", FLOATS)
def test_float_files_are_torch_layers(place: str, files: Files) -> None:
    path = files.path(place)
    x = np.random.default_rng(0).normal(0, 1, [1 if "espcn" in place else 3, *float_shape(path)]).astype(np.float32)
    wanted, found = float_pair(path, x)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 2e-6 * max(1.0, float(np.abs(wanted).max()))


def quantised(path: Path, x: np.ndarray, folder: Path, samples: np.ndarray, batch: int = 25) -> tuple[Path, np.ndarray]:
    """A float file behind `ptq` as a lowered file, and its results."""
    import torch

    batches = [torch.from_numpy(samples[i : i + batch]) for i in range(0, len(samples), batch)]
    q = edgemat.ptq(edgemat.float_model(path), batches)
    edgemat.to_onnx(q, torch.from_numpy(x[:1]), folder / "net.onnx")
    return folder / "net.onnx", np.asarray(edgemat.Simulator(folder / "net.onnx")(x))


@pytest.mark.slow
def test_a_float_network_of_digits_is_quantised(
    files: Files, digits: tuple[np.ndarray, np.ndarray], data_dir: Path, tmp_path: Path
) -> None:
    """The file wants pixels up to 255; its golden digit too."""
    path = files.path("qonnx_testdata/mnist-conv/model.onnx")
    with np.load(data_dir / "mnist" / "mnist.npz") as stored:
        samples = stored["x_train"][:200, None].astype(np.float32)
    x, labels = digits[0] * 256, digits[1]
    net, found = quantised(path, x, tmp_path, samples)
    wanted, _ = float_pair(path, x)
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.98
    assert (found.argmax(1) == labels).mean() >= 0.96
    golden = path.parent / "test_data_set_0"
    one, result = stored_tensor(golden / "input_0.pb"), stored_tensor(golden / "output_0.pb")
    assert np.asarray(edgemat.Simulator(net)(one)).argmax() == result.argmax()
    report = edgemat.verify(net, x[:1], backends=("reference", "onnx", "mcu"))
    assert report.ok


@pytest.mark.slow
def test_a_float_network_of_images_is_quantised(
    files: Files, images: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    path = files.path("mlperf_float_onnx/pretrainedResnet.onnx")
    x = images[0].transpose(0, 3, 1, 2).astype(np.float32)
    net, found = quantised(path, x[100:], tmp_path, x[:100])
    wanted, _ = float_pair(path, x[100:])
    assert (found.argmax(1) == wanted.argmax(1)).mean() >= 0.95
    assert edgemat.verify(net, x[100:101], backends=ALL).ok


@pytest.mark.slow
@pytest.mark.parametrize("place", [place for place in FLOATS if "hls4ml" in place or "residual" in place])
def test_float_files_are_exact_on_every_backend_behind_ptq(place: str, files: Files, tmp_path: Path) -> None:
    path = files.path(place)
    x = np.random.default_rng(0).normal(0, 1, [40, *float_shape(path)]).astype(np.float32)
    net, found = quantised(path, x[:8], tmp_path, x[8:], 8)
    wanted, _ = float_pair(path, x[:8])
    assert np.sqrt(np.square(found - wanted).mean()) < 0.1 * np.sqrt(np.square(wanted).mean())
    assert edgemat.verify(net, x[:1], backends=ALL).ok


# -- backends ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", [TFC_2, JETS, *KERNELS[3:4], *KERNELS[6:7]], ids=name_of)
def test_small_files_are_exact_on_the_backends(file: Real, files: Files) -> None:
    assert edgemat.verify(files.imported(file)[0], samples=1, backends=("reference", "onnx", "mcu")).ok


@pytest.mark.slow
@pytest.mark.parametrize("file", TAKEN, ids=name_of)
def test_every_file_is_exact_on_every_backend(file: Real, files: Files) -> None:
    assert edgemat.verify(files.compact(file), samples=1, backends=ALL).ok


# -- what is not taken ------------------------------------------------------------------------------------------------
REFUSED = [
    (f"{DEEPLOY}Kernels/Integer/MatMul/Add/network.onnx", "fixed<8,8>", r"a constant of shape \(32, 64\) for data"),
    ("hls4ml_example_models/three_layer_keras.onnx", "", r"float input 'input_1_0' gets here without a quantiser"),
    ("hls4ml_example_models/qkeras_3layer.json", "", r"is not an ONNX file"),
    ("hls4ml_example_models/qkeras_3layer_weights.h5", "", r"is not an ONNX file"),
    ("mlperf_tiny_models/training/image_classification/trained_models/pretrainedResnet_quant.tflite", "", r"ONNX"),
    ("mlperf_tiny_models/training/anomaly_detection/trained_models/ad01_int8.tflite", "", r"ONNX"),
]


@pytest.mark.parametrize(("place", "stated", "reason"), REFUSED, ids=[place.split("/")[-1] for place, *_ in REFUSED])
def test_what_is_refused_says_why(place: str, stated: str, reason: str, files: Files, tmp_path: Path) -> None:
    path = files.path(place)
    names = [value.name for value in inputs_of(onnx.load(path))] if stated else []
    with pytest.raises(LoweringError, match=reason):
        edgemat.import_onnx(path, tmp_path / "net.onnx", inputs=dict.fromkeys(names, stated))


def test_a_float_file_that_contradicts_itself_is_refused(files: Files) -> None:
    """Its batch norms have 64 channels for one; onnxruntime refuses it too."""
    path = files.path("hls4ml_example_models/three_layer_bn_keras.onnx")
    with pytest.raises(LoweringError, match=r"perm \(1, 0\) moves the batch"):
        edgemat.float_model(path)
    with pytest.raises(Exception, match=r"Invalid input scale"):
        by_onnxruntime(onnx.load(path), np.zeros((1, 16), np.float32))
