"""Norms: the stated error, invariance, torch against the exported file, and gradients against torch's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.nn import QuantLayerNorm, QuantRMSNorm
from edgemat.nn.normalization import norm_format
from edgemat.nn.normalization_rows import NormQuantize, reciprocal_root
from edgemat.op import Call
from edgemat.ops import BY_NAME
from edgemat.ops import reciprocal_root as definition
from edgemat.ops.cases import constant, tensor
from edgemat.sim import Simulator
from tests.normalization.definition import scaled_root, table_entry


def totals() -> np.ndarray:
    """Every small total, the ends of every power of four, and random ones of all sizes."""
    rng = np.random.default_rng(0)
    ends = [4**k + d for k in range(31) for d in (-1, 0, 1) if 4**k + d > 0]
    return np.concatenate([np.arange(1, 1 << 16), ends, (2.0 ** rng.uniform(0, 61.9, 50_000)).astype(np.int64)])


@pytest.mark.parametrize("count", [1, 2, 3, 7, 64, 1000, 4096, 65537])
def test_the_error_of_the_root_is_the_stated_one(count: int) -> None:
    found = totals()
    root, half = definition.root_of(count)
    mantissa, exponent = definition.reciprocal_root(found, root)
    assert mantissa.min() >= 2**15 - 1 and mantissa.max() < 2**16
    error = mantissa * np.exp2(half - 15.0 - exponent) / np.sqrt(count / found.astype(np.longdouble)) - 1
    assert error.min() > -definition.RELATIVE_ERROR and error.max() < 2.0**-27
    torched = reciprocal_root(torch.from_numpy(found), root)
    assert all((a.numpy() == b).all() for a, b in zip(torched, (mantissa, exponent), strict=True))


def test_the_table_is_the_defined_one_and_the_native_ones_repeat_it() -> None:
    from edgemat.targets.hls.project import library
    from edgemat.targets.mcu.library import kernel_folder

    assert definition.TABLE.tolist() == [table_entry(i) for i in range(64, 256)]
    text = ", ".join(map(str, definition.TABLE.tolist()))
    for file in (kernel_folder() / "edgemat_norm.h", library() / "include" / "edgemat" / "reciprocal_root.hpp"):
        body = file.read_text(encoding="utf-8").split("[192] = {", 1)[1].split("}", 1)[0]
        assert ", ".join(body.replace("\n", " ").replace(",", " ").split()) == text


def test_control_one_bit_of_the_table_shows() -> None:
    """One changed bit of an entry shows in some mantissa; the second opinion agrees with the right ones."""
    plain = [scaled_root(t, 5) for t in range(1, 400)]
    root, half = definition.root_of(5)
    for entry in (0, 100, 191):
        definition.TABLE[entry] ^= 16
        try:
            mantissa, exponent = definition.reciprocal_root(np.arange(1, 1 << 16), root)
        finally:
            definition.TABLE[entry] ^= 16
        right, where = definition.reciprocal_root(np.arange(1, 1 << 16), root)
        assert ((mantissa != right) | (exponent != where)).any()
    mantissa, exponent = definition.reciprocal_root(np.arange(1, 400), root)
    assert plain == [int(m) * 2 ** int(half) / 2 ** (15 + int(e)) for m, e in zip(mantissa, exponent, strict=True)]


@pytest.mark.parametrize("name", ["RmsNorm", "LayerNorm"])
def test_the_binary_point_of_the_input_does_not_matter(name: str) -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-128, 128, (20, 33))
    found = []
    for point in (-3, 2, 8, 20):
        call = Call(BY_NAME[name], "n", [tensor(f"fixed<8,{point}>", (None, 33))], {"norm_format": "fixed<16,4>"})
        found.append(call.op.reference(call, codes))
    assert all((other == found[0]).all() for other in found)
    real = codes - codes.mean(1, keepdims=True) * (name == "LayerNorm")
    real = real / np.sqrt((real**2).mean(1, keepdims=True))
    assert np.abs(found[0] * 2.0**-12 - real).max() < 2.0**-13 + 2.0**-14 * np.abs(real).max()


def test_a_row_of_zeros_gives_zeros_and_a_constant_row_the_bias() -> None:
    w, codes = constant("fixed<8,2>", np.array([3, -4, 5]))
    b, bias = constant("fixed<20,2>", np.array([100, 200, -300]), "b")
    rows = np.array([[0, 0, 0], [7, 7, 7], [-128, -128, -128]])
    call = Call(BY_NAME["RmsNorm"], "n", [tensor("fixed<8,2>", (None, 3)), w], {"w_format": "fixed<8,2>"}, {1: codes})
    assert (call.op.reference(call, rows)[0] == 0).all()
    operands = [tensor("fixed<8,2>", (None, 3)), w, b]
    call = Call(BY_NAME["LayerNorm"], "n", operands, {"w_format": "fixed<8,2>"}, {1: codes, 2: bias})
    assert (call.op.reference(call, rows) == bias).all()


@pytest.mark.parametrize(
    ("attrs", "x", "word"),
    [
        ({"eps": -1}, "fixed<8,2>", "eps=-1"),
        ({"norm_format": "fixed<32,4>"}, "fixed<8,2>", "31 bits"),
        ({"norm_format": "fixed<8,[1,2,3]>"}, "fixed<8,2>", "one binary point"),
        ({"w_format": "fixed<8,2>"}, "fixed<8,2>", "give a gain and its format"),
        ({}, "fixed<32,2>", "less than 2\\*\\*62"),
    ],
)
def test_what_cannot_be_meant_is_refused(attrs: dict, x: str, word: str) -> None:
    with pytest.raises(EdgematError, match=word):
        _ = Call(BY_NAME["RmsNorm"], "n", [tensor(x, (None, 3))], attrs).y


LAYERS = {
    "rms": lambda: QuantRMSNorm(24, input="fixed<8,4>", output="fixed<8>"),
    "rms, wide": lambda: QuantRMSNorm(24, input="fixed<16,6>", output="fixed<16>", weights="fixed<12>"),
    "rms, unsigned, no gain": lambda: QuantRMSNorm(24, gain=False, input="ufixed<6,3>", output="fixed<8>"),
    "rms, exact": lambda: QuantRMSNorm(24, input="fixed<6,3>", output=None),
    "rms, saturating": lambda: QuantRMSNorm(24, norm="fixed<6,1,RND_CONV,SAT_SYM>", output="fixed<8,2>"),
    "layer": lambda: QuantLayerNorm(24, input="fixed<8,4>", output="fixed<8>"),
    "layer, no bias": lambda: QuantLayerNorm(24, bias=False, input="fixed<12,4>", output="fixed<8,4,TRN,WRAP>"),
    "layer, wide": lambda: QuantLayerNorm(24, input="fixed<16,6>", output="fixed<12>"),
}


def prepared(name: str) -> nn.Module:
    torch.manual_seed(0)
    layer = LAYERS[name]()
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.normal_()
    return layer


def rows(*shape: int) -> torch.Tensor:
    """Rows of all sizes, zeros and rails among them."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(*shape, generator=generator) * torch.logspace(-3, 2, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    x[1], x[2], x[3] = 0.0, 1000.0, -1000.0
    x[4, ..., ::2] = 1000.0
    return x


