"""load_float: everything or nothing, strict names, no stale binary points."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import FixedQuantizer
from tests.networks import models


def trained() -> nn.Module:
    """A float network with statistics of its own."""
    torch.manual_seed(1)
    model = models.ResNet8().train()
    model(torch.randn(8, 3, 32, 32) * 2 + 1)
    return model.eval()


@pytest.mark.parametrize("kind", ["module", "state", "file", "lightning"])
def test_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    model = trained()
    x = torch.randn(4, 3, 32, 32)
    expected = edgemat.calibrate(edgemat.quantize(model), [x])(x)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "lightning.ckpt")
    source = {
        "module": model,
        "state": model.state_dict(),
        "file": tmp_path / "net.pt",
        "lightning": str(tmp_path / "lightning.ckpt"),
    }[kind]
    torch.manual_seed(2)
    q = edgemat.quantize(models.ResNet8()).eval()
    edgemat.calibrate(q, [x])
    assert not torch.equal(q(x), expected)
    edgemat.load_float(q, source)
    with pytest.raises(FormatError, match="has no binary point yet"):
        q(x)
    assert torch.equal(edgemat.calibrate(q, [x])(x), expected)
    assert torch.equal(q.get_submodule("bn").running_var, model.bn.running_var)


def test_a_prefix() -> None:
    model = trained()
    state = {f"model.{name}": value for name, value in model.state_dict().items()} | {"loss.weight": torch.ones(3)}
    q = edgemat.quantize(models.ResNet8())
    edgemat.load_float(q, state, prefix="model.")
    assert torch.equal(q.get_submodule("dense").weight, model.dense.weight)
    with pytest.raises(FormatError, match=r"starts with .net\."):
        edgemat.load_float(q, state, prefix="net.")


def test_stated_points_stay() -> None:
    q = edgemat.quantize(models.Mlp(), edgemat.Recipe(input="fixed<8,3>"))
    edgemat.calibrate(q, [torch.randn(8, 16)])
    edgemat.load_float(q, models.Mlp())
    ready = {name: part.ready for name, part in q.named_modules() if isinstance(part, FixedQuantizer)}
    assert [name for name, known in ready.items() if known] == ["input_1_quantizer"]


def changed(**edits) -> dict[str, torch.Tensor]:
    state = dict(models.Mlp().state_dict())
    for name, value in edits.items():
        key = name.replace("_", ".")
        state.pop(key, None)
        if value is not None:
            new, tensor = value
            state[new] = tensor
    return state


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"0_weight": None}, "the checkpoint misses '0.weight', expected"),
        (
            {"0_weight": ("0.weigth", torch.zeros(64, 16))},
            r"misses '0.weight' \(nearest: '0.weigth'\) and has the unex",
        ),
        ({"9_x": ("0.gain", torch.zeros(3))}, "has the unexpected '0.gain'"),
        ({"0_weight": ("0.weight", torch.zeros(64, 15))}, r"'0.weight' has the shape \(64, 15\), expected \(64, 16\)"),
        ({"0_bias": ("0.bias", torch.full((64,), torch.nan))}, "'0.bias' holds NaN"),
        ({"0_bias": ("0.bias", 3)}, "the entry '0.bias' is a int"),
    ],
)
def test_another_network_is_refused_before_anything_changes(edits: dict, message: str) -> None:
    q = edgemat.quantize(models.Mlp())
    before = {name: value.clone() for name, value in q.state_dict().items()}
    with pytest.raises(FormatError, match=message):
        edgemat.load_float(q, changed(**edits))
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())


def test_a_quantised_checkpoint_and_bad_files(tmp_path: Path) -> None:
    q = edgemat.quantize(models.Mlp())
    with pytest.raises(FormatError, match=r"loaded by q\.load_state_dict"):
        edgemat.load_float(q, q.state_dict())
    with pytest.raises(FormatError, match="there is no file"):
        edgemat.load_float(q, tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(FormatError, match="cannot be read"):
        edgemat.load_float(q, tmp_path / "text.pt")
    torch.save(models.Mlp(), tmp_path / "pickled.pt")  # a whole module would run code when loaded
    with pytest.raises(FormatError, match="cannot be read"):
        edgemat.load_float(q, tmp_path / "pickled.pt")
    with pytest.raises(FormatError, match="got a int"):
        edgemat.load_float(q, 3)


def test_half_precision_checkpoints_are_widened() -> None:
    model = models.Mlp()
    q = edgemat.quantize(models.Mlp())
    edgemat.load_float(q, {name: value.half() for name, value in model.state_dict().items()})
    assert torch.equal(q.get_submodule("0").weight, model[0].weight.half().float())
