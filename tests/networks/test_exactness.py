"""Each trained network computes the same integers on every backend.

The default run compares a part of the test split; the slow tests (``make test-full``) compare all of it,
with 1,000
samples in the HLS C simulation (ResNet8: 200) and 50 on each emulated microcontroller. Corner vectors are
in every run.
"""

import numpy as np
import pytest

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
    check(network, ("torch", "reference", "onnx", "mcu"), take(split, 200), module=module)


@pytest.mark.slow
def test_whole_test_split(network, split):
    module = recipes.load_module(network.name, network.module)
    check(network, ("torch", "reference", "onnx", "mcu"), split.x_test, module=module)


@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_hls(network, split, io):
    check(network, (f"hls:{io}",), take(split, 20))


@pytest.mark.slow
@pytest.mark.parametrize("io", ["parallel", "stream"])
def test_hls_thousand(network, split, io):
    check(network, (f"hls:{io}",), take(split, recipes.NETWORKS[network.name].hls_samples))


@pytest.mark.parametrize("core", ["cortex-m4", "rv32imc"])
def test_emulated(network, split, core):
    check(network, (f"mcu:{core}",), take(split, 2))


@pytest.mark.slow
@pytest.mark.parametrize("core", ["cortex-m4", "rv32imc"])
def test_emulated_fifty(network, split, core):
    check(network, (f"mcu:{core}",), take(split, 50))
