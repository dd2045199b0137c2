"""Layers with bipolar weights of random geometry, and a definition of their sums that shares nothing with edgemat."""

from __future__ import annotations

import itertools

import numpy as np

from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, tensor

INPUTS = ("bipolar", "bipolar", "fixed<8,3>", "ufixed<8,8>", "fixed<3,1>", "fixed<16,3>", "ufixed<12,3>")
RESULTS = ("", "bipolar", "fixed<5,6,RND,SAT>", "ufixed<4,6,TRN,WRAP>", "fixed<20,14,RND_CONV,SAT>")


def signs(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """-1 and +1 at random."""
    return rng.choice(np.array([-1, 1], np.int64), shape)


def convolution(seed: int) -> Call:
    """A convolution of odd geometry: strides, dilations, one-sided padding, groups and depthwise."""
    rng = np.random.default_rng(seed)
    depthwise = seed % 5 == 4
    groups = int(rng.choice([1, 1, 2, 3]))
    in_c = int(rng.integers(2, 10)) if depthwise else groups * int(rng.integers(1, 24))
    groups = in_c if depthwise else groups
    out_c = in_c * int(rng.integers(1, 3)) if depthwise else groups * int(rng.integers(1, 7))
    kernel = tuple(map(int, rng.integers(1, 4, 2)))
    dilations = tuple(map(int, rng.integers(1, 3, 2)))
    size = [(k - 1) * d + 1 + int(rng.integers(0, 4)) for k, d in zip(kernel, dilations, strict=True)]
    pads = tuple(map(int, rng.integers(0, 3, 4))) if seed % 3 else (0, 0, 0, 0)
    x_format = INPUTS[seed % len(INPUTS)]
    w, codes = constant("bipolar", signs(rng, (out_c, in_c // groups, *kernel)))
    x = tensor(x_format, (None, in_c, *size))
    attrs = {
        "w_format": "bipolar",
        "strides": tuple(map(int, rng.integers(1, 4, 2))),
        "pads": pads,
        "dilations": dilations,
        "groups": groups,
        "requantize": RESULTS[int(rng.integers(len(RESULTS)))],
    }
    if seed % 2:
        return Call(BY_NAME["Conv"], f"conv{seed}", [x, w], attrs, {1: codes})
    frac = x.format.fracs[0]
    b, biases = constant(f"fixed<20,{20 - frac}>", rng.integers(-40, 40, out_c), "b")
    return Call(BY_NAME["Conv"], f"conv{seed}", [x, w, b], attrs, {1: codes, 2: biases})


def linear(seed: int, features: int) -> Call:
    """A fully connected layer."""
    rng = np.random.default_rng(seed)
    outputs = int(rng.integers(1, 9))
    w, codes = constant("bipolar", signs(rng, (outputs, features)))
    x = tensor(INPUTS[seed % len(INPUTS)], (None, features))
    attrs = {"w_format": "bipolar", "requantize": RESULTS[int(rng.integers(len(RESULTS)))]}
    if seed % 2:
        return Call(BY_NAME["Linear"], f"fc{seed}", [x, w], attrs, {1: codes})
    frac = x.format.fracs[0]
    b, biases = constant(f"fixed<20,{20 - frac}>", rng.integers(-40, 40, outputs), "b")
    return Call(BY_NAME["Linear"], f"fc{seed}", [x, w, b], attrs, {1: codes, 2: biases})


def calls(count: int = 35) -> list[Call]:
    """`count` convolutions, and fully connected layers around the ends of words and of blocks of thirty words."""
    lengths = (1, 3, 31, 32, 33, 64, 95, 96, 97, 960, 961, 1000)
    return [convolution(seed) for seed in range(count)] + [linear(seed, n) for seed, n in enumerate(lengths)]


def exact(call: Call) -> Call:
    """The same without its epilogue."""
    return Call(call.op, call.name, call.x, {**call.attrs, "requantize": ""}, call.constants)


def plain_sum(call: Call, x: np.ndarray) -> np.ndarray:
    """The exact sums as loops over outputs and taps; a padded tap is left out."""
    w, b = call.constants[1], call.constants.get(2)
    if call.op.name == "Linear":
        return x @ w.T + (0 if b is None else b)
    _, _, height, width = x.shape
    out_c, per_group, kernel_h, kernel_w = w.shape
    (stride_h, stride_w), (dil_h, dil_w) = call.attrs["strides"], call.attrs["dilations"]
    top, left = call.attrs["pads"][:2]
    group_out = out_c // call.attrs["groups"]
    out_h, out_w = call.exact[0].shape[2:]
    y = np.zeros((len(x), out_c, out_h, out_w), dtype=np.int64)
    for o, oy, ox in itertools.product(range(out_c), range(out_h), range(out_w)):
        start = o // group_out * per_group
        for ky, kx in itertools.product(range(kernel_h), range(kernel_w)):
            iy, ix = oy * stride_h - top + ky * dil_h, ox * stride_w - left + kx * dil_w
            if 0 <= iy < height and 0 <= ix < width:
                y[:, o, oy, ox] += x[:, start : start + per_group, iy, ix] @ w[o, :, ky, kx]
        if b is not None:
            y[:, o, oy, ox] += b[o]
    return y
