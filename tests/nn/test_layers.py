"""Layers used directly: eval bits against integer numpy, carriers, batch norm, pooling, tables."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed, requantize
from edgemat.nn import (
    FixedQuantizer,
    QuantAdaptiveAvgPool,
    QuantAdd,
    QuantAvgPool,
    QuantBatchNorm,
    QuantClip,
    QuantConcat,
    QuantConv2d,
    QuantLinear,
    QuantMul,
    QuantPReLU,
    QuantReLU,
    QuantSigmoid,
    QuantTable,
)
from tests.nn.test_rounding import exact_round


def ready(layer: nn.Module, x: torch.Tensor) -> nn.Module:
    """Calibrated on x, in eval mode."""
    return edgemat.calibrate(layer, [x]).eval()


def int_codes(quantizer: FixedQuantizer, y: torch.Tensor) -> np.ndarray:
    return quantizer.codes(y).numpy()


@pytest.mark.parametrize("widths", [(4, 3), (8, 8), (12, 12), (16, 16), (16, 24)])
def test_linear_is_integer_arithmetic(widths: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = QuantLinear(37, 9, input=f"fixed<{widths[0]}>", weights=f"fixed<{widths[1]}>")
    x = torch.randn(50, 37)
    ready(layer, x)
    with torch.no_grad():
        y = layer(x)
        weight, bias = layer.quantized()
    x_codes = int_codes(layer.input_quantizer, layer.input_quantizer(x))
    w_codes = int_codes(layer.weight_quantizer, weight)
    fracs = layer.accumulator_exponents()
    b_codes = torch.ldexp(bias, fracs).to(torch.int64).numpy()
    expected = x_codes @ w_codes.T + b_codes
    found = torch.ldexp(y.double(), fracs)
    assert found.tolist() == expected.tolist()
    reach = int(np.abs(w_codes).sum(1).max()) * layer.input_quantizer.grid.magnitude + int(np.abs(b_codes).max())
    assert y.dtype == (torch.float32 if reach < 2**24 else torch.float64)


def test_control_float32_would_not_hold_wide_sums() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(37, 9, input="fixed<16>", weights="fixed<16>")
    x = torch.randn(50, 37)
    ready(layer, x)
    with torch.no_grad():
        weight, bias = layer.quantized()
        narrow = F.linear(layer.input_quantizer(x), weight, bias.float())
        assert not torch.equal(narrow.double(), layer(x))


def test_bound_beyond_float64_is_refused() -> None:
    layer = QuantLinear(64, 2, input="fixed<31,1>", weights="fixed<31,1>")
    with torch.no_grad():
        layer.weight.fill_(0.99)
    with pytest.raises(FormatError, match=r"2\*\*53"):
        layer.eval()(torch.ones(1, 64))


def test_train_and_eval_bits_agree_without_batch_norm() -> None:
    torch.manual_seed(0)
    for width in (6, 16):
        layer = QuantConv2d(3, 5, 3, input=f"fixed<{width}>", weights=f"fixed<{width}>", output="fixed<8>")
        x = torch.randn(4, 3, 9, 9)
        ready(layer, x)
        assert torch.equal(layer(x), layer.train()(x))


def test_bias_is_rounded_to_the_accumulator_grid_and_saturates() -> None:
    layer = QuantLinear(1, 3, input="fixed<8,4>", weights="fixed<8,4>", bias_format="fixed<6>")
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([0.5 / 256, -0.5 / 256, 100.0]))
    y = layer.eval()(torch.zeros(1, 1))
    assert (y[0] * 256).tolist() == [1, 0, 31]
    layer.train()(torch.zeros(1, 1)).sum().backward()
    assert layer.bias.grad.tolist() == [1, 1, 0]


def test_bias_of_more_than_32_bits_is_refused() -> None:
    with pytest.raises(FormatError, match="32"):
        QuantLinear(1, 1, bias_format="fixed<33>")


def test_layer_without_an_input_format_says_so() -> None:
    layer = QuantLinear(2, 2, input=None)
    with pytest.raises(FormatError, match="input="):
        layer(torch.zeros(1, 2))


def test_links_survive_deepcopy_and_stay_out_of_the_state() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    module = edgemat.quantize(net)
    x = torch.randn(16, 4)
    edgemat.calibrate(module, [x])
    twin = copy.deepcopy(module)
    linked = twin.get_submodule("2").source()
    assert linked is twin.get_submodule("1").output_quantizer
    assert linked is not module.get_submodule("1").output_quantizer
    keys = [k for k in module.state_dict() if k.endswith("frac")]
    assert len(keys) == len(set(keys)) == 4
    with torch.no_grad():
        linked.frac.add_(1)
    assert not torch.equal(twin.eval()(x), module.eval()(x))


def test_autocast_and_low_precision_settings_change_no_bit() -> None:
    torch.manual_seed(0)
    layer = QuantConv2d(8, 8, 3, input="fixed<8>", weights="fixed<8>")
    x = torch.randn(2, 8, 12, 12)
    ready(layer, x)
    plain = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), plain)
    for setting in (torch.backends.mkldnn, torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul):
        try:
            setting.fp32_precision = "bf16"
            assert torch.equal(layer(x), plain)
            assert setting.fp32_precision == "bf16"
        finally:
            setting.fp32_precision = "none"
            torch.backends.mkldnn.conv.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(layer(x), plain)
    torch.set_float32_matmul_precision("highest")


def test_calibration_keeps_the_bias_in_its_width() -> None:
    layer = QuantLinear(4, 2, input="fixed<16,1>", weights="fixed<16>", bias_format="fixed<20>")
    with torch.no_grad():
        layer.weight.fill_(2.0**-12)
        layer.bias.copy_(torch.tensor([3.0, 0.0]))
    ready(layer, torch.rand(8, 4) - 0.5)
    assert layer.accumulator_exponents().tolist()[0] == 17
    assert layer.quantized()[1].tolist()[0] == 3.0


def _folded_pair() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    for _ in range(20):
        net(torch.randn(8, 3, 8, 8) * 2 + 1)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.1]))
        net[1].bias.normal_()
    return net, torch.randn(64, 3, 8, 8) * 2 + 1


def test_batch_norm_folds_like_float() -> None:
    net, x = _folded_pair()
    module = edgemat.quantize(net, edgemat.Recipe(input="fixed<16,5>", weights="fixed<20>", activations="fixed<20>"))
    edgemat.calibrate(module, [x])
    assert torch.allclose(module.eval()(x).float(), net.eval()(x), atol=2e-3)


def test_batch_statistics_train_like_float_and_update_the_running_ones() -> None:
    net, x = _folded_pair()
    module = edgemat.quantize(net, edgemat.Recipe(input="fixed<16,5>", weights="fixed<20>", activations="fixed<20>"))
    edgemat.calibrate(module, [x])
    net.train()
    module.train()
    y, z = net(x), module(x)
    assert torch.allclose(y, z, atol=2e-3)
    (y.square().mean()).backward()
    (z.square().mean()).backward()
    for name, parameter in net.named_parameters():
        assert torch.allclose(parameter.grad, module.get_parameter(name).grad, atol=3e-3), name
    for name in ("1.running_mean", "1.running_var"):
        assert torch.allclose(net.get_buffer(name), module.get_buffer(name), atol=2e-3)
    assert module.get_buffer("1.num_batches_tracked") == net.get_buffer("1.num_batches_tracked")


def test_frozen_batch_norm_trains_on_the_deployed_bits() -> None:
    net, x = _folded_pair()
    module = edgemat.quantize(net, edgemat.Recipe(input="fixed<8,4>", weights="fixed<6>", activations="fixed<6>"))
    edgemat.calibrate(module, [x])
    deployed = module.eval()(x)
    module.train()
    assert not torch.equal(module(x), deployed)
    module.load_state_dict(module.state_dict())
    module.get_submodule("1").eval()
    frozen = module(x)
    assert torch.equal(frozen, module.eval()(x))


def test_affine_gradients_are_batch_norms() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
    layer = QuantBatchNorm(copy.deepcopy(norm), weights="fixed<16,3>", input="fixed<20,5>", output=None).train()
    x = (torch.randn(16, 5, 6, 6) * 1.7 + 0.3).requires_grad_()
    z = x.detach().clone().requires_grad_()
    g = torch.randn(16, 5, 6, 6)
    y, w = norm(x), layer(z)
    assert torch.allclose(y, w, atol=1e-3)
    y.backward(g)
    w.backward(g)
    assert torch.allclose(x.grad, z.grad, atol=1e-3)
    assert torch.allclose(norm.weight.grad, layer.weight.grad, rtol=1e-3, atol=5e-2)
    assert torch.allclose(norm.bias.grad, layer.bias.grad, rtol=1e-3, atol=1e-3)
    assert torch.allclose(norm.running_var, layer.running_var, atol=1e-3)


@pytest.mark.parametrize("rounding", ["RND", "RND_CONV", "TRN", "RND_ZERO", "RND_INF", "RND_MIN_INF", "TRN_ZERO"])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False},
        {"kernel_size": (3, 2), "stride": 2, "padding": 1, "ceil_mode": True},
        {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "count_include_pad": False},
    ],
)
def test_average_is_the_rounded_rational(rounding: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    x_format, y_format = Fixed(6, 3), Fixed(5, 4, True, rounding, "SAT")
    codes = torch.randint(-32, 32, (3, 2, 8, 9))
    layer = QuantAvgPool(output=y_format, input=x_format, **options).eval()
    y = layer(codes / 8.0)
    found = (y * 2).to(torch.int64)
    # Sums and counts by an independent walk over the windows.
    kernel, stride = layer.window(codes)[:2]
    pad, include = layer.padding, layer.count_include_pad
    for index in np.ndindex(*found.shape):
        begin = [index[2 + d] * stride[d] - pad for d in range(2)]
        end = [min(begin[d] + kernel[d], codes.shape[2 + d] + pad) for d in range(2)]
        full = (end[0] - begin[0]) * (end[1] - begin[1])
        low = [max(b, 0) for b in begin]
        high = [min(end[d], codes.shape[2 + d]) for d in range(2)]
        part = codes[index[0], index[1], low[0] : high[0], low[1] : high[1]]
        count = full if include else part.numel()
        code = exact_round(Fraction(int(part.sum()), 4 * count), rounding)
        assert int(found[index]) == min(max(code, -16), 15)


def test_adaptive_pool_needs_equal_windows() -> None:
    layer = QuantAdaptiveAvgPool(3, output="fixed<8,4>", input="fixed<8,4>").eval()
    assert layer(torch.zeros(1, 1, 6, 9)).shape == (1, 1, 3, 3)
    with pytest.raises(LoweringError, match="divisor"):
        layer(torch.zeros(1, 1, 7, 9))


@pytest.mark.parametrize("function", ["sigmoid", "tanh", "silu", "gelu", "hardsigmoid", "hardswish"])
def test_table_is_the_stored_one(function: str) -> None:
    from edgemat.ops.table import make_table

    x_format = Fixed(9, 4)
    layer = QuantTable(function, "fixed<8>", input=x_format)
    codes = torch.arange(-256, 256)
    x = codes / 32.0
    ready(layer, x)
    y = layer(x)
    quantizer = layer.output_quantizer
    assert quantizer.codes(y).tolist() == make_table(function, x_format, quantizer.format).tolist()
    assert quantizer.signed == (function not in ("sigmoid", "hardsigmoid"))
    real = x.clone().requires_grad_()
    layer.train()(real).sum().backward()
    inside = (real.grad != 0) & (codes > -200) & (codes < 200)
    expected = torch.autograd.functional.jacobian(lambda t: edgemat.nn.tables.FUNCTIONS[function](t).sum(), x)
    assert torch.allclose(real.grad[inside], expected[inside], atol=1e-6)


def test_table_of_a_wide_input_is_refused() -> None:
    with pytest.raises(FormatError, match="12 bits"):
        QuantSigmoid(input="fixed<13>")


@pytest.mark.parametrize("formats", [("fixed<8,3>", "fixed<6,4>"), ("fixed<20,3>", "ufixed<20,10>")])
def test_add_aligns_exactly(formats: tuple[str, str]) -> None:
    torch.manual_seed(0)
    a, b = (FixedQuantizer(f) for f in formats)
    out = Fixed(10, 5)
    layer = QuantAdd(out)
    x, y = a(torch.randn(500) * 3), b(torch.randn(500) * 3)
    unlinked = layer.eval()(x, y)
    layer.link(a, b)
    linked = layer(x, y)
    fx, fy = a.exponent(), b.exponent()
    f = max(fx, fy)
    total = (a.codes(x) * 2 ** (f - fx) + b.codes(y) * 2 ** (f - fy)).numpy()
    expected = requantize(total, Fixed(40, 40 - f), out)
    assert layer.output_quantizer.codes(linked).tolist() == expected.tolist()
    assert torch.equal(linked, unlinked)


def test_mul_and_concat() -> None:
    torch.manual_seed(0)
    a, b = FixedQuantizer("fixed<16,3>"), FixedQuantizer("fixed<16,4>")
    x, y = a(torch.randn(4, 3)), b(torch.randn(4, 3))
    mul = QuantMul("fixed<16,5>").eval()
    mul.link(a, b)
    product = (a.codes(x) * b.codes(y)).numpy()
    expected = requantize(product, Fixed(40, 40 - 25), Fixed(16, 5))
    assert mul.output_quantizer.codes(mul(x, y)).tolist() == expected.tolist()
    joined = QuantConcat(1, "fixed<20,5>").eval()([x, y])
    assert torch.equal(joined, torch.cat([x, y], 1))


def test_prelu_and_clip() -> None:
    layer = QuantPReLU(2, 0.3, input="fixed<8,4>", output="fixed<8,4>", weights="fixed<6,1>").eval()
    x = torch.arange(-128, 128).view(-1, 1).repeat(1, 2) / 16.0
    slope = exact_round(Fraction(float(np.float32(0.3))) * 32, "RND")
    for code, y in zip(range(-128, 128), layer(x)[:, 0].tolist(), strict=True):
        real = Fraction(code) if code >= 0 else Fraction(code * slope, 32)
        assert y * 16 == exact_round(real, "RND")
    clip = QuantClip(-0.9, 0.7, "fixed<4,1>", input="fixed<8,4>").eval()
    y = clip(x)
    assert float(y.min()) == -7 / 8 and float(y.max()) == 6 / 8
    with pytest.raises(FormatError, match="low <= high"):
        QuantClip(1.0, 0.0)


def test_relu_output_is_unsigned() -> None:
    layer = QuantReLU("fixed<6>")
    assert not layer.output_quantizer.signed and layer.output_quantizer.width == 6
    x = torch.randn(100, requires_grad=True)
    layer.train()(x).sum().backward()
    assert x.grad.tolist() == (x > 0).float().tolist()


class Direct(nn.Module):
    """A module built from edgemat layers, with control flow no tracer follows."""

    def __init__(self):
        super().__init__()
        self.conv = QuantConv2d(1, 4, 3, input="fixed<8,1>", weights="fixed<6>")
        self.relu = QuantReLU("fixed<6>")
        self.pool = QuantAdaptiveAvgPool(1, output="fixed<6>")
        self.dense = QuantLinear(4, 3, input="ufixed<6>", weights="fixed<6>")

    def forward(self, x):
        y = self.relu(self.conv(x))
        for _ in range(1 if y.shape[1] > 2 else 0):
            y = F.max_pool2d(y, 2)
        return self.dense(self.pool(y).flatten(1))


def test_direct_use_trains_exports_and_agrees(tmp_path) -> None:
    import onnxruntime

    torch.manual_seed(0)
    module, x = Direct(), torch.randn(6, 1, 10, 10)
    edgemat.calibrate(module, [x])
    optimizer = torch.optim.SGD(module.parameters(), 1e-2)
    module.train()(x).square().sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    optimizer.step()
    module.eval()
    path = str(tmp_path / "net.onnx")
    edgemat.to_onnx(module, x, path)
    session = onnxruntime.InferenceSession(path)
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.array_equal(found, module(x).detach().numpy())


def test_export_without_preparation_is_refused() -> None:
    module = ready(Direct(), torch.randn(2, 1, 10, 10))
    with pytest.raises(Exception) as caught:
        torch.onnx.export(module, (torch.randn(2, 1, 10, 10),), dynamo=True, verbose=False)
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, FormatError):
        error = error.__cause__ or error.__context__
    assert error is not None and "prepare_export" in str(error)


@pytest.mark.parametrize("batch_norm", ["fold", "affine"])
def test_batch_norm_and_quantiser_in_one_pass_are_the_same(batch_norm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.MaxPool2d(2)
    )
    x, g = torch.randn(16, 3, 12, 12), torch.randn(16, 5, 4, 4)
    module = edgemat.quantize(
        net, edgemat.Recipe(input="fixed<8,3>", activations="fixed<6>", outputs="fixed<6>", batch_norm=batch_norm)
    )
    edgemat.calibrate(module, [x])
    twin = copy.deepcopy(module)
    y = module.train()(x)
    y.backward(g)
    fused = "QuantizedBatch", "StagePass"
    assert sum(map(_functions(y).count, fused)) == 2
    monkeypatch.setattr(FixedQuantizer, "takes_affine", property(lambda self: False))
    z = twin.train()(x)
    z.backward(g)
    assert not any(name in _functions(z) for name in fused)
    # The constant of the rounding joins the affine, so a value next to a tie may fall to its other side.
    assert float((y != z).float().mean()) < 1e-3
    for (name, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=2e-2, atol=2e-2 * float(b.grad.abs().max()) + 1e-3), name
    for name, value in module.named_buffers():
        assert torch.allclose(value.float(), twin.get_buffer(name).float(), rtol=1e-4, atol=1e-5), name


def _functions(y: torch.Tensor) -> str:
    """The names of all autograd nodes behind y."""
    names, stack, seen = [], [y.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        stack += [child for child, _ in node.next_functions]
    return " ".join(names)
