"""HGQ2 on Keras with the torch backend, in the peers' environment: stated widths, and the accuracy/EBOPs front.

Stated widths: weights SAT_SYM with an exponent for each output channel, activations SAT with an exponent for each
tensor, exponents trained and started where the squared error is least, widths held by a constraint. Fronts: HGQ2's
defaults, a width for each weight and each activation, data in WRAP, a growing beta, `trace_minmax` before anything is
counted.
"""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from hgq.config import LayerConfigScope, QuantizerConfig
from hgq.constraints import MinMax
from hgq.layers import QAdd, QBatchNormalization, QConv2D, QDense
from hgq.utils import trace_minmax

from tests.benchmarks.qat import bits, float_start
from tests.benchmarks.qat.protocol import SHAPES, Job, Split, cost_weight, learning_rate, load, order


class Batches(keras.utils.PyDataset):
    """The samples in the order every method sees."""

    def __init__(self, job: Job, x: np.ndarray, y: np.ndarray):
        super().__init__()
        self.job, self.x, self.y, self.epoch = job, x, y, 0
        self.rows = order(job, 0, len(x))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self.rows[index]
        return self.x[rows], self.y[rows]

    def on_epoch_end(self) -> None:
        """The next epoch's order."""
        self.epoch += 1
        self.rows = order(self.job, self.epoch, len(self.x))


class Schedule(keras.callbacks.Callback):
    """Sets the learning rate, and beta where it grows, before each step."""

    def __init__(self, job: Job, steps: int, rate: float, betas: tuple[float, float] | None = None):
        super().__init__()
        self.job, self.steps, self.rate, self.betas, self.step = job, steps, rate, betas, 0

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """One step begins."""
        self.model.optimizer.learning_rate = learning_rate(
            self.step, self.steps, self.rate, int(self.job.option("cycles", 1))
        )
        if self.betas is not None:
            beta = cost_weight(self.step, self.steps, *self.betas)
            for layer in self.model.layers:
                if getattr(layer, "_beta", None) is not None:
                    layer._beta.assign(beta)
        self.step += 1


def channels_last(x: np.ndarray) -> np.ndarray:
    """Images as Keras has them."""
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def predict(model: keras.Model, x: np.ndarray) -> np.ndarray:
    """Outputs in inference mode."""
    parts = [model(x[i : i + 1000], training=False) for i in range(0, len(x), 1000)]
    return np.concatenate([keras.ops.convert_to_numpy(part) for part in parts])


def accuracy(model: keras.Model, x: np.ndarray, y: np.ndarray) -> float:
    """Part of the samples whose largest output is the label."""
    return float((predict(model, x).argmax(1) == y).mean())


class Fixed:
    """Layers of a stated width."""

    def __init__(self, job: Job):
        self.job, self.bits = job, job.bits
        self.mode = str(job.option("activations", "SAT"))

    def held(self, width: int) -> dict[str, Any]:
        """A width that training does not move."""
        return {"b0": width, "bc": MinMax(width, width), "br": None}

    def first(self) -> QuantizerConfig:
        """The inputs, which lie on their grid already."""
        width, frac, signed = self.job.budget.input
        magnitude = width - signed
        return QuantizerConfig(
            "kbi", "datalane", k0=signed, i0=magnitude - frac, overflow_mode="SAT", trainable=False,
            heterogeneous_axis=(), homogeneous_axis=None, **self.held(magnitude),
        )  # fmt: skip

    def data(self, signed: bool = False) -> QuantizerConfig:
        """Activations: one exponent for the tensor."""
        extra = {"i_decay_speed": 0.01} if self.mode == "WRAP" else {}
        return QuantizerConfig(
            "kbi", "datalane", k0=signed, overflow_mode=self.mode, heterogeneous_axis=(), homogeneous_axis=None,
            **self.held(self.bits - signed), **extra,
        )  # fmt: skip

    def weights(self) -> QuantizerConfig:
        """Weights: one exponent for each output channel."""
        return QuantizerConfig(
            "kbi", "weight", heterogeneous_axis=(-1,), homogeneous_axis=None, **self.held(self.bits - 1)
        )

    def wide(self, place: str) -> QuantizerConfig:
        """Biases and the affine of a batch norm, 24 bits: not what is compared."""
        return QuantizerConfig("kbi", place, i0=8, overflow_mode="SAT_SYM", **self.held(23))

    def dense(self, units: int, first: bool = False, **more: Any) -> QDense:
        """A dense layer."""
        iq = self.first() if first else self.data()
        return QDense(units, kq_conf=self.weights(), iq_conf=iq, bq_conf=self.wide("bias"), **more)

    def conv(self, filters: int, kernel: int, first: bool = False, **more: Any) -> QConv2D:
        """A convolution."""
        iq = self.first() if first else self.data()
        return QConv2D(filters, kernel, kq_conf=self.weights(), iq_conf=iq, bq_conf=self.wide("bias"), **more)

    def norm(self, name: str) -> QBatchNormalization:
        """A batch norm whose input is the accumulator."""
        return QBatchNormalization(
            momentum=0.9,
            epsilon=1e-5,
            kq_conf=self.wide("weight"),
            bq_conf=self.wide("bias"),
            enable_iq=False,
            name=name,
        )


