"""Each trained network computes the same integers on every backend.

The whole test split in torch, the reference, onnxruntime and the C library on the host; 1,000 samples in the HLS C
simulation of both interfaces (ResNet8: 200); 50 on each emulated microcontroller; the corner vectors everywhere.
Only ResNet8's 5,000 images wait for ``make test-full``, the default run takes its first 200.
"""

import numpy as np
import pytest
import torch

import edgemat

from . import recipes


@pytest.fixture(scope="module", params=recipes.NETWORKS)
def network(request, trained):
    """The trained networks one after the other, so that a worker waits for one training at most."""
    return trained(request.param)


@pytest.fixture(scope="module")
def split(network):
    return recipes.NETWORKS[network.name].load()


def check(network, backends, x, **options):
    """Verifies `backends` on `x` and the corner vectors; skips where a backend's toolchain is missing."""
    try:
        report = edgemat.verify(network.onnx, inputs=x, backends=backends, **options)
    except edgemat.ToolchainError as missing:
        if "cannot run" not in str(missing):
            raise
        pytest.skip(str(missing))
    facts = report.to_dict()
    for backend in backends:
        found = facts["backends"][backend]
        assert found["status"] == "exact", facts["first_mismatch"]
        assert found["mismatches"] == 0
    assert facts["samples"] > len(x), "the corner vectors come on top"
    assert facts["overflow"]["proved"]


def take(split, count):
    """The first `count` samples of the test split, filled up from the training split."""
    return np.concatenate([split.x_test, split.x_train])[:count]


def test_torch_reference_onnx_and_c(network, split):
    module = recipes.load_module(network.name, network.module)
    count = 200 if network.name == "resnet8" else len(split.x_test)
    check(network, ("torch", "reference", "onnx", "mcu"), split.x_test[:count], module=module)


@pytest.mark.slow
def test_resnet8_on_the_whole_test_split(trained):
    network = trained("resnet8")
    module = recipes.load_module(network.name, network.module)
    x = recipes.NETWORKS[network.name].load().x_test
    check(network, ("torch", "reference", "onnx", "mcu"), x, module=module)


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_hls(network, split, io):
    check(network, (f"hls:{io}",), take(split, recipes.NETWORKS[network.name].hls_samples))


@pytest.mark.parametrize("core", ["cortex-m4", "rv32imc"])
def test_emulated(network, split, core):
    check(network, (f"mcu:{core}",), take(split, 50))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hls:parallel", "hls:stream", "mcu:cortex-m4", "mcu:rv32imc"])
def test_the_whole_test_split(network, split, backend):
    """Every sample on the simulated and emulated backends, too."""
    check(network, (backend,), split.x_test)


def test_another_network_is_told_apart(network, split):
    """The control: a module whose last bias moved must not pass for the file."""
    module = recipes.load_module(network.name, network.module)
    with torch.no_grad():
        last = [parameter for name, parameter in module.named_parameters() if name.endswith("bias")][-1]
        last[0] += last.abs().max() + 1
    report = edgemat.verify(network.onnx, inputs=split.x_test[:20], backends=("torch",), module=module).to_dict()
    assert not report["ok"]
    assert report["backends"]["torch"]["mismatches"] >= 20
    assert report["first_mismatch"]["backend"] == "torch"
