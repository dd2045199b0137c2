"""Small connected graphs: chains, a residual, a concat, reshapes, several inputs and outputs."""

from __future__ import annotations

import numpy as np

from edgemat.op import Tensor
from edgemat.ops import BY_NAME
from edgemat.ops.cases import constant, random_codes, tensor
from tests.mcu.case_graphs import CaseGraph

W_FORMAT = "fixed<5,1>"


class Network(CaseGraph):
    """A graph with one method for each layer the tests join."""

    def conv(
        self, name: str, x: Tensor, out_c: int, kernel: int = 3, y: str = "ufixed<6,3>", groups: int = 1
    ) -> Tensor:
        """A same-size convolution with bias."""
        shape = (out_c, x.sample_shape[0] // groups, kernel, kernel)
        w, codes = constant(W_FORMAT, random_codes(W_FORMAT, shape, len(self.nodes)), f"{name}_w")
        b, biases = constant("fixed<16,8>", np.arange(out_c) * 3 - 4, f"{name}_b")
        attrs = {"w_format": W_FORMAT, "strides": (1, 1), "pads": (kernel // 2,) * 4, "dilations": (1, 1)}
        attrs |= {"groups": groups, "requantize": y}
        return self.add(BY_NAME["Conv"], name, [x, w, b], attrs, {1: codes, 2: biases})

    def linear(self, name: str, x: Tensor, outs: int, y: str = "fixed<8,5>") -> Tensor:
        """A fully connected layer."""
        shape = (outs, x.sample_shape[-1])
        w, codes = constant(W_FORMAT, random_codes(W_FORMAT, shape, len(self.nodes)), f"{name}_w")
        return self.add(BY_NAME["Linear"], name, [x, w], {"w_format": W_FORMAT, "requantize": y}, {1: codes})

    def reshape(self, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A reshape of the sample."""
        return self.add(BY_NAME["Reshape"], name, [x], {"shape": shape})

    def join(self, name: str, a: Tensor, b: Tensor, y: str = "ufixed<6,4>") -> Tensor:
        """A requantised sum."""
        return self.add(BY_NAME["Add"], name, [a, b], {"requantize": y})

    def plain(self, op: str, name: str, *x: Tensor, **attrs: object) -> Tensor:
        """Any node without constants."""
        return self.add(BY_NAME[op], name, list(x), attrs)


def residual() -> Network:
    """Convolutions with a shortcut, pooling, flatten, a classifier."""
    net = Network("residual net")
    x = net.add_input(tensor("fixed<8,3>", (None, 2, 6, 5), "image"))
    first = net.conv("stem", x, 6)
    a = net.conv("a", first, 6)
    b = net.conv("b", a, 6, y="fixed<6,3>")
    joined = net.join("join", b, first)
    pooled = net.plain("MaxPool", "pool", joined, kernel_shape=(2, 2), strides=(2, 2), pads=(0, 0, 0, 0))
    flat = net.reshape("flatten", pooled, (6 * 3 * 2,))
    net.output(net.linear("head", flat, 5, y="fixed<12,9>"))
    return net


def branching() -> Network:
    """Two inputs, two outputs, a concat, a depthwise layer, elementwise nodes that can run in place."""
    net = Network("branching")
    x = net.add_input(tensor("fixed<8,3>", (None, 3, 4, 4), "left"))
    z = net.add_input(tensor("ufixed<7,3>", (None, 2, 4, 4), "right"))
    a = net.conv("one", x, 4)
    b = net.conv("two", z, 3, kernel=1)
    both = net.plain("Concat", "cat", a, b, axis=0)
    deep = net.conv("depthwise", both, 7, groups=7, y="fixed<11,5>")
    active = net.plain("Relu", "relu", deep)
    small = net.plain("Requantize", "narrow", active, requantize="ufixed<4,2>")
    flat = net.reshape("flatten", small, (7 * 16,))
    net.output(net.linear("class", flat, 3))
    net.output(small)
    return net


def reshaping() -> Network:
    """Reshapes that move memory, that do not, that a Linear absorbs; Linear on three axes; a transpose."""
    net = Network("reshaping")
    x = net.add_input(tensor("fixed<8,3>", (None, 3, 4, 2), "x"))
    rows = net.reshape("rows", x, (3, 8))  # the same memory
    back = net.reshape("back", rows, (4, 3, 2))  # not the same
    mixed = net.conv("mixed", back, 4)
    tokens = net.linear("tokens", net.reshape("to_tokens", mixed, (6, 4)), 5)
    more = net.linear("more", tokens, 4, y="fixed<7,5>")
    turned = net.plain("Transpose", "turn", more, perm=(1, 0))
    flat = net.reshape("flat", turned, (24,))
    net.output(net.linear("out", flat, 3))
    net.output(net.reshape("other", more, (2, 3, 4)))
    net.output(net.reshape("same", x, (24,)))
    return net


ALL = {"residual": residual, "branching": branching, "reshaping": reshaping}