def mlp(made: Fixed) -> keras.Model:
    """`tests.networks.models.Mlp`."""
    x = inputs = keras.Input(SHAPES["mlp"])
    for i, units in enumerate((64, 32, 32)):
        x = made.dense(units, first=i == 0, activation="relu", name=f"{2 * i}")(x)
    return keras.Model(inputs, made.dense(2, name="6")(x))


def lenet(made: Fixed) -> keras.Model:
    """`tests.networks.models.LeNet`."""
    x = inputs = keras.Input((28, 28, 1))
    x = made.conv(6, 5, first=True, padding="same", activation="relu", name="conv1")(x)
    x = keras.layers.MaxPooling2D()(x)
    x = made.conv(16, 5, activation="relu", name="conv2")(x)
    x = keras.layers.Flatten()(keras.layers.MaxPooling2D()(x))
    x = made.dense(120, activation="relu", name="fc1")(x)
    x = made.dense(84, activation="relu", name="fc2")(x)
    return keras.Model(inputs, made.dense(10, name="fc3")(x))


def resnet8(made: Fixed) -> keras.Model:
    """`tests.networks.models.ResNet8`: torch pads strided convolutions on both sides."""

    def padded(x: Any, filters: int, kernel: int, name: str, stride: int = 1, first: bool = False) -> Any:
        x = keras.layers.ZeroPadding2D(kernel // 2)(x) if kernel > 1 else x
        return made.conv(filters, kernel, first=first, strides=stride, name=name)(x)

    def stack(x: Any, filters: int, stride: int, name: str) -> Any:
        y = made.norm(f"{name}__bn1")(padded(x, filters, 3, f"{name}__conv1", stride))
        y = padded(keras.layers.ReLU()(y), filters, 3, f"{name}__conv2")
        y = made.norm(f"{name}__bn2")(y)
        same = stride == 1 and x.shape[-1] == filters
        side = x if same else padded(x, filters, 1, f"{name}__shortcut", stride)
        joined = QAdd(iq_confs=[made.data(signed=True), made.data(signed=not same)], name=f"{name}__add")([y, side])
        return keras.layers.ReLU()(joined)

    x = inputs = keras.Input((32, 32, 3))
    x = keras.layers.ReLU()(made.norm("bn")(padded(x, 16, 3, "conv", first=True)))
    for i, (filters, stride) in enumerate(((16, 1), (32, 2), (64, 2))):
        x = stack(x, filters, stride, f"stack{i + 1}")
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(8)(x))
    return keras.Model(inputs, made.dense(10, name="dense")(x))


NETWORKS = {"mlp": mlp, "lenet": lenet, "resnet8": resnet8}


