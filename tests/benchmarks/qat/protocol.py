"""What is trained, for how long and on which samples: the same for every method. NumPy only, for every interpreter."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace

import numpy as np

from tests.networks import data

VERSION = 1  # of the protocol: results of another one are not read
BITS = (8, 6, 4, 3, 2)
SEEDS = (0, 1, 2)
WARM_UP = 0.1  # part of the steps in which the learning rate rises


@dataclass(frozen=True)
class Network:
    """A network, its data and its budget.

    Attributes:
        samples: Training samples taken, or 0 for all that the validation split leaves.
        validation: Samples held out of the training split; learning rates and fronts are chosen on them.
        input: Width, fractional bits and signedness of the inputs, which every method gets on that grid.
        float_epochs: Passes of the float training.
        epochs: Passes of every quantised training.
        batch: Samples of a step.
        float_rate: Peak learning rate of the float training (Adam).
        rate: Peak learning rate of the quantised trainings (Adam).
        test: Test samples, or 0 for all.
    """

    samples: int
    validation: int
    input: tuple[int, int, bool]
    float_epochs: int
    epochs: int
    batch: int
    float_rate: float
    rate: float
    test: int = 0


NETWORKS = {
    "mlp": Network(0, 2_434, (8, 4, True), 30, 20, 128, 5e-3, 5e-3),
    "lenet": Network(20_000, 5_000, (8, 8, False), 3, 2, 64, 2e-3, 2e-3),
    "resnet8": Network(3_000, 600, (8, 7, True), 6, 2, 64, 3e-3, 2e-3, 2_000),
}
SHORT = {
    "mlp": replace(NETWORKS["mlp"], float_epochs=6, epochs=4),
    "lenet": replace(NETWORKS["lenet"], samples=4_000, float_epochs=2, epochs=1, test=1_000),
    "resnet8": replace(NETWORKS["resnet8"], samples=1_200, float_epochs=2, epochs=1, test=500),
}
SHAPES = {"mlp": (10,), "lenet": (1, 28, 28), "resnet8": (3, 32, 32)}


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        task: ``float``, ``fixed`` (stated widths) or ``front`` (learned widths under a growing cost); ``exact-fixed``
            and ``exact-front`` compare what was exported of them.
        method: ``float``, ``ptq``, ``edgemat``, ``brevitas`` or ``hgq2``.
        network: Key of `NETWORKS`.
        bits: Width of weights and activations; 0 where it is learned or there is none.
        seed: Of the initial weights and of the order of the samples.
        budget: The network's settings.
        options: What else the trainer takes, as pairs.
    """

    task: str
    method: str
    network: str
    bits: int
    seed: int
    budget: Network
    options: tuple[tuple[str, float | str], ...] = ()

    @property
    def key(self) -> str:
        """Name of the result: readable, and different for every setting."""
        settings = json.dumps({"version": VERSION, **asdict(self)}, sort_keys=True)
        digest = hashlib.sha256(settings.encode()).hexdigest()[:10]
        width = f"-{self.bits}" if self.bits else ""
        return f"{self.task}-{self.network}-{self.method}{width}-{self.seed}-{digest}"

    def option(self, name: str, default: float | str) -> float | str:
        """A setting of this job, or its default."""
        return dict(self.options).get(name, default)

    def dump(self) -> str:
        """The job as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Job:
        """The job that `dump` wrote."""
        fields = json.loads(text)
        budget = fields.pop("budget")
        budget["input"] = tuple(budget["input"])
        options = tuple((str(key), value) for key, value in fields.pop("options"))
        return cls(budget=Network(**budget), options=options, **fields)

    def start(self) -> Job:
        """The float training this one starts from."""
        return Job("float", "float", self.network, 0, self.seed, replace(self.budget, epochs=0, rate=0.0))


@dataclass(frozen=True)
class Split:
    """Inputs on the grid of the network's input format, float32, and labels, int64."""

    x: np.ndarray
    y: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray


LOADERS = {
    "mlp": data.magic_gamma,
    "lenet": data.mnist,
    "resnet8": lambda: data.cifar10_jpeg(600, 200),
}


def on_grid(x: np.ndarray, grid: tuple[int, int, bool]) -> np.ndarray:
    """Rounds half up and saturates to the input format."""
    width, frac, signed = grid
    low, high = (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    codes = np.clip(np.floor(x.astype(np.float64) * 2.0**frac + 0.5), low, high)
    return (codes / 2.0**frac).astype(np.float32)


def load(job: Job) -> Split:
    """The samples of a job. The validation split is the end of the training split, for every seed the same."""
    found, budget = LOADERS[job.network](), job.budget
    kept = len(found.x_train) - budget.validation
    train = slice(0, min(budget.samples or kept, kept))
    test = slice(0, budget.test or len(found.x_test))
    return Split(
        on_grid(found.x_train[train], budget.input),
        found.y_train[train],
        on_grid(found.x_train[kept:], budget.input),
        found.y_train[kept:],
        on_grid(found.x_test[test], budget.input),
        found.y_test[test],
    )


def order(job: Job, epoch: int, samples: int) -> np.ndarray:
    """Rows of each step of an epoch, ``[steps, batch]``: whole batches only."""
    steps = samples // job.budget.batch
    rows = np.random.default_rng([job.seed, epoch]).permutation(samples)[: steps * job.budget.batch]
    return rows.reshape(steps, job.budget.batch)


def learning_rate(step: int, steps: int, peak: float, cycles: int = 1) -> float:
    """Linear warm-up, then half a cosine to zero; several cycles restart at the peak, without another warm-up.

    Args:
        step: The step.
        steps: Number of steps.
        peak: Largest rate.
        cycles: Parts of equal length, each of which ends near zero.
    """
    length = steps / cycles
    rise = max(1, round(WARM_UP * length))
    if step < rise:
        return peak * (step + 1) / rise
    first = rise if step < length else 0
    place = (step % length if step >= length else step) - first
    return peak * 0.5 * (1 + math.cos(math.pi * place / max(1.0, length - first)))


def cost_weight(step: int, steps: int, first: float, last: float) -> float:
    """Weight of the cost in a front's training: a geometric ramp."""
    return first * (last / first) ** (step / max(1, steps - 1))