class Beside(nn.Module):
    """Every layer on an input of its own, so that one export holds them all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([prepared(name) for name in LAYERS])

    def forward(self, a, b, c, d, e, f, g, h) -> tuple[torch.Tensor, ...]:
        return tuple(layer(x) for layer, x in zip(self.layers, (a, b, c, d, e, f, g, h), strict=True))


@pytest.mark.parametrize("shape", [(30, 24), (8, 3, 24), (6, 2, 3, 24)])
def test_training_eval_and_the_file_give_the_same_codes(shape: tuple[int, ...], tmp_path) -> None:
    net, x = Beside(), tuple(rows(*shape) for _ in LAYERS)
    net.train()
    net(*x)
    trained = [y.detach() for y in net(*x)]
    net.eval()
    assert all(torch.equal(y, z) for y, z in zip(net(*x), trained, strict=True))
    edgemat.to_onnx(net, x, tmp_path / "net.onnx")
    simulator = Simulator(tmp_path / "net.onnx")
    found = simulator({name: x[0].numpy() for name in simulator.graph.input_names}).values()
    for name, y, z, other in zip(LAYERS, found, trained, net(*(each * 1.25 for each in x)), strict=True):
        assert np.array_equal(np.asarray(y, np.float64), z.numpy().astype(np.float64)), name
        assert not np.array_equal(np.asarray(y), other.detach().numpy()), name


@pytest.mark.parametrize("kind", [QuantRMSNorm, QuantLayerNorm])
def test_gradients_are_those_of_the_real_norm_and_quantiser(kind) -> None:
    """On a fine grid the fused function agrees with torch's float norm behind a quantiser of its own."""
    torch.manual_seed(1)
    layer = kind(32, input="fixed<16,4>", output="fixed<12,3>", weights="fixed<16>", norm="fixed<24,4>")
    with torch.no_grad():
        layer.weight.normal_()
    x = torch.randn(10, 32, requires_grad=True)
    weigh = torch.randn(10, 32)
    layer(x)
    (layer(x) * weigh).sum().backward()
    found = [x.grad.clone(), layer.weight.grad.clone()]
    x.grad = layer.weight.grad = None
    real = layer.real(x)
    (torch.where((real > -4) & (real < 4), real, real.detach()) * weigh).sum().backward()
    assert torch.allclose(found[0], x.grad, atol=2e-3) and torch.allclose(found[1], layer.weight.grad, atol=2e-3)
    assert not torch.allclose(found[0] * 1.01, x.grad, atol=2e-3)


