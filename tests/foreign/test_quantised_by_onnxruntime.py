"""Float models that onnxruntime's own quantiser made int8: each comes in, and computes what onnxruntime computes.

Stock onnxruntime is asked with ``session.x64quantprecision``: without it, u8 x s8 products saturate in pairs on x86
machines without VNNI, and the machine decides what the file computes.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import edgemat
from edgemat.foreign.importing import import_onnx
from edgemat.foreign.report import ImportReport
from tests.foreign.float_models import MODELS, Builder

quantization = pytest.importorskip("onnxruntime.quantization")

TYPES = {
    "u8s8": (quantization.QuantType.QUInt8, quantization.QuantType.QInt8),
    "s8s8": (quantization.QuantType.QInt8, quantization.QuantType.QInt8),
    "u8u8": (quantization.QuantType.QUInt8, quantization.QuantType.QUInt8),
}
STYLES = {
    "qdq": (quantization.QuantFormat.QDQ, False),
    "qdq_channel": (quantization.QuantFormat.QDQ, True),
    "qoperator": (quantization.QuantFormat.QOperator, False),
}
RATES = {
    # (model, types): largest share of output codes that may differ from onnxruntime's default, and why.
    ("pools", "u8s8"): 0.01,  # an average between equal scales: ties, which float32 sums break at random
    ("pools", "u8u8"): 0.01,
    ("pools", "s8s8"): 0.2,  # likewise, without a kernel of integers
    ("gated", "u8s8"): 0.35,  # onnxruntime's softmax kernel divides by 254 where the file says 255
    ("gated", "u8u8"): 0.35,
    ("gated", "s8s8"): 0.35,
}


@dataclass(frozen=True)
class Case:
    """One way to quantise one model."""

    model: str
    types: str
    style: str
    symmetric: bool

    def __str__(self) -> str:
        return f"{self.model}-{self.types}-{self.style}{'-symmetric' if self.symmetric else ''}"


FAST = [
    Case("mlp", "u8s8", "qoperator", False),
    Case("matmuls", "u8u8", "qdq_channel", False),
    Case("residual", "s8s8", "qdq_channel", True),
    Case("pools", "u8s8", "qdq", False),
    Case("gated", "u8u8", "qoperator", False),
    Case("moved", "s8s8", "qdq", False),
]
ALL = [Case(*given) for given in itertools.product(MODELS, TYPES, STYLES, (False, True))]
SLOW = [case for case in ALL if case not in FAST]


class Calibration(quantization.CalibrationDataReader):
    """Batches of samples."""

    def __init__(self, data: np.ndarray) -> None:
        self.batches = iter([{"x": data[i : i + 8]} for i in range(0, len(data), 8)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantised(case: Case, folder: Path) -> tuple[Path, Builder]:
    """Writes the model as onnxruntime quantises it."""
    logging.disable(logging.WARNING)
    function, shape = MODELS[case.model]
    builder = Builder(shape)
    plain, made = folder / "float.onnx", folder / "quantised.onnx"
    onnx.save(builder.model(function(builder)), plain)
    activation, weight = TYPES[case.types]
    style, per_channel = STYLES[case.style]
    try:
        quantization.quantize_static(
            str(plain),
            str(made),
            Calibration(builder.data(64)),
            quant_format=style,
            per_channel=per_channel,
            reduce_range=False,
            activation_type=activation,
            weight_type=weight,
            extra_options={"ActivationSymmetric": case.symmetric, "WeightSymmetric": case.types != "u8u8"},
        )
    finally:
        logging.disable(logging.NOTSET)
    return made, builder


def onnxruntime_runs(path: Path, x: np.ndarray, precise: bool = True, optimised: bool = True) -> np.ndarray:
    """What stock onnxruntime computes."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return np.asarray(ort.InferenceSession(str(path), options).run(None, {"x": x})[0])


