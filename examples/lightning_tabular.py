"""An MLP with learned widths, trained by Lightning towards a cost, verified and exported at the end.

    EDGEMAT_DATA=/path/to/data python examples/lightning_tabular.py [--quick] [--ebops 12000] [--output DIR]

The folder EDGEMAT_DATA holds magic_gamma/train.csv (ten numbers and a class, g or h, in each row). It needs
pip install 'edgemat[lightning]'.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import edgemat


def load(folder):
    """Normalised features and labels (1: a gamma shower); a fifth of a fixed shuffle is held back."""
    rows = [line.split(",") for line in Path(folder, "magic_gamma", "train.csv").read_text().split()[1:]]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    x = np.array([row[:10] for row in rows], dtype=np.float32)
    y = torch.tensor([int(row[10] == "g") for row in rows])
    held = len(x) // 5
    x = torch.from_numpy((x - x[held:].mean(0)) / x[held:].std(0))
    return TensorDataset(x[held:], y[held:]), TensorDataset(x[:held], y[:held])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two epochs")
    parser.add_argument("--ebops", type=float, default=12000.0, help="effective bit operations asked for")
    parser.add_argument("--output", type=Path, default=Path("build/lightning_tabular"))
    options = parser.parse_args()
    if "EDGEMAT_DATA" not in os.environ:
        parser.error("set EDGEMAT_DATA to the folder that holds magic_gamma/train.csv")

    import lightning as L
    from lightning.pytorch.callbacks import EarlyStopping

    from edgemat.lightning import ExportCallback, FormatLogger, QATCallback

    class Shower(L.LightningModule):
        def __init__(self):
            super().__init__()
            layers = [nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU()]
            recipe = edgemat.Recipe(
                input="fixed<8,4>",
                weights="fixed<6>",
                activations="fixed<6>",
                learn_widths="all",
                weight_groups="weight",
                activation_groups="channel",
            )
            self.net = edgemat.quantize(nn.Sequential(*layers, nn.Linear(32, 2)), recipe)

        def training_step(self, batch, batch_idx):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("accuracy", (self.net(x).argmax(1) == y).float().mean(), prog_bar=True)

        def configure_optimizers(self):
            return torch.optim.Adam(edgemat.parameter_groups(self.net, lr=3e-3, format_lr=1e-2))

    L.seed_everything(0, verbose=False)
    train, held = load(os.environ["EDGEMAT_DATA"])
    export = ExportCallback(options.output, targets="hls", backends=("reference", "onnx"), samples=500)
    trainer = L.Trainer(
        max_epochs=2 if options.quick else 30,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=not options.quick,
        enable_model_summary=False,
        callbacks=[
            QATCallback(calibration=8, cost_target={"cost": "ebops", "at_most": options.ebops, "rate": 0.02}),
            FormatLogger(100),
            EarlyStopping("accuracy", mode="max", patience=10),
            export,
        ],
    )
    model = Shower()
    trainer.fit(model, DataLoader(train, 128, shuffle=True), DataLoader(held, 4096))

    for backend, found in export.report.to_dict()["backends"].items():
        print(f"{backend}: {found['compared']} integers compared, {found['mismatches']} mismatches")
    print(edgemat.CostTarget(model.net, "ebops", options.ebops).report())
    print(f"written: {export.path}, {options.output / 'hls'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