def test_backward_keeps_the_input_and_what_leaves() -> None:
    """No saved tensor has the size of x but x itself and the quantised result."""
    layer = prepared("rms")
    layer(rows(30, 24))
    saved: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    x = torch.randn(30, 24, requires_grad=True)
    entered = layer.input_quantizer(x)
    quantizer, layer.input_quantizer = layer.input_quantizer, None
    layer.link(quantizer)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = layer(entered)
    assert {t.data_ptr() for t in saved if t.shape == x.shape} <= {entered.data_ptr(), y.data_ptr()}
    assert type(y.grad_fn).__name__ == f"{NormQuantize.__name__}Backward"


class Functional(nn.Module):
    """Norms as functions, one with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 10), nn.Linear(10, 4)
        self.gain, self.shift = nn.Parameter(torch.randn(10)), nn.Parameter(torch.randn(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.layer_norm(self.first(x), (10,), self.gain, self.shift, 1e-3)
        return self.last(F.rms_norm(x, (10,)))


NETWORKS = {
    "modules": lambda: nn.Sequential(
        nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 8), nn.RMSNorm(8), nn.Linear(8, 4)
    ),
    "functions": Functional,
    "without parameters": lambda: nn.Sequential(nn.RMSNorm(6, elementwise_affine=False), nn.LayerNorm(6, bias=False)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_quantize_recognises_norms(name: str, tmp_path) -> None:
    torch.manual_seed(3)
    net, x = NETWORKS[name](), torch.randn(64, 6)
    made = edgemat.quantize(net, edgemat.Recipe())
    edgemat.calibrate(made, [x])
    made.eval()
    assert sum(isinstance(m, QuantRMSNorm | QuantLayerNorm) for m in made.modules()) == 2
    assert (made(x) - net(x)).abs().max() < 0.25
    edgemat.to_onnx(made, (x,), tmp_path / "net.onnx")
    found = Simulator(tmp_path / "net.onnx")(x.numpy())
    found = next(iter(found.values())) if isinstance(found, dict) else found
    assert np.array_equal(np.asarray(found), made(x).detach().numpy())


def test_norms_of_more_axes_are_refused() -> None:
    with pytest.raises(FormatError, match="over 2 axes"):
        edgemat.quantize(nn.Sequential(nn.LayerNorm((3, 4))), edgemat.Recipe())
    with pytest.raises(FormatError, match="bias and no gain"):
        QuantLayerNorm(4, gain=False)


@pytest.mark.parametrize("features", [1, 2, 3, 4, 5, 16, 17, 1000, 4096])
def test_the_default_format_never_saturates(features: int) -> None:
    fmt = norm_format(features)
    assert (
        fmt.width == 16 and fmt.max_code * 2.0**-fmt.frac_bits >= features**0.5 > fmt.max_code * 2.0**-fmt.frac_bits / 8
    )
