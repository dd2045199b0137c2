"""Effective bit operations: bits of constants and intervals by strings, products and sums counted one by one."""

from __future__ import annotations

import io
import itertools
import json

import numpy as np
import pytest

from edgemat import report
from edgemat.formats import Fixed
from edgemat.op import Call, Tensor
from edgemat.ops import BY_NAME
from edgemat.ops.bit_operations import channel_bits, constant_bits, interval_bits, operand_bits
from edgemat.ops.cases import constant, tensor
from tests.core.channel_graphs import VECTOR, dense
from tests.core.graphs import Sketch, weights


def bits_of(code: int) -> int:
    """From the highest to the lowest one of the binary spelling."""
    return len(f"{abs(code):b}".strip("0"))


def held(lo: int, hi: int) -> int:
    """The narrowest integer that holds lo to hi, tried width by width."""
    if lo == hi == 0:
        return 0
    for width in itertools.count(1):
        low, high = (-(1 << (width - 1)), (1 << (width - 1)) - 1) if lo < 0 else (0, (1 << width) - 1)
        if low <= lo and hi <= high:
            return width
    raise AssertionError


def test_bits_of_constants() -> None:
    codes = np.array([*range(-600, 601), 2**62, 2**62 + 1, -(2**62), 2**63 - 1, 6 << 40])
    assert constant_bits(codes).tolist() == [bits_of(int(c)) for c in codes]
    assert constant_bits(np.array([0, 1, 2, -4, 6, 5, -12])).tolist() == [0, 1, 1, 1, 2, 3, 2]
    assert constant_bits(np.zeros((2, 3), np.int64)).tolist() == [[0] * 3] * 2


def test_bits_of_intervals() -> None:
    for lo, hi in itertools.product(range(-34, 35), repeat=2):
        if lo <= hi:
            assert interval_bits(lo, hi) == held(lo, hi), (lo, hi)


def test_bits_of_operands_follow_the_channels() -> None:
    x = tensor("fixed<[6,3,0,8,1],[1,2,9,-1,3]>", (None, 5))
    assert operand_bits(x).tolist() == [6, 3, 0, 8, 1]
    proved = Tensor("x", (None, 5, 2), x.format, 0, 5)
    assert operand_bits(proved).tolist() == [3, 2, 0, 3, 0] and channel_bits(proved).tolist() == [3, 2, 0, 3, 0]
    assert channel_bits(tensor("ufixed<4,2>", (None, 3))).tolist() == [4, 4, 4]
    assert operand_bits(tensor("bipolar", (None, 3))).tolist() == [2]


X = "fixed<[6,3,0,8],[1,2,9,-1]>"


def conv(groups: int) -> Call:
    w = constant("fixed<6,1>", weights((4, 4 // groups, 3, 2), 1))
    attrs = {"w_format": "fixed<6,1>", "strides": (2, 1), "pads": (1, 0, 1, 0), "dilations": (1, 1), "groups": groups}
    return Call(BY_NAME["Conv"], "c", [tensor(X, (None, 4, 5, 4)), w[0]], attrs, {1: w[1]})


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_product_by_product(groups: int) -> None:
    call = conv(groups)
    widths, w, total = Fixed.parse(X).widths, call.constants[1], 0
    assert widths is not None
    _, _, rows, columns = call.y[0].shape
    for o, i, *_ in np.ndindex(w.shape):
        channel = o // (4 // groups) * (4 // groups) + i
        total += bits_of(int(w[(o, i, *_)])) * widths[channel] * int(rows or 0) * int(columns or 0)
    assert call.op.cost(call).ebops == total > 0


def test_a_linear_layer_and_what_widens_it() -> None:
    w = constant("fixed<6,1>", np.array([[6, 5, 31, 0], [-8, 1, 7, 3]]))
    attrs = {"w_format": "fixed<6,1>"}

    def count(fmt: str) -> int:
        call = Call(BY_NAME["Linear"], "l", [tensor(fmt, (None, 4)), w[0]], attrs, {1: w[1]})
        return call.op.cost(call).ebops

    assert count(X) == 6 * (2 + 1) + 3 * (3 + 1) + 0 * (5 + 3) + 8 * (0 + 2)
    assert count(X.replace("[6,3,0,8]", "[6,4,0,8]")) - count(X) == 3 + 1
    assert count("fixed<8,3>") == 8 * (2 + 3 + 5 + 0 + 1 + 1 + 3 + 2)


def test_operators_of_two_tensors_scales_and_slopes() -> None:
    a, b = tensor("fixed<8,3>", (None, 3, 2), "a"), tensor("ufixed<5,4>", (None, 3, 1), "b")
    assert [Call(BY_NAME[n], n, [a, b], {}).op.cost(Call(BY_NAME[n], n, [a, b], {})).ebops for n in ("Add", "Mul")] == [
        6 * 8,
        6 * 8 * 5,
    ]
    k = constant("fixed<6,2>", np.array([[[6]], [[0]], [[5]]]).reshape(1, 3, 1))
    times = Call(BY_NAME["Mul"], "k", [a, k[0]], {}, {1: k[1]})
    plus = Call(BY_NAME["Add"], "k", [a, k[0]], {}, {1: k[1]})
    assert times.op.cost(times).ebops == 2 * 8 * (2 + 0 + 3) and plus.op.cost(plus).ebops == 0
    product = Call(BY_NAME["MatMul"], "m", [tensor("fixed<8,3>", (None, 3, 4)), tensor("fixed<6,3>", (None, 4, 2))], {})
    assert product.op.cost(product).ebops == 3 * 4 * 2 * 8 * 6
    x = tensor("fixed<[6,0,4],[1,2,3]>", (None, 3, 5))
    scale, offset = constant("fixed<6,2>", np.array([6, 31, 5])), constant("fixed<16,2>", np.array([1, 2, 3]), "b")
    affine = Call(
        BY_NAME["Affine"], "n", [x, scale[0], offset[0]], {"w_format": "fixed<6,2>"}, {1: scale[1], 2: offset[1]}
    )
    assert affine.op.cost(affine).ebops == 5 * (2 * 6 + 5 * 0 + 3 * 4)
    bent = Call(BY_NAME["PRelu"], "p", [x, scale[0]], {"slope_format": "fixed<6,2>"}, {1: scale[1]})
    assert bent.op.cost(bent).ebops == 5 * (2 * 6 + 5 * 0 + 3 * 4)


def test_inspect_states_them(tmp_path) -> None:
    path = dense().write(tmp_path / "dense.onnx")
    found = report.inspect(path).to_dict()
    assert json.loads(json.dumps(found)) == found
    by_name = {node["name"]: node for node in found["nodes"]}
    widths = Fixed.parse(VECTOR).widths
    assert widths is not None
    first = sum(bits_of(int(w)) * widths[i] for row in weights((6, 5)) for i, w in enumerate(row))
    assert by_name["fc1"]["ebops"] == first
    assert found["totals"]["ebops"] == sum(node["ebops"] for node in found["nodes"]) > first


def test_a_long_format_is_shown_as_a_span(tmp_path) -> None:
    made = Sketch("long")
    x = made.input("x", (12,), f"fixed<[{','.join(str(2 + c % 3) for c in range(12))}],1,RND,SAT>")
    made.output(made.linear(x, weights((2, 12)), "fc"), "y")
    from rich.console import Console

    console = Console(width=400, record=True, file=io.StringIO())
    console.print(report.inspect(made.write(tmp_path / "long.onnx")).render())
    text = console.export_text()
    assert "fixed<2..4,1,RND,SAT> of 12 channels" in text and "EBOPs" in text
