"""Real data sets for the network tests, read from the folder that ``EDGEMAT_DATA`` names.

Every loader returns a :class:`DataSet` of float32 inputs (channels first) and int64 labels. Inputs are
scaled so that
the 8-bit formats of :mod:`networks.recipes` hold them: images exactly (a byte stays a byte), features with
a clear margin.
"""

from __future__ import annotations

import io
import os
import wave
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MFCC_FRAMES = 49
MFCC_COEFFICIENTS = 10
FSDD_RATE_HZ = 8_000


class DataMissingError(LookupError):
    """The data set is not on this machine; the message says which variable or folder is missing."""


@dataclass(frozen=True)
class DataSet:
    """A training and a test split.

    Attributes:
        x_train: Inputs, float32, ``[N, ...]``, channels first.
        y_train: Labels, int64, ``[N]`` (for an autoencoder: the digit that was spoken, unused in training).
        x_test: As ``x_train``.
        y_test: As ``y_train``.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


def folder(name: str) -> Path:
    """The folder of one data set.

    Raises:
        DataMissingError: ``EDGEMAT_DATA`` is unset, or holds no such folder.
    """
    root = os.environ.get("EDGEMAT_DATA")
    if not root:
        raise DataMissingError(f"EDGEMAT_DATA is unset: set it to the folder that holds {name}/")
    path = Path(root) / name
    if not path.is_dir():
        raise DataMissingError(f"{path} is missing: EDGEMAT_DATA must name the folder that holds {name}/")
    return path


def _dataset(x_train, y_train, x_test, y_test) -> DataSet:
    return DataSet(
        np.ascontiguousarray(x_train, dtype=np.float32),
        np.asarray(y_train, dtype=np.int64),
        np.ascontiguousarray(x_test, dtype=np.float32),
        np.asarray(y_test, dtype=np.int64),
    )


def magic_gamma() -> DataSet:
    """MAGIC gamma telescope: 10 normalised features, label 1 for a gamma shower; a fifth of the rows is the
    test split.
    """
    rows = (folder("magic_gamma") / "train.csv").read_text().split()[1:]
    table = [row.split(",") for row in rows]
    x = np.array([row[:10] for row in table], dtype=np.float64)
    y = np.array([row[10] == "g" for row in table], dtype=np.int64)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = x[order], y[order]
    test = len(x) // 5
    mean, deviation = x[test:].mean(axis=0), x[test:].std(axis=0)
    x = (x - mean) / deviation
    return _dataset(x[test:], y[test:], x[:test], y[:test])


def mnist() -> DataSet:
    """MNIST: 60,000 and 5,000 images ``[1, 28, 28]``; a byte ``b`` is the value ``b / 256``, exact in
    ``ufixed<8,0>``.
    """
    with np.load(folder("mnist") / "mnist.npz") as z:
        return _dataset(
            z["x_train"][:, None] / np.float32(256),
            z["y_train"],
            z["x_test"][:, None] / np.float32(256),
            z["y_test"],
        )


def cifar10_jpeg(train_per_class: int = 2_000, test_per_class: int = 500) -> DataSet:
    """CIFAR-10 from lossy JPEG copies: images ``[3, 32, 32]``; a byte is ``(b - 128) / 128``, exact in
    ``fixed<8,1>``.

    Accuracies on it are never CIFAR-10 accuracies. Needs Pillow.

    Args:
        train_per_class: Images of each class to decode, at most 2,000.
        test_per_class: As above, at most 500.
    """
    from PIL import Image

    def decode(archive: zipfile.ZipFile, split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
        names = sorted(n for n in archive.namelist() if n.startswith(f"{split}/") and n.endswith(".jpg"))
        classes = sorted({n.split("/")[1] for n in names})
        images, labels = [], []
        for label, name in enumerate(classes):
            for path in [n for n in names if n.split("/")[1] == name][:count]:
                images.append(np.asarray(Image.open(io.BytesIO(archive.read(path))).convert("RGB")))
                labels.append(label)
        order = np.random.default_rng(1).permutation(len(images))
        x = (np.stack(images)[order].astype(np.float32) - 128) / 128
        return x.transpose(0, 3, 1, 2), np.array(labels)[order]

    with zipfile.ZipFile(folder("cifar10_jpeg") / "cifar10_jpg_train20k_test5k.zip") as archive:
        return _dataset(*decode(archive, "train", train_per_class), *decode(archive, "test", test_per_class))


def _mel_filters(bands: int, fft: int, rate_hz: int, low_hz: float, high_hz: float) -> np.ndarray:
    """Triangular filters on the mel scale ``2595 log10(1 + f / 700)``; ``[bands, fft // 2 + 1]``."""
    mel_low, mel_high = (2595 * np.log10(1 + f / 700) for f in (low_hz, high_hz))
    edges = 700 * (10 ** (np.linspace(mel_low, mel_high, bands + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(fft, 1 / rate_hz)
    left, centre, right = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    return np.maximum(0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre)))


def log_mel(signals: np.ndarray, bands: int = 40) -> np.ndarray:
    """Log mel spectrogram: 40 ms Hann frames every 20 ms at 8 kHz, after a pre-emphasis of 0.97.

    Args:
        signals: ``[N, samples]`` in -1..1.
        bands: Mel bands from 20 Hz to 4 kHz.

    Returns:
        ``[N, frames, bands]`` float64, natural logarithm.
    """
    frame, hop, fft = FSDD_RATE_HZ * 40 // 1000, FSDD_RATE_HZ * 20 // 1000, 512
    emphasised = np.concatenate([signals[:, :1], signals[:, 1:] - 0.97 * signals[:, :-1]], axis=1)
    frames = np.lib.stride_tricks.sliding_window_view(emphasised, frame, axis=1)[:, ::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(frame), fft)) ** 2
    return np.log(power @ _mel_filters(bands, fft, FSDD_RATE_HZ, 20, FSDD_RATE_HZ / 2).T + 1e-6)


def _spoken_digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All recordings cropped or padded to one second, their digits, and whether each is in the test split
    (idx 0-4).
    """
    signals, digits, test = [], [], []
    with zipfile.ZipFile(folder("fsdd") / "fsdd_wav.zip") as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".wav")):
            with wave.open(io.BytesIO(archive.read(name))) as recording:
                raw = np.frombuffer(recording.readframes(recording.getnframes()), dtype="<i2")[:FSDD_RATE_HZ]
            digit, _, index = Path(name).stem.split("_")
            signals.append(np.pad(raw / 32768.0, (0, FSDD_RATE_HZ - len(raw))))
            digits.append(int(digit))
            test.append(int(index) <= 4)
    return np.stack(signals), np.array(digits), np.array(test)


def fsdd() -> DataSet:
    """Spoken digits as MFCC maps ``[1, 49, 10]``, each coefficient normalised over the training split, then
    halved.
    """
    signals, digits, test = _spoken_digits()
    mel = log_mel(signals)
    bands = mel.shape[-1]
    k = np.arange(MFCC_COEFFICIENTS)[:, None]
    dct = np.sqrt(2 / bands) * np.cos(np.pi * k * (np.arange(bands) + 0.5) / bands)
    features = mel @ dct.T
    assert features.shape[1:] == (MFCC_FRAMES, MFCC_COEFFICIENTS)
    train = features[~test]
    features = (features - train.mean(axis=(0, 1))) / (2 * train.std(axis=(0, 1)))
    x = features[:, None]
    return _dataset(x[~test], digits[~test], x[test], digits[test])


def fsdd_windows(windows_per_recording: int = 4) -> DataSet:
    """Autoencoder inputs ``[640]``: five successive log-mel frames of 128 bands of the loudest part of a
    spoken digit.
    """
    signals, digits, test = _spoken_digits()
    mel = log_mel(signals, bands=128)
    windows = np.lib.stride_tricks.sliding_window_view(mel, 5, axis=1)[:, ::5].transpose(0, 1, 3, 2)
    loudest = np.argsort(-windows.mean(axis=(2, 3)), axis=1, kind="stable")[:, :windows_per_recording]
    x = np.take_along_axis(windows, loudest[:, :, None, None], axis=1)
    x = (x - x[~test].mean()) / (2 * x[~test].std())

    def rows(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x[chosen].reshape(-1, 640), np.repeat(digits[chosen], windows_per_recording)

    return _dataset(*rows(~test), *rows(test))


def _wfdb_signals(path: Path, leads: int) -> np.ndarray:
    """Format 212 of WFDB: pairs of 12-bit two's complement samples in three bytes; ``[samples, leads]`` of
    ADC units.
    """
    raw = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int32).reshape(-1, 3)
    first = raw[:, 0] | (raw[:, 1] & 0x0F) << 8
    second = raw[:, 2] | (raw[:, 1] & 0xF0) << 4
    samples = np.stack([first, second], axis=1).ravel()
    return np.where(samples > 2047, samples - 4096, samples).reshape(-1, leads)


def _wfdb_beats(path: Path) -> list[tuple[int, int]]:
    """MIT annotations: ``(sample, annotation code)`` of every annotation (code 1 is a normal beat, 8 an
    atrial premature).
    """
    words = np.frombuffer(path.read_bytes(), dtype="<u2")
    beats, time, position = [], 0, 0
    while position < len(words):
        code, interval = int(words[position]) >> 10, int(words[position]) & 0x3FF
        position += 1
        if code == 0 and interval == 0:
            break
        if code == 59:  # SKIP: a 32-bit interval follows, high half first
            high, low = int(words[position]), int(words[position + 1])
            delta = high << 16 | low
            time += delta - (1 << 32 if delta >= 1 << 31 else 0)
            position += 2
        elif code == 63:  # AUX: so many bytes of text follow
            position += (interval + 1) // 2
        elif code < 50:
            time += interval
            beats.append((time, code))
    return beats


def ecg_mitdb100() -> DataSet:
    """Beats of record 100: ``[2, 192]`` (two leads, 1.07 s at 180 Hz, the preceding beat in view), label 1:
    not normal.

    Even beats are the training split, odd beats the test split.
    """
    path = folder("ecg_mitdb100")
    signals = (_wfdb_signals(path / "100.dat", 2) - 1024) / 200.0
    signals = signals[: len(signals) // 2 * 2].reshape(-1, 2, 2).mean(axis=1)
    before, after = 152, 40
    windows, labels = [], []
    for time, code in _wfdb_beats(path / "100.atr"):
        centre = time // 2
        if 1 <= code <= 13 and centre >= before and centre + after <= len(signals):
            windows.append(signals[centre - before : centre + after].T)
            labels.append(int(code != 1))
    x, y = np.stack(windows), np.array(labels)
    return _dataset(x[::2], y[::2], x[1::2], y[1::2])


def digits() -> DataSet:
    """scikit-learn's handwritten digits ``[1, 8, 8]``, values 0..16 as ``v / 16``; the last 497 are the
    test split.
    """
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, 1, 8, 8) / 16
    return _dataset(x[:1300], y[:1300], x[1300:], y[1300:])