def compared(case: Case, folder: Path) -> tuple[ImportReport, np.ndarray, np.ndarray, Path]:
    """Import, edgemat's outputs and onnxruntime's; onnxruntime has no s8 x u8 kernels to be precise with."""
    path, builder = quantised(case, folder)
    lowered = folder / "net.onnx"
    report = import_onnx(path, lowered)
    x = builder.data(256, 5)
    expected = onnxruntime_runs(path, x, precise=(case.types, case.style) != ("s8s8", "qoperator"))
    return report, np.asarray(edgemat.Simulator(lowered)(x)), expected, lowered


def check(case: Case, folder: Path) -> None:
    """Equal, or differing for at most the stated share, by few steps, with nearly always the same class."""
    if (case.model, case.style, case.symmetric) == ("residual", "qoperator", True):
        # A float Clip at 6 and a float mean stay between two quantisers: no function of integers.
        with pytest.raises(edgemat.EdgematError, match="node_clip8"):
            import_onnx(quantised(case, folder)[0], folder / "net.onnx")
        return
    report, found, expected, _ = compared(case, folder)
    rate = 0.0 if case.style == "qoperator" else RATES.get((case.model, case.types), 0.0)
    differ = found != expected
    print(f"{case}: {differ.sum()} of {differ.size} output codes differ")
    assert differ.mean() <= rate, report.to_dict()
    assert (found.argmax(1) == expected.argmax(1)).mean() >= (1.0 if rate < 0.1 else 0.96)
    assert len(np.unique(found)) > 20  # the outputs say something
    if differ.any():
        assert report.inexact


@pytest.mark.parametrize("case", FAST, ids=str)
def test_quantised_models_compute_what_onnxruntime_computes(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_every_way_to_quantise(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize("style", ["qdq", "qdq_channel"])
def test_softmax_is_the_standard_s(style: str, tmp_path: Path) -> None:
    """Node by node, onnxruntime agrees on every code where its softmax kernel does not."""
    case = Case("gated", "u8s8", style, False)
    path, builder = quantised(case, tmp_path)
    import_onnx(path, tmp_path / "net.onnx")
    x = builder.data(256, 5)
    found = np.asarray(edgemat.Simulator(tmp_path / "net.onnx")(x))
    differ = found != onnxruntime_runs(path, x, optimised=False)
    assert differ.mean() <= 0.002


def test_one_step_of_one_scale_is_noticed(tmp_path: Path) -> None:
    """The control: the comparison fails where one requantisation is changed by two thousandths."""
    case = Case("mlp", "u8s8", "qoperator", False)
    path, builder = quantised(case, tmp_path)
    model = onnx.load(path)
    layer = next(node for node in model.graph.node if node.op_type == "QGemm")
    scale = next(t for t in model.graph.initializer if t.name == layer.input[7])
    value = onnx.numpy_helper.to_array(scale)
    scale.CopyFrom(onnx.numpy_helper.from_array(np.float32(value * np.float32(1.002)), scale.name))
    changed = tmp_path / "changed.onnx"
    onnx.save(model, changed)
    import_onnx(changed, tmp_path / "net.onnx")
    x = builder.data(256, 5)
    found = np.asarray(edgemat.Simulator(tmp_path / "net.onnx")(x))
    assert (found != onnxruntime_runs(path, x)).any()
    assert (found == onnxruntime_runs(changed, x)).all()


def test_every_backend_agrees_on_a_gate_and_a_softmax(tmp_path: Path) -> None:
    path, _ = quantised(Case("gated", "u8s8", "qdq", False), tmp_path)
    import_onnx(path, tmp_path / "net.onnx")
    report = edgemat.verify(tmp_path / "net.onnx", samples=24, backends=("reference", "onnx", "mcu"))
    assert report.ok, report


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in FAST if case.model != "gated"], ids=str)
def test_every_backend_agrees(case: Case, tmp_path: Path) -> None:
    path, _ = quantised(case, tmp_path)
    import_onnx(path, tmp_path / "net.onnx")
    hls = ("hls",) if case.model in ("mlp", "moved") else ()
    report = edgemat.verify(tmp_path / "net.onnx", samples=32, backends=("reference", "onnx", "mcu", *hls))
    assert report.ok, report
