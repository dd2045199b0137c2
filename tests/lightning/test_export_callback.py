"""`ExportCallback`: the right weights, verified, all or nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import edgemat
from edgemat.errors import EdgematError, ParityError, ToolchainError
from edgemat.lightning import ExportCallback, QATCallback, export_callback
from tests.lightning.nets import Lit, data, loader, network, same, trainer

ONNX = ("reference", "onnx")


class Scripted(Lit):
    """A validation whose metric is written beforehand, one entry for each epoch."""

    def __init__(self, *script: float):
        super().__init__()
        self.script = script

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", torch.tensor(self.script[self.current_epoch]))


def of(net: nn.Module, folder: Path) -> bytes:
    edgemat.to_onnx(net, data()[0][:2], folder / "expected.onnx")
    return (folder / "expected.onnx").read_bytes()


def restored(path: str) -> nn.Module:
    lit = Lit()
    lit.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return lit.net


def test_the_end(tmp_path: Path) -> None:
    lit, callback = Lit(), ExportCallback(tmp_path / "out", samples=5)
    trainer(max_epochs=2, callbacks=[callback]).fit(lit, loader())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["net.onnx", "verify.json"]
    assert callback.path == tmp_path / "out" / "net.onnx"
    assert callback.path.read_bytes() == of(lit.net, tmp_path)
    found = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert found["ok"] and {"torch", "reference", "onnx"} == set(found["backends"])
    assert found["backends"]["torch"]["compared"] == (found["samples"]) * 3
    assert callback.report is not None and callback.report.to_dict() == found
    assert not list(tmp_path.glob(".out*"))


def test_projects_on_request(tmp_path: Path) -> None:
    targets = {"hls": {"io": "stream"}, "mcu": {}}
    callback = ExportCallback(tmp_path / "out", targets=targets, backends=ONNX, samples=2)
    trainer(max_epochs=1, limit_train_batches=1, callbacks=[callback]).fit(Lit(), loader())
    assert (tmp_path / "out" / "mcu" / "model.h").is_file()
    assert (tmp_path / "out" / "hls" / "parameters.hpp").is_file()
    assert ExportCallback("out", targets="mcu").backends == ("reference", "onnx", "mcu")


def test_the_best_checkpoint(tmp_path: Path) -> None:
    lit, callback = Scripted(1.0, 2.0), ExportCallback(tmp_path / "out", "best", backends=ONNX)
    saver = ModelCheckpoint(tmp_path / "kept", monitor="val")
    trainer(max_epochs=2, enable_checkpointing=True, callbacks=[callback, saver]).fit(lit, loader(), loader())
    exported = (tmp_path / "out" / "net.onnx").read_bytes()
    assert exported == of(restored(saver.best_model_path), tmp_path)
    assert exported != of(lit.net, tmp_path)


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights of every network that would be exported."""
    found: list[dict[str, torch.Tensor]] = []

    def keep(self: ExportCallback, net: nn.Module, arguments: Any) -> None:
        found.append({name: value.clone() for name, value in net.state_dict().items()})

    monkeypatch.setattr(ExportCallback, "_export", keep)
    return found


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("moments", [{"every_n_epochs": 1}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}])
def test_each_best_checkpoint(
    first: bool, moments: dict[str, Any], tmp_path: Path, exported: list[dict[str, torch.Tensor]]
) -> None:
    """Epochs 0, 2 and 4 are the best so far, wherever the callback stands and whenever the checkpoint is saved."""

    class Keep(ModelCheckpoint):
        def _update_best_and_save(self, *args: Any) -> None:
            super()._update_best_and_save(*args)
            state = torch.load(self.best_model_path, weights_only=True)["state_dict"]
            best.append({name.removeprefix("net."): value for name, value in state.items()})

    best: list[dict[str, torch.Tensor]] = []
    callback, saver = ExportCallback(tmp_path / "out", "best"), Keep(tmp_path / "kept", monitor="val", **moments)
    callbacks: list[Any] = [callback, saver] if first else [saver, callback]
    lit = Scripted(3.0, 4.0, 1.0, 2.0, 0.5)
    trainer(max_epochs=5, enable_checkpointing=True, callbacks=callbacks).fit(lit, loader(), loader(shuffle=False))
    assert len(best) == 3
    assert same(exported, best)


def test_a_resumed_training_exports_only_what_is_better(
    tmp_path: Path, exported: list[dict[str, torch.Tensor]]
) -> None:
    def run(epochs: int, ckpt: str | None = None) -> str:
        saver = ModelCheckpoint(tmp_path / "kept", monitor="val", save_last=True)
        callbacks = [ExportCallback(tmp_path / "out", "best"), saver]
        made = trainer(max_epochs=epochs, enable_checkpointing=True, callbacks=callbacks)
        made.fit(Scripted(3.0, 1.0, 2.0, 0.5), loader(), loader(), ckpt_path=ckpt)
        return saver.last_model_path

    last = run(2)
    assert len(exported) == 2
    last = run(3, last)  # epoch 2 is worse
    assert len(exported) == 2
    run(4, last)
    assert len(exported) == 3