def set_weights(model: keras.Model, arrays: dict[str, np.ndarray]) -> None:
    """The float network's weights, in Keras' layouts."""
    for layer in model.layers:
        name = layer.name.replace("__", ".")  # a torch module's name holds no dot
        if f"{name}.weight" not in arrays:
            continue
        weight = arrays[f"{name}.weight"]
        if isinstance(layer, QBatchNormalization):
            layer.bn_gamma.assign(weight)
            layer.bn_beta.assign(arrays[f"{name}.bias"])
            layer.moving_mean.assign(arrays[f"{name}.running_mean"])
            layer.moving_variance.assign(arrays[f"{name}.running_var"])
            continue
        if name == "fc1":  # behind a flattened 5x5 map of 16 channels
            weight = weight.reshape(-1, 16, 5, 5).transpose(0, 2, 3, 1).reshape(len(weight), -1)
        layer._kernel.assign(weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0))
        layer.bias.assign(arrays[f"{name}.bias"])


def best_exponents(rows: np.ndarray, width: int, signed: bool) -> np.ndarray:
    """For each row the integer bits of the least squared error: ``width`` magnitude bits, symmetric where signed."""
    top = np.ceil(np.log2(np.abs(rows).max(1) + 1e-12))
    errors = []
    for down in range(6):
        step = 2.0 ** (top - down - width)[:, None]
        low = -(2**width) + 1 if signed else 0
        codes = np.clip(np.floor(rows / step + 0.5), low, 2**width - 1)
        errors.append(((codes * step - rows) ** 2).sum(1))
    return top - np.argmin(errors, axis=0)


def calibrate(model: keras.Model, made: Fixed, x: np.ndarray) -> None:
    """Starts the exponents of a stated width from the weights and from float activations."""
    quantizers = []
    for layer in model.layers:
        if isinstance(layer, QBatchNormalization):
            continue
        if hasattr(layer, "kq"):
            kernel = keras.ops.convert_to_numpy(layer._kernel)
            rows = kernel.reshape(-1, kernel.shape[-1]).T
            found = best_exponents(rows, made.bits - 1, True)
            layer.kq.quantizer._i.assign(found.reshape(layer.kq.quantizer._i.shape))
        if hasattr(layer, "iq"):
            several = isinstance(layer.iq, (tuple, list)) or hasattr(layer.iq, "quantizers")
            quantizers += list(layer.iq) if several else [layer.iq]
    # The float activations: every quantiser of data lets its values pass and keeps them.
    originals = {}
    seen: dict[int, np.ndarray] = {}

    def observe(quantizer: Any) -> Any:
        def call(values: Any, training: Any = None) -> Any:
            seen[id(quantizer)] = keras.ops.convert_to_numpy(values)
            return values

        return call

    for q in quantizers:
        originals[id(q)], q.call = q.call, observe(q)
    kernels = [
        layer.kq for layer in model.layers if hasattr(layer, "kq") and not isinstance(layer, QBatchNormalization)
    ]
    for q in kernels:
        originals[id(q)], q.call = q.call, lambda values, training=None: values
    model(x, training=False)
    for q in quantizers + kernels:
        q.call = originals[id(q)]
    for q in quantizers:
        if not q.config["trainable"] or q.config["overflow_mode"] == "WRAP":
            continue
        signed = bool(q.config["k0"])
        found = best_exponents(seen[id(q)].reshape(1, -1), made.bits - signed, signed)
        q.quantizer._i.assign(found.reshape(q.quantizer._i.shape))


