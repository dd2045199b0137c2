"""Random networks are exact on every backend, or refused in one sentence."""

from __future__ import annotations

import pytest
import torch

import edgemat
from edgemat.verification import backends as rooms
from tests.verification.random_networks import RandomNetwork, random_recipe

CHEAP, HLS = ("reference", "onnx", "mcu"), ("hls:parallel", "hls:stream")


def check(seed: int, backends: tuple[str, ...], folder) -> bool:
    """Whether the network of a seed could be built; asserts that it is exact."""
    network = RandomNetwork(seed)
    x = 2 * torch.randn(5, *network.shape)
    try:
        network.eval()(x)
    except RuntimeError:
        return False  # torch itself has no output for these sizes
    try:
        module = edgemat.quantize(network.train(), random_recipe(seed))
        edgemat.calibrate(module, [x])
        module.train()(x)
        edgemat.to_onnx(module.eval(), x, folder / "net.onnx")
    except edgemat.EdgematError as error:
        assert "\n" not in str(error) and len(str(error)) > 30
        return False
    usable = tuple(name for name in backends if rooms.make(name, None).missing() is None)
    report = edgemat.verify(folder / "net.onnx", x.numpy(), module=module, backends=usable)
    assert report.ok, (seed, network.plan, network.shape, report.to_dict())
    return True


def test_random_networks(tmp_path):
    """Of sixteen seeds most can be built, and those are exact in torch, onnxruntime and C."""
    assert sum(check(seed, CHEAP, tmp_path) for seed in range(16)) >= 10


def test_random_networks_in_hls(tmp_path):
    """The same in both HLS interfaces, for a few."""
    assert sum(check(seed, HLS, tmp_path) for seed in range(300, 304)) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_many_random_networks(tmp_path, block):
    """Two hundred more."""
    assert sum(check(seed, CHEAP + HLS, tmp_path) for seed in range(1000 + 20 * block, 1020 + 20 * block)) >= 8
