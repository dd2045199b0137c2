"""What the short trainings reach. The floors sit below the measured accuracies, which docs/networks.md
lists.
"""

import pytest

FLOORS = {
    "mlp": 0.85,
    "lenet": 0.985,
    "lenet8": 0.985,
    "resnet8": 0.35,
    "dscnn": 0.95,
    "ecg": 0.98,
    "autoencoder": 0.75,
}


@pytest.mark.parametrize("name", FLOORS)
def test_quantised_network_has_learned(trained, name):
    assert trained(name).score.quantised_score >= FLOORS[name]


def test_lenet_at_eight_bits_is_as_good_as_float(trained):
    score = trained("lenet8").score
    assert score.quantised_score >= score.float_score - 0.003
