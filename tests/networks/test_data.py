"""The data sets have the shapes, ranges and labels their loaders promise."""

import numpy as np
import pytest

from . import data

SHAPES = {
    data.magic_gamma: ((12_173, 10), (3_043, 10), 2),
    data.mnist: ((60_000, 1, 28, 28), (5_000, 1, 28, 28), 10),
    data.fsdd: ((1_800, 1, 49, 10), (200, 1, 49, 10), 10),
    data.fsdd_windows: ((7_200, 640), (800, 640), 10),
    data.ecg_mitdb100: ((1_136, 2, 192), (1_135, 2, 192), 2),
}


def _load(loader, *args):
    try:
        return loader(*args)
    except data.DataMissingError as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("loader", SHAPES, ids=lambda loader: loader.__name__)
def test_shapes_and_labels(loader):
    split = _load(loader)
    train, test, classes = SHAPES[loader]
    assert split.x_train.shape == train
    assert split.x_test.shape == test
    assert split.x_train.dtype == split.x_test.dtype == np.float32
    assert np.isfinite(split.x_train).all()
    assert np.isfinite(split.x_test).all()
    assert set(split.y_test) == set(split.y_train) == set(range(classes))


def test_images_are_exact_in_their_formats():
    split = _load(data.mnist)
    assert np.array_equal(split.x_test * 256, np.round(split.x_test * 256))
    assert (split.x_test.min(), split.x_test.max()) == (0, 255 / 256)


def test_cifar_images_are_decoded_and_exact():
    pytest.importorskip("PIL", reason="Pillow decodes the JPEG images: pip install pillow")
    split = _load(data.cifar10_jpeg, 4, 2)
    assert split.x_train.shape == (40, 3, 32, 32)
    assert np.bincount(split.y_test).tolist() == [2] * 10
    assert np.array_equal(split.x_train * 128, np.round(split.x_train * 128))
    assert -1 <= split.x_train.min() < split.x_train.max() <= 127 / 128


def test_ecg_beats_are_those_of_record_100():
    split = _load(data.ecg_mitdb100)
    # PhysioNet's table for record 100: 2,239 normal beats, 33 atrial premature, 1 ventricular premature.
    # The first two
    # normal beats lie too close to the start for a window.
    assert int((split.y_train == 1).sum() + (split.y_test == 1).sum()) == 34
    assert int((split.y_train == 0).sum() + (split.y_test == 0).sum()) == 2_237


def test_mfcc_agrees_with_a_frame_computed_by_hand():
    rng = np.random.default_rng(3)
    signal = rng.standard_normal((1, data.FSDD_RATE_HZ)) / 8
    frame = signal[0, 160:480] - 0.97 * signal[0, 159:479]
    spectrum = np.array(
        [abs(sum(frame * np.hanning(320) * np.exp(-2j * np.pi * k * np.arange(320) / 512))) ** 2 for k in range(257)]
    )
    edges = 700 * (10 ** (np.linspace(*(2595 * np.log10(1 + f / 700) for f in (20, 4000)), 42) / 2595) - 1)
    bins = np.arange(257) * 8000 / 512
    band = 17
    filtered = np.interp(bins, edges[band : band + 3], [0, 1, 0])
    assert data.log_mel(signal)[0, 1, band] == pytest.approx(np.log(filtered @ spectrum + 1e-6), rel=1e-9)


def test_missing_data_names_the_variable(monkeypatch):
    monkeypatch.delenv("EDGEMAT_DATA", raising=False)
    with pytest.raises(data.DataMissingError, match="EDGEMAT_DATA is unset"):
        data.mnist()
