"""Which torch modules, functions and methods mean which operation."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

MODULES: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.ConvTranspose2d: "conv",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.ReLU: "relu",
    nn.ReLU6: "clip",
    nn.Hardtanh: "clip",
    nn.LeakyReLU: "prelu",
    nn.PReLU: "prelu",
    nn.Sigmoid: "table",
    nn.Tanh: "table",
    nn.SiLU: "table",
    nn.GELU: "table",
    nn.Hardsigmoid: "table",
    nn.Hardswish: "table",
    nn.Softmax: "softmax",
    nn.RMSNorm: "row_norm",
    nn.LayerNorm: "row_norm",
    nn.Embedding: "embedding",
    nn.AvgPool1d: "avg_pool",
    nn.AvgPool2d: "avg_pool",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool",
    nn.MaxPool1d: "max_pool",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool",
    nn.Identity: "keep",
    nn.Flatten: "keep",
    nn.Unflatten: "keep",
    nn.Dropout: "keep",
    nn.Dropout1d: "keep",
    nn.Dropout2d: "keep",
    nn.ZeroPad1d: "pad",
    nn.ZeroPad2d: "pad",
    nn.ConstantPad1d: "pad",
    nn.ConstantPad2d: "pad",
    nn.Upsample: "upsample",
    nn.UpsamplingNearest2d: "upsample",
}

FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu: "relu",
    F.relu_: "relu",
    F.relu6: "clip",
    F.hardtanh: "clip",
    F.hardtanh_: "clip",
    torch.clamp: "clip",
    torch.clip: "clip",
    F.leaky_relu: "prelu",
    F.leaky_relu_: "prelu",
    F.prelu: "prelu",
    torch.prelu: "prelu",
    torch.sigmoid: "table",
    F.sigmoid: "table",
    torch.tanh: "table",
    F.tanh: "table",
    F.silu: "table",
    F.gelu: "table",
    F.hardsigmoid: "table",
    F.hardswish: "table",
    F.softmax: "softmax",
    F.rms_norm: "row_norm",
    F.layer_norm: "row_norm",
    torch.softmax: "softmax",
    F.avg_pool1d: "avg_pool",
    F.avg_pool2d: "avg_pool",
    F.adaptive_avg_pool1d: "adaptive_avg_pool",
    F.adaptive_avg_pool2d: "adaptive_avg_pool",
    torch.mean: "mean",
    F.max_pool1d: "max_pool",
    F.max_pool2d: "max_pool",
    torch.max_pool1d: "max_pool",
    torch.max_pool2d: "max_pool",
    F.adaptive_max_pool1d: "adaptive_max_pool",
    F.adaptive_max_pool2d: "adaptive_max_pool",
    operator.add: "add",
    operator.iadd: "add",
    torch.add: "add",
    operator.sub: "sub",
    operator.isub: "sub",
    torch.sub: "sub",
    operator.mul: "mul",
    operator.imul: "mul",
    torch.mul: "mul",
    operator.truediv: "div",
    torch.div: "div",
    operator.neg: "neg",
    torch.neg: "neg",
    operator.matmul: "matmul",
    torch.matmul: "matmul",
    torch.bmm: "matmul",
    torch.cat: "cat",
    torch.concat: "cat",
    torch.concatenate: "cat",
    torch.stack: "stack",
    F.pad: "pad",
    F.interpolate: "upsample",
    F.dropout: "keep",
    F.dropout1d: "keep",
    F.dropout2d: "keep",
    torch.flatten: "keep",
    torch.reshape: "keep",
    torch.permute: "keep",
    torch.transpose: "keep",
    torch.squeeze: "keep",
    torch.unsqueeze: "keep",
    torch.split: "split",
    torch.chunk: "split",
    torch.narrow: "keep",
    torch.argmax: "arg_max",
    operator.getitem: "keep",
    getattr: "keep",
}

METHODS: dict[str, str] = {
    "relu": "relu",
    "relu_": "relu",
    "clamp": "clip",
    "clamp_": "clip",
    "clip": "clip",
    "sigmoid": "table",
    "tanh": "table",
    "softmax": "softmax",
    "mean": "mean",
    "add": "add",
    "add_": "add",
    "sub": "sub",
    "sub_": "sub",
    "mul": "mul",
    "mul_": "mul",
    "div": "div",
    "neg": "neg",
    "matmul": "matmul",
    "bmm": "matmul",
    "argmax": "arg_max",
    "flatten": "keep",
    "unflatten": "keep",
    "view": "keep",
    "reshape": "keep",
    "permute": "keep",
    "transpose": "keep",
    "squeeze": "keep",
    "unsqueeze": "keep",
    "split": "split",
    "chunk": "split",
    "narrow": "keep",
    "contiguous": "keep",
    "clone": "keep",
    "detach": "keep",
    "size": "keep",
    "dim": "keep",
}

# Operations whose exact result carries no format of its own until a quantiser follows.
ARITHMETIC = (
    "linear",
    "conv",
    "batch_norm",
    "relu",
    "clip",
    "prelu",
    "add",
    "sub",
    "mul",
    "div",
    "neg",
    "matmul",
    "cat",
    "stack",
)
# Activations that take an exact accumulator and bring the quantiser themselves.
WEIGHTED = ("linear", "conv")
ABSORBING = ("relu", "clip")
# Results that only rearrange or select values.
TRANSPARENT = ("keep", "split", "max_pool", "adaptive_max_pool", "pad", "upsample", "arg_max")

TABLE_NAMES: dict[Any, str] = {
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    F.tanh: "tanh",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardsigmoid: "hardsigmoid",
    F.hardswish: "hardswish",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def module_type(module: nn.Module) -> type[nn.Module] | None:
    """The torch layer a module is, or inherits its forward from."""
    for kind in type(module).__mro__:
        if kind in MODULES:
            return kind
    return None


def kind_of(node: fx.Node, root: nn.Module) -> str | None:
    """The operation of a node: a value of the tables above, a node kind, or None where it is unknown."""
    if node.op == "call_module":
        found = module_type(root.get_submodule(str(node.target)))
        return MODULES[found] if found is not None else "edgemat" if _is_ours(root, node) else None
    if node.op == "call_function":
        return FUNCTIONS.get(node.target)
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    return node.op


def _is_ours(root: nn.Module, node: fx.Node) -> bool:
    return type(root.get_submodule(str(node.target))).__module__.startswith("edgemat.nn")


def as_number(value: Any) -> float | None:
    """A Python number as float, or None."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
