"""Autocast and torch.compile: whatever is around the network, its formats stay exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import edgemat
from edgemat.lightning import ExportCallback, FormatLogger, QATCallback
from tests.lightning.nets import LEARNED, Lit, data, loader, network, same, trainer


class Attention(nn.Module):
    """Operators that autocast takes into bfloat16 where nobody stops it: convolutions, linear layers, products."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.q, self.k, self.head = nn.Linear(36, 8), nn.Linear(36, 8), nn.Linear(4, 3)
        self.slope = nn.PReLU(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.conv(x)))
        y = self.slope(y + nn.functional.avg_pool2d(self.up(y), 2))
        rows = y.flatten(2)
        weights = torch.softmax(self.q(rows) @ self.k(rows).transpose(1, 2), -1)
        return self.head((weights @ rows).mean(2))


def attention() -> Any:
    torch.manual_seed(2)
    recipe = edgemat.Recipe(input="fixed<8,3>", weights="fixed<8>", activations="fixed<8>")
    return edgemat.calibrate(edgemat.quantize(Attention(), recipe), [data()[0]])


@pytest.mark.parametrize("make", [network, attention, lambda: network(LEARNED)], ids=["conv", "attention", "learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit(make: Callable[[], Any], dtype: torch.dtype) -> None:
    q, x = make(), data()[0]
    q.eval()
    with torch.no_grad():
        expected = q(x)
        with torch.autocast("cpu", dtype):
            found = q(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_autocast_would_change_the_float_network() -> None:
    """The control: the same operators without edgemat."""
    torch.manual_seed(2)
    net, x = Attention().eval(), data()[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = net(x).float()
    with torch.no_grad():
        assert not torch.equal(found, net(x))


@pytest.mark.parametrize("recipe", [None, LEARNED], ids=["fixed", "learned"])
def test_mixed_precision_trains_with_the_same_bits(recipe: Any) -> None:
    """All layers are quantised and the loss is float32, so bf16-mixed is float32 to the bit, gradients included."""
    ends = []
    for precision in ("bf16-mixed", "32-true"):
        lit = Lit(network() if recipe is None else network(recipe))
        callback = QATCallback(delay=2, oscillation={"momentum": 0.3, "threshold": 0.2})
        trainer(max_epochs=2, precision=precision, callbacks=[callback]).fit(lit, loader())
        ends.append(lit.state_dict())
    assert same(*ends)


def test_loss_scaling_leaves_the_penalty_as_it_is() -> None:
    """A scale that is a power of two changes no bit of a gradient, and the penalty is added behind it."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    ends = []
    for scaled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        lit = Lit(network(LEARNED))
        target = {"cost": "ebops", "at_most": 500.0, "rate": 0.5, "start": 0.1}
        plugins = [MixedPrecision("16-mixed", "cpu", scaler)] if scaled else []
        run = trainer(
            max_epochs=2, plugins=plugins, accumulate_grad_batches=2, callbacks=[QATCallback(cost_target=target)]
        )
        run.fit(lit, loader())
        ends.append(lit.state_dict())
    assert same(*ends)


def test_float_layers_before_the_network_may_be_reduced(tmp_path: Path) -> None:
    """They round, the quantised network behind them does not: what it computes from their values is exported."""

    class Stem(Lit):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(1, 1, 1)

        def loss(self, batch: Any) -> torch.Tensor:
            y = self.stem(batch[0])
            kinds.add(y.dtype)
            return nn.functional.cross_entropy(self.net(y), batch[1])

    kinds: set[torch.dtype] = set()
    exporter, logger = ExportCallback(tmp_path / "out"), FormatLogger(2, table=False)
    trainer(max_epochs=1, precision="bf16-mixed", callbacks=[exporter, logger]).fit(Stem(), loader())
    assert kinds == {torch.bfloat16}
    assert exporter.report is not None and exporter.report.ok
    assert len(logger.rows()) == 4 and all(row.saturated is not None for row in logger.rows())


class Small(Lit):
    """One linear layer: little to compile."""

    def __init__(self) -> None:
        torch.manual_seed(4)
        recipe = edgemat.Recipe(input="fixed<8,3>", weights="fixed<4>")
        net = edgemat.quantize(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), recipe)
        super().__init__(edgemat.calibrate(net, [data()[0]]))


def compiled(kind: str, lit: Lit) -> Any:
    """Traced and cut into graphs as for any backend; these run as they are, which takes seconds less."""
    if kind == "module":
        return torch.compile(lit, backend="eager")
    if kind == "network":
        lit.net = torch.compile(lit.net, backend="eager")  # type: ignore[assignment]
    else:
        lit.net.compile(backend="eager")
    return lit


@pytest.mark.parametrize("kind", ["module", "network", "in place"])
def test_compiled_training(kind: str, tmp_path: Path) -> None:
    torch.compiler.reset()
    lit = Small()
    net = lit.net
    qat = QATCallback(delay=2, oscillation=True)
    callbacks = [qat, FormatLogger(4, table=False), ExportCallback(tmp_path / "out")]
    trainer(max_epochs=1, callbacks=callbacks).fit(compiled(kind, lit), loader())
    assert qat.state_dict()["steps"] == 4
    assert all(row.saturated is not None for row in callbacks[1].rows())  # type: ignore[attr-defined]
    assert callbacks[2].report.ok  # type: ignore[attr-defined]
    # Compiled or not, the network computes what was exported.
    x = data()[0]
    with torch.no_grad():
        found = lit.net.eval()(x)
        with torch.compiler.set_stance("force_eager"):
            plain = net(x)
    assert torch.equal(found, plain)
    simulated = edgemat.Simulator(tmp_path / "out" / "net.onnx")(x.numpy())
    assert isinstance(simulated, np.ndarray)
    assert np.array_equal(simulated, found.numpy())
    torch.compiler.reset()


def test_generated_kernels_give_the_same_bits() -> None:
    net, x = Small().net.eval(), data()[0]
    with torch.no_grad():
        expected = net(x)
        assert torch.equal(torch.compile(net)(x), expected)
    torch.compiler.reset()