def compiled(model: keras.Model) -> None:
    """Adam on the cross entropy, as every method."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-3, epsilon=1e-8), loss=loss)


def run(job: Job, folder: Path) -> dict[str, Any]:
    """Trains one point, or a front."""
    keras.utils.set_random_seed(job.seed)
    split = load(job)
    last = {name: channels_last(getattr(split, name)) for name in ("x", "x_validation", "x_test")}
    split = replace(split, **last)
    return front(job, folder, split) if job.task == "front" else fixed(job, folder, split)


def fixed(job: Job, folder: Path, split: Split) -> dict[str, Any]:
    """One point of a stated width."""
    made = Fixed(job)
    with LayerConfigScope(enable_ebops=False):
        model = NETWORKS[job.network](made)
    set_weights(model, float_start.arrays(job, folder))
    calibrate(model, made, split.x[:1024])
    start = accuracy(model, split.x_validation, split.y_validation)
    compiled(model)
    data = Batches(job, split.x, split.y)
    schedule = Schedule(job, len(data) * job.budget.epochs, float(job.option("rate", job.budget.rate)))
    model.fit(data, epochs=job.budget.epochs, callbacks=[schedule], verbose=0, shuffle=False)
    if made.mode == "WRAP":
        trace_minmax(model, split.x)
    return {
        "start": start,
        "validation": accuracy(model, split.x_validation, split.y_validation),
        "test": accuracy(model, split.x_test, split.y_test),
    }


# -- fronts --------------------------------------------------------------------------------------------------------


def front_model(job: Job) -> keras.Model:
    """The MLP with HGQ2's defaults for learned widths; the initial ones are options."""
    weight_bits, data_bits = int(job.option("weight_bits", 8)), int(job.option("data_bits", 6))
    if job.option("weights", "kbi") == "kif":  # the integer bits follow each weight's value, as in the first HGQ
        weight = QuantizerConfig("kif", "weight", f0=weight_bits, overflow_mode="WRAP")
    else:
        weight = QuantizerConfig("kbi", "weight", b0=weight_bits)
    kq = {"kq_conf": weight, "bq_conf": QuantizerConfig("kbi", "bias", b0=8)}
    x = inputs = keras.Input(SHAPES[job.network])
    with LayerConfigScope(enable_ebops=True, beta0=float(job.option("first", 1e-6))):
        for i, units in enumerate((64, 32, 32)):
            iq = QuantizerConfig("kif", "datalane", f0=data_bits)
            x = QDense(units, activation="relu", iq_conf=iq, name=f"{2 * i}", **kq)(x)
        return keras.Model(
            inputs, QDense(2, iq_conf=QuantizerConfig("kif", "datalane", f0=data_bits), name="6", **kq)(x)
        )


def codes(values: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """Integers on the finest of the grids."""
    scaled = values.astype(np.float64) * 2.0 ** float(fraction.max())
    found = np.rint(scaled).astype(np.int64)
    assert np.array_equal(found, scaled), "a weight is off its grid"
    return found


def count(model: keras.Model) -> tuple[int, int]:
    """EBOPs of the multiplications, and bits of the biases, from HGQ2's own integers and formats."""
    numpy = keras.ops.convert_to_numpy
    products = sums = 0
    for layer in model.layers:
        if not isinstance(layer, QDense):
            continue
        kernel = codes(numpy(layer.qkernel), numpy(layer.kq.quantizer.f))
        inner = layer.iq.quantizer
        widths = np.maximum(numpy(inner.i) + numpy(inner.f), 0).reshape(-1)
        products += bits.dense(kernel.T, widths.astype(np.int64))
        sums += bits.biases(codes(numpy(layer.qbias), numpy(layer.bq.quantizer.f)))
    return products, sums


class Points(keras.callbacks.Callback):
    """Counts and evaluates after each epoch; the traced ranges are put back before training goes on."""

    def __init__(self, split: Split):
        super().__init__()
        self.split = split
        self.found: list[dict[str, Any]] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """One point of the front."""
        moving = [v for v in self.model.non_trainable_variables if v.path.endswith(("/i", "/k", "/ebops"))]
        kept = [keras.ops.convert_to_numpy(v).copy() for v in moving]
        reported = trace_minmax(self.model, self.split.x, batch_size=2048)
        products, sums = count(self.model)
        self.found.append({
            "epoch": epoch, "ebops": products, "bias_bits": sums, "reported": int(reported),
            "validation": accuracy(self.model, self.split.x_validation, self.split.y_validation),
            "test": accuracy(self.model, self.split.x_test, self.split.y_test),
        })  # fmt: skip
        for variable, value in zip(moving, kept, strict=True):
            variable.assign(value)


def front(job: Job, folder: Path, split: Split) -> dict[str, Any]:
    """One training with a growing beta; a point after each epoch."""
    model = front_model(job)
    set_weights(model, float_start.arrays(job, folder))
    compiled(model)
    data = Batches(job, split.x, split.y)
    betas = (float(job.option("first", 1e-6)), float(job.option("last", 1e-3)))
    schedule = Schedule(job, len(data) * job.budget.epochs, float(job.option("rate", job.budget.rate)), betas)
    points = Points(split)
    model.fit(data, epochs=job.budget.epochs, callbacks=[schedule, points], verbose=0, shuffle=False)
    return {"points": points.found}
