"""FracBNN on real images: every step spelled out again in numpy, every backend, and planted differences."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
import torch

import edgemat
from edgemat.errors import FormatError
from edgemat.formats import Fixed, requantize, round_shift
from edgemat.lower import read
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read_bytes
from edgemat.lower.writer import finish
from edgemat.nn import FracBNN, FracBNNBlock
from edgemat.report.inspection import inspect
from edgemat.sim.session import copy
from edgemat.verification import backends as rooms
from edgemat.verification.verify import verify
from tests.binary.images import accuracy, images, trained
from tests.networks.data import DataMissingError

FEATURES, PARAMETERS = Fixed.parse("fixed<16,9>"), Fixed.parse("fixed<12,4>")
BACKENDS = ("onnx", "hls:parallel", "hls:stream", "mcu", "mcu:cortex-m4", "mcu:rv32imc")


@pytest.fixture(scope="session")
def net(tmp_path_factory):
    """A trained network of two blocks, its file, its losses and test images of 8 x 8."""
    try:
        x, y, x_test, y_test = images(60, 10, side=8)
    except DataMissingError as missing:
        pytest.skip(str(missing))
    torch.manual_seed(0)
    module = FracBNN(width=8, blocks=(1, 1), levels=4)
    losses = trained(module, x, y, epochs=6)
    path = tmp_path_factory.mktemp("fracbnn") / "net.onnx"
    edgemat.to_onnx(module, x[:2], path)
    return module, path, losses, (x, y, x_test, y_test)


def test_it_learns(net):
    module, _, losses, (x, y, _, _) = net
    assert losses[-1] < 0.9 * losses[0]
    assert accuracy(module, x, y) > 0.25
    opened = [float(block.conv.opened) for block in module.blocks]
    assert all(0.05 < share < 0.95 for share in opened)  # the gates do gate


@pytest.mark.parametrize("name", ["onnx", "hls:parallel", "hls:stream", "mcu"])
def test_every_backend_on_real_images(net, name):
    module, path, _, (_, _, x_test, _) = net
    reason = rooms.make(name, None).missing()
    if reason is not None:
        pytest.skip(reason)
    report = verify(path, x_test.numpy(), module=module, backends=("reference", name))
    assert report.ok, report.to_dict()
    assert report.backends["torch"].status == report.backends[name].status == "exact" and report.overflow_proved


@pytest.mark.parametrize("name", ["mcu:cortex-m4", "mcu:rv32imc"])
def test_emulated_machines_on_real_images(net, name):
    _, path, _, (_, _, x_test, _) = net
    reason = rooms.make(name, None).missing()
    if reason is not None:
        pytest.skip(reason)
    report = verify(path, x_test[:6].numpy(), backends=("reference", name))
    assert report.ok, report.to_dict()


def test_convolutions_multiply_nothing(net):
    nodes = [n for n in inspect(net[1]).nodes if n.operator == "Conv"]
    assert len(nodes) == 2 + 2 * 2 and {n.multiplies for n in nodes} == {0}


# -- the block, written out ---------------------------------------------------------------------------------------
def codes_of(values: torch.Tensor, frac: int) -> np.ndarray:
    scaled = values.detach().double().numpy() * 2.0**frac
    assert np.array_equal(scaled, np.rint(scaled))
    return scaled.astype(np.int64)


def parameter(values: torch.Tensor, fmt: Fixed) -> np.ndarray:
    """Codes of parameters: half up, saturated."""
    assert isinstance(fmt.int_bits, int)
    codes = np.floor(values.detach().double().numpy() * 2.0 ** fmt.fracs[0] + 0.5).astype(np.int64)
    return codes.clip(*fmt.rails)


def sums(x: np.ndarray, w: np.ndarray, stride: int) -> np.ndarray:
    """3 x 3 sums of products with one ring of zeros."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    rows, columns = ((n - 1) // stride + 1 for n in x.shape[2:])
    y = np.zeros((len(x), len(w), rows, columns), np.int64)
    for ky in range(3):
        for kx in range(3):
            part = padded[
                :, :, ky : ky + stride * (rows - 1) + 1 : stride, kx : kx + stride * (columns - 1) + 1 : stride
            ]
            y += np.einsum("nchw,oc->nohw", part, w[:, :, ky, kx])
    return y


def affine(norm, x: np.ndarray, x_frac: int, a_format: Fixed) -> np.ndarray:
    """``Requantize(a * x + b)`` to features."""
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    real = norm.weight.double() / torch.sqrt(variance + norm.eps)
    a = parameter((norm.weight.double() * torch.rsqrt(variance + norm.eps)).float(), a_format)
    frac = a_format.fracs[0] + x_frac
    b = parameter(norm.bias.double() - mean * real, Fixed(PARAMETERS.int_bits + frac, PARAMETERS.int_bits))
    exact = a.reshape(1, -1, 1, 1) * x + b.reshape(1, -1, 1, 1)
    return round_shift(exact, frac - 7, "RND").clip(*FEATURES.rails)


