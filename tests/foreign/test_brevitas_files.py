"""The files Brevitas writes itself, QONNX and QCDQ: what the import computes of them is what torch computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("brevitas", reason="pip install edgemat[brevitas]")
pytest.importorskip("onnxoptimizer", reason="Brevitas' exporters need it: pip install onnxoptimizer")

from brevitas.export import export_onnx_qcdq, export_qonnx  # noqa: E402
from torch import nn  # noqa: E402

import edgemat  # noqa: E402
from edgemat.foreign.importing import ImportRefused, import_onnx  # noqa: E402

from .brevitas_models import KINDS, PIXELS, POWERS, Branches, trained  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

BOTH = (
    *("linear", "linear_float_bias", "linear_bias_of_8_bits", "linear_by_channel", "linear_ternary", "linear_output"),
    *("hard_tanh", "conv1d", "conv2d", "conv2d_by_channel", "depthwise", "transpose1d", "transpose2d", "batch_norm"),
    *("sum", "cat", "max_pool", "average_of_torch", "shifted"),
)
"""Branches whose QONNX and QCDQ files both say what the model computes."""
ONLY_QONNX = ("linear_binary", "floor", "ceil", "round_to_zero", "average_floor", "average_round")
"""QCDQ has one rounding mode, and no bipolar numbers."""


class Listed(nn.Module):
    """A dict of outputs as a list: what torch's older exporter takes."""

    def __init__(self, model: Branches) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):  # type: ignore[no-untyped-def]
        return list(self.model(x).values())


def differences(export, scales: str, names: tuple[str, ...], path: Path) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Share of elements that differ, for outputs that do."""
    torch.manual_seed(6)
    model = trained(Branches(KINDS[scales], names), *PIXELS)
    x = 2 * torch.randn(64, *PIXELS)
    axes = {"x": {0: "N"}, **{name: {0: "N"} for name in names}}
    labels = {"input_names": ["x"], "output_names": [f"{name}_out" for name in names]}
    export(
        Listed(model).eval(), args=x[:1], export_path=str(path / "own.onnx"), dynamo=False, dynamic_axes=axes, **labels
    )
    import_onnx(path / "own.onnx", path / "net.onnx")
    found = edgemat.Simulator(path / "net.onnx")(x.numpy())
    found = found if isinstance(found, dict) else {labels["output_names"][0]: found}
    with torch.no_grad():
        wanted = {name: y.numpy() for name, y in model(x).items()}
    apart = {n: np.abs(y - found[f"{n}_out"]) > 2e-6 * np.abs(y).max() for n, y in wanted.items()}
    return {name: float(far.mean()) for name, far in apart.items() if far.any()}


@pytest.mark.parametrize("scales", KINDS)
@pytest.mark.parametrize(("export", "names"), [(export_qonnx, BOTH + ONLY_QONNX), (export_onnx_qcdq, BOTH)])
def test_own_exports_come_in(export, names: tuple[str, ...], scales: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert differences(export, scales, names, tmp_path) == {}


def test_a_rounding_mode_that_qcdq_loses_is_seen(tmp_path: Path) -> None:
    """The control: QCDQ writes floor as round, and the comparison sees it."""
    assert differences(export_onnx_qcdq, "powers of two", ("floor",), tmp_path)["floor"] > 0.1


def test_a_sigmoid_of_wide_sums_is_refused_in_files(tmp_path: Path) -> None:
    """onnxruntime's sigmoid is not monotone there; `edgemat.brevitas.to_onnx` takes the model (test_brevitas.py)."""
    with pytest.raises(ImportRefused, match="not monotone"):
        differences(export_qonnx, "powers of two", ("sigmoid",), tmp_path)
    assert POWERS is KINDS["powers of two"]