def test_exporting_does_not_touch_the_training(tmp_path: Path) -> None:
    """With random numbers in the loop (dropout after every export), the bits are those without it."""

    class Dropping(Scripted):
        def loss(self, batch: Any) -> torch.Tensor:
            return super().loss((nn.functional.dropout(batch[0], 0.3), batch[1]))

    ends = []
    for on in (True, False):
        torch.manual_seed(3)
        lit = Dropping(2.0, 1.0)
        saver = ModelCheckpoint(tmp_path / str(on), monitor="val")
        callbacks = [saver, *([ExportCallback(tmp_path / "out", "best", backends=ONNX)] if on else [])]
        trainer(max_epochs=2, enable_checkpointing=True, callbacks=callbacks).fit(lit, loader(), loader())
        ends.append(lit.state_dict())
    assert same(*ends)


def test_a_failing_verification_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file gets weights of its own: the first node that differs is named, the earlier export stays."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "net.onnx").write_text("earlier")

    def tampered(net: Any, example: Any, path: Path) -> None:
        with torch.no_grad():
            other = network()
            other.load_state_dict(net.state_dict())
            other.get_parameter("5.weight")[0].neg_()
        edgemat.to_onnx(other, example, path)

    monkeypatch.setattr(export_callback, "to_onnx", tampered)
    with pytest.raises(ParityError, match=r"node '5.*': backend torch computes -?\d+ at .* expected -?\d+; the export"):
        trainer(max_epochs=1, callbacks=[ExportCallback(tmp_path / "out")]).fit(Lit(lr=0.0), loader())
    assert (tmp_path / "out" / "net.onnx").read_text() == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failing_exchange_brings_the_earlier_export_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "net.onnx").write_text("earlier")
    plain = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "new":
            raise OSError("no space")
        return plain(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="no space"):
        trainer(max_epochs=1, limit_train_batches=1, callbacks=[ExportCallback(tmp_path / "out")]).fit(Lit(), loader())
    assert (tmp_path / "out" / "net.onnx").read_text() == "earlier"


def test_folders_of_others_are_refused_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    lit = Lit()
    with pytest.raises(EdgematError, match=r"holds 'thesis\.tex', expected a folder for exports alone"):
        trainer(max_epochs=1, callbacks=[ExportCallback(tmp_path)]).fit(lit, loader())
    with pytest.raises(EdgematError, match="is a file or the current folder"):
        trainer(max_epochs=1, callbacks=[ExportCallback(tmp_path / "thesis.tex")]).fit(lit, loader())
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(EdgematError, match="is a file or the current folder"):
        trainer(max_epochs=1, callbacks=[ExportCallback(".")]).fit(lit, loader())


def test_settings(tmp_path: Path) -> None:
    for options, message in (
        ({"when": "never"}, "when is 'never', expected one of end, best"),
        ({"targets": "fpga"}, "target is 'fpga', expected one of hls, mcu"),
        ({"samples": 0}, "samples is 0"),
        ({"samples": "a"}, "samples is 'a', expected a whole number of at least 1"),
        ({"targets": 3}, "targets is 3, expected names out of hls, mcu"),
        ({"targets": {"mcu": 3}}, "the options of 'mcu' are 3, expected a dict"),
        ({"backends": 3}, "backends is 3, expected a list"),
        ({"backends": "onnx"}, "backends is 'onnx', expected a list"),
        ({"folder": None}, "folder is None, expected a path"),
    ):
        with pytest.raises(EdgematError, match=message):
            ExportCallback(**{"folder": tmp_path / "out"} | options)
    with pytest.raises(EdgematError, match="no checkpoint callback that monitors anything"):
        trainer(max_epochs=1, callbacks=[ExportCallback(tmp_path / "out", "best")]).fit(Lit(), loader())
    with pytest.raises(EdgematError, match="nonsense"):
        trainer(max_epochs=1, callbacks=[ExportCallback(tmp_path / "out", backends=["nonsense"])]).fit(Lit(), loader())
    assert not (tmp_path / "out").exists()
    assert issubclass(ToolchainError, EdgematError)


def test_inputs_by_name_and_an_example(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

        def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return self.a(left) + self.b(right)

    class Two(Lit):
        def loss(self, batch: Any) -> torch.Tensor:
            left, right, y = batch
            return nn.functional.cross_entropy(self.net(right=right, left=left), y)

    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    pairs = DataLoader(TensorDataset(x[:, :4], x[:, 4:], torch.zeros(24, dtype=torch.long)), 8)
    q = edgemat.calibrate(edgemat.quantize(Sum()), [(x[:, :4], x[:, 4:])])
    seen = ExportCallback(tmp_path / "seen", backends=ONNX)
    stated = ExportCallback(tmp_path / "stated", backends=ONNX, example_input=(x[:1, :4], x[:1, 4:]))
    trainer(max_epochs=1, callbacks=[seen, stated]).fit(Two(q), pairs)
    for callback in (seen, stated):
        assert callback.report is not None and callback.report.ok
        assert edgemat.lower.read(callback.path).input_names == ["left", "right"]  # type: ignore[attr-defined]


def test_early_stopping_still_exports(tmp_path: Path, exported: list[dict[str, torch.Tensor]]) -> None:
    stop = EarlyStopping("val", patience=1)
    callbacks = [stop, QATCallback(delay=2), ExportCallback(tmp_path / "out", backends=ONNX)]
    lit = Scripted(1.0, 2.0, 3.0, 4.0)
    trainer(max_epochs=4, callbacks=callbacks).fit(lit, loader(), loader())
    assert stop.stopped_epoch == 1
    assert same(exported, [dict(lit.net.state_dict())])
