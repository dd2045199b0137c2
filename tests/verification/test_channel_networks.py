"""Networks trained with a width for each channel of each activation: exact on every backend, pruned ones included."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import edgemat
from edgemat.lower import read
from edgemat.nn.learned_activation import LearnedActivationQuantizer
from edgemat.verification import backends as rooms
from tests.verification.random_networks import RandomNetwork, random_recipe

SEEDS = (4, 5, 6, 7, 8, 9, 27, 32, 34, 36, 38, 43)  # networks in which channels reach layers as they are


def spread(module: nn.Module, seed: int) -> int:
    """Moves the learned points of each channel, prunes some; returns the number of quantisers by channel."""
    draw = random.Random(seed)
    found = [m for m in module.modules() if isinstance(m, LearnedActivationQuantizer) and m.per_channel]
    with torch.no_grad():
        for quantizer in found:
            count = quantizer.frac.numel()
            quantizer.frac -= torch.tensor([float(draw.randint(0, 3)) for _ in range(count)])
            if draw.random() < 0.4:
                pruned = draw.randrange(count)
                quantizer.whole[pruned] = -quantizer.frac[pruned]
    return len(found)


@pytest.mark.parametrize(("backend", "seeds"), [("onnx", SEEDS[::2]), ("mcu", SEEDS[1::6]), ("hls", SEEDS[3:4])])
def test_random_networks_by_channel(tmp_path, backend, seeds):
    usable = () if rooms.make(backend, None).missing() else (backend,)
    pruned = narrowed = 0
    for seed in seeds:
        network = RandomNetwork(seed)
        x = 2 * torch.randn(5, *network.shape)
        width = random.Random(seed).randint(4, 9)
        recipe = replace(
            random_recipe(seed), learn_widths="activations", activation_groups="channel", activations=f"fixed<{width}>"
        )
        module = edgemat.quantize(network.train(), recipe)
        edgemat.calibrate(module, [x])
        assert spread(module, seed)
        module.train()(x)
        edgemat.to_onnx(module.eval(), x, tmp_path / "net.onnx")
        widths = [t.format.widths for t in read(tmp_path / "net.onnx").tensors.values() if t.format.widths is not None]
        narrowed += bool(widths)
        pruned += any(0 in w for w in widths)
        report = edgemat.verify(tmp_path / "net.onnx", x.numpy(), module=module, backends=("reference", *usable))
        assert report.ok, (seed, network.plan, report.to_dict())
    assert narrowed == len(seeds) and (pruned or backend != "onnx")