def block_codes(block: FracBNNBlock, x: np.ndarray, strict_gate: bool = True) -> np.ndarray:
    """The formats of docs/binary.md, step by step; integer codes of fixed<16,9> in and out."""
    h = np.where(x >= 0, 1, -1)
    low = np.where(2 * x - (h << 7) >= 0, 1, -1)
    w = np.where(block.conv.weight.detach().numpy() >= 0, 1, -1)
    high, rest = sums(h, w, block.conv.stride), sums(low, w, block.conv.stride)
    t = np.floor(block.conv.threshold.detach().numpy() * 2.0**block.conv.scale).astype(np.int64).reshape(1, -1, 1, 1)
    gate = high > t if strict_gate else high >= t
    total = 2 * high + gate * rest
    scale = block.norm1.weight_quantizer.exponent() - PARAMETERS.fracs[0]
    y = affine(block.norm1, total, 0, PARAMETERS.with_frac(PARAMETERS.fracs[0] + scale))
    act = block.activation
    before, slope, after = (parameter(p, PARAMETERS).reshape(1, -1, 1, 1) for p in (act.before, act.slope, act.after))
    moved = 2 * y - before  # 8 fractional bits
    bent = np.where(moved >= 0, moved << 8, moved * slope) + (after << 8)  # 16 fractional bits
    y = round_shift(bent, 9, "RND").clip(*FEATURES.rails)
    if block.pool is not None:
        x = round_shift(x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2], 2, "RND")
        x = np.concatenate([x, x], 1)
    return affine(block.norm2, (x + y).clip(*FEATURES.rails), 7, PARAMETERS)


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_is_what_the_documentation_says(net, index):
    module, _, _, (_, _, x_test, _) = net
    with torch.no_grad():
        x = module.norm(module.stem(module.encoding(x_test)))
        for block in module.blocks[:index]:
            x = block(x)
        block = module.blocks[index]
        found = codes_of(block(x), 7)
    entering = codes_of(x, 7)
    assert np.array_equal(found, block_codes(block, entering))
    assert not np.array_equal(found, block_codes(block, entering, strict_gate=False))  # control: >= instead of >


def test_the_gate_is_a_comparison():
    """``Requantize(H - t -> ufixed<1,1>)`` is ``H > t`` for every whole H and t."""
    h, t = np.meshgrid(np.arange(-40, 41), np.arange(-40, 41))
    gate = requantize(h - t, Fixed(8, 8), Fixed(1, 1, False))
    assert np.array_equal(gate, (h > t).astype(np.int64))


# -- planted differences ------------------------------------------------------------------------------------------
def changed(graph: Graph, change: Callable[[ir.Model], None]) -> Graph:
    """The graph with one change, and everything the file states about it redone."""
    model = copy(graph.model)
    change(model)
    for value in model.graph.inputs:
        value.shape = ir.Shape(["batch", *list(value.shape or [])[1:]])
    finish(model)
    return read_bytes(ir.serde.serialize_model(model).SerializeToString())


def flip_weight(model: ir.Model) -> None:
    node = [n for n in model.graph if n.op_type == "Conv"][2]  # the high sums of the first block
    value = node.inputs[1]
    codes = np.array(value.const_value.numpy())
    codes[0, 0, 1, 1] *= -1
    value.const_value = ir.tensor(codes, name=value.name)


def loosen_gate(model: ir.Model) -> None:
    """H >= t instead of H > t, in every channel of the first block."""
    gate = next(n for n in model.graph if n.op_type == "Sub" and "ufixed<1,1" in str(n.attributes.get("requantize")))
    literal = gate.inputs[1].producer()
    value = literal.inputs[0]
    value.const_value = ir.tensor(np.array(value.const_value.numpy()) - 1, name=value.name)


def shift_padding(model: ir.Model) -> None:
    node = [n for n in model.graph if n.op_type == "Conv"][1]  # the stem
    node.attributes["pads"] = ir.AttrInt64s("pads", [0, 1, 2, 1])


# Sums and gates are one code in both io modes of HLS, windows are not.
PLANTED = [(n, c) for n in BACKENDS for c in (flip_weight, loosen_gate, shift_padding) if n != "hls:stream"]


@pytest.mark.parametrize(("name", "change"), [*PLANTED, ("hls:stream", shift_padding)])
def test_planted_differences_are_caught(net, name, change):
    _, path, _, (_, _, x_test, _) = net
    backend = rooms.make(name, None)
    if backend.missing() is not None:
        pytest.skip(str(backend.missing()))
    graph = read(path)
    other = changed(graph, change)
    codes = {graph.inputs[0]: np.rint(x_test[:3].numpy() * 256).astype(np.int64)}
    values = {graph.input_names[0]: x_test[:3].numpy()}
    expected = rooms.make("reference", None).run(graph, codes, values)
    renamed = {other.inputs[0]: codes[graph.inputs[0]]}
    found = backend.run(other, renamed, {other.input_names[0]: x_test[:3].numpy()})
    assert not np.array_equal(found[other.outputs[0]], expected[graph.outputs[0]])


def test_a_body_of_another_threshold_is_refused(net):
    """x > 0 instead of x >= 0 in the ONNX body of a sign is no lowered file any more."""
    model = copy(read(net[1]).model)
    less = [node for function in model.functions.values() for node in function if node.op_type == "Less"]
    assert less
    less[0].op_type = "LessOrEqual"
    with pytest.raises(edgemat.LoweringError):
        read_bytes(ir.serde.serialize_model(model).SerializeToString())


def test_blocks_that_do_not_fit_are_refused():
    for inputs, outputs, stride in ((8, 16, 1), (8, 8, 2), (8, 24, 3)):
        with pytest.raises(FormatError, match="twice as many with stride 2"):
            FracBNNBlock(inputs, outputs, stride)
    with pytest.raises(FormatError, match="at most 22 bits"):
        FracBNNBlock(8, 8, features="fixed<16>")
