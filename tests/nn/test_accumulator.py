"""Accumulators hold by construction: every step's deployed codes, every order of the sum, every backend's width."""

from __future__ import annotations

import copy
import itertools
import re
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import edgemat
from edgemat import report
from edgemat.errors import EdgematError, FormatError, LoweringError
from edgemat.lower import read
from edgemat.lower.reader import read_bytes
from edgemat.nn import QuantConv2d, QuantConvTranspose2d, QuantLinear
from edgemat.nn.accumulator import AccumulatorQuantizer, Sum, project_onto_ball, row_norms
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.ops.stated_accumulator import needed_bits
from edgemat.recipe import WeightSpec
from edgemat.targets.hls.config import ConfigBuilder
from edgemat.targets.mcu import epilogue
from edgemat.verification import backends as rooms

BOUNDS = ("a2q", "a2q+")


def deployed_codes(layer: WeightedLayer) -> tuple[np.ndarray, np.ndarray]:
    """Weight codes [O, n] and bias codes [O] of a layer as it would be exported now."""
    twin = copy.deepcopy(layer).eval()
    with torch.no_grad():
        weight, bias = twin.quantized()
        codes = twin.weight_quantizer.codes(weight).flatten(1).numpy()
        exponents = twin.accumulator_exponents()
        offset = np.zeros(len(codes), np.int64) if bias is None else torch.ldexp(bias, exponents).long().numpy()
    return codes, offset


def reach(codes: np.ndarray, bias: np.ndarray, low: int, high: int) -> tuple[int, int]:
    """Smallest and largest partial sum of any order: what each term can add on its side of 0, added up one by one."""
    terms = np.stack([codes * low, codes * high])
    under = np.minimum(terms.min(0), 0).sum(1) + np.minimum(bias, 0)
    over = np.maximum(terms.max(0), 0).sum(1) + np.maximum(bias, 0)
    return int(under.min()), int(over.max())


def holds(layer: WeightedLayer, bits: int) -> bool:
    low, high = layer.known_source().format.rails
    under, over = reach(*deployed_codes(layer), low, high)
    return -(1 << (bits - 1)) <= under and over <= (1 << (bits - 1)) - 1


def spec(bits: int, bound: str, fmt: str = "fixed<6>", groups: str = "channel") -> WeightSpec:
    return WeightSpec(edgemat.Fixed.parse(fmt), groups, accumulator=bits, accumulator_bound=bound)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("input", ["fixed<6,2>", "ufixed<5,1>", "bipolar"])
def test_every_training_step_keeps_the_bound(bound: str, input: str) -> None:
    """Weights, biases and points are thrown about far beyond what training does; the codes keep within P each time."""
    generator = torch.Generator().manual_seed(3)
    tight = 0
    for bits, groups, fmt in itertools.product(
        (9, 12, 16), ("channel", "tensor"), ("fixed<4>", "fixed<8>", "fixed<5,2>")
    ):
        layer = QuantLinear(24, 5, weights=spec(bits, bound, fmt, groups), input=input)
        x = torch.randn(16, 24, generator=generator)
        layer.train()
        layer(x).sum().backward()
        for step in range(6):
            with torch.no_grad():
                size = 10.0 ** (step - 2)
                layer.weight.copy_(torch.randn(5, 24, generator=generator) * size)
                layer.weight[0] = size
                layer.weight[1, 1:] = 0.0
                layer.weight[2] = 0.0
                layer.bias.copy_(torch.randn(5, generator=generator) * size * 4)
                quantizer = layer.weight_quantizer
                quantizer.log2_norm.copy_(torch.randn(5, generator=generator) * 8)
                if not quantizer.stated:
                    quantizer.frac.add_(torch.randn(quantizer.frac.shape, generator=generator) * 2)
            assert holds(layer, bits), (bits, groups, fmt, step)
            tight += not holds(layer, bits - 1)
    assert tight > 30


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("unsigned", [False, True])
def test_folded_batch_norm_keeps_the_bound(bound: str, unsigned: bool) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6))
    recipe = edgemat.Recipe(
        input="ufixed<6,2>" if unsigned else "fixed<6,2>", weights="fixed<6>", accumulator=11, accumulator_bound=bound
    )
    q = edgemat.quantize(model, recipe)
    x = torch.rand(8, 2, 6, 6) * 3
    edgemat.calibrate(q, [x])
    q.train()
    layer, norm = q.get_submodule("0"), q.get_submodule("1")
    tight = 0
    for step in range(8):
        q(x).square().sum().backward()
        with torch.no_grad():
            norm.weight.copy_(torch.randn(6) * 2.0**step)
            norm.weight[0] = 0.0
            norm.bias.copy_(torch.randn(6) * 2.0 ** (2 * step - 6))
            norm.running_mean.copy_(torch.randn(6) * 3.0**step)
            norm.running_var.copy_(torch.rand(6) * 4.0 ** (step - 4) + 1e-4)
            layer.weight.mul_(torch.randn(6, 1, 1, 1))
        assert holds(layer, 11), step
        tight += not holds(layer, 10)
    assert tight >= 4


def test_rounding_to_nearest_breaks_the_bound() -> None:
    """The control: the same weights under RND instead of TRN_ZERO need more bits."""
    torch.manual_seed(0)
    layer = QuantLinear(64, 4, bias=False, weights=spec(12, "a2q"), input="fixed<6,2>")
    edgemat.calibrate(layer, [torch.randn(8, 64)])
    with torch.no_grad():
        layer.weight_quantizer.log2_norm.fill_(20.0)
    assert holds(layer, 12)
    layer.weight_quantizer.grid = replace(layer.weight_quantizer.grid, rounding="RND")
    assert not holds(layer, 12)


def test_bounds_are_the_papers() -> None:
    """Without a bias: 2**(signed-N) * (2**(P-1) - 1) for A2Q, (2**P - 2) / (2**N - 1) for A2Q+."""
    for bits, width in itertools.product((8, 11, 16, 20), (1, 3, 8)):
        signed = Sum(bits, -(1 << (width - 1)), (1 << (width - 1)) - 1, False, False)
        assert float(signed.caps(None)) == pytest.approx(((1 << (bits - 1)) - 1) * 2 // 2**width + 0.5, rel=1e-6)
        for low, high in ((-(1 << (width - 1)), (1 << (width - 1)) - 1), (0, (1 << width) - 1)):
            centred = Sum(bits, low, high, True, False)
            allowed = float(centred.caps(None)) - 1.0
            paper = ((1 << bits) - 2) / ((1 << width) - 1)
            assert allowed <= paper < allowed + 2.001
    unsigned = Sum(12, 0, 15, False, False), Sum(12, 0, 15, True, False)
    assert float(unsigned[1].caps(None)) == pytest.approx(2 * float(unsigned[0].caps(None)), rel=1e-6)


def test_caps_are_exact_at_every_quotient() -> None:
    """The whole part of the cap is the exact integer quotient, the half code on top included nowhere else."""
    generator = np.random.default_rng(5)
    for _ in range(300):
        bits = int(generator.integers(3, 54))
        high = int(generator.integers(1, 1 << min(bits - 1, 20)))
        total = Sum(bits, 0, high, False, True)
        bias = int(generator.integers(0, total.room + 1))
        cap = float(total.caps(torch.tensor([bias], dtype=torch.float64))[0])
        exact = (total.room - bias) // high
        assert exact - exact * 2.0**-19 <= cap < exact + 1


def test_projection_is_the_nearest_point() -> None:
    """Against bisection on the threshold, and: no feasible point nearby is nearer."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(40, 17, generator=generator, dtype=torch.float64) * 3
    rows[0] = 0.0
    rows[1] = 2.0
    radius = torch.rand(40, generator=generator, dtype=torch.float64) * 30
    radius[2] = 0.0
    found = project_onto_ball(rows, radius)
    assert bool((found.abs().sum(1) <= radius + 1e-9).all())
    inside = rows.abs().sum(1) <= radius
    assert bool(inside.any()) and torch.equal(found[inside], rows[inside])
    for row, limit, point in zip(rows, radius, found, strict=True):
        low, high = 0.0, float(row.abs().max())
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if float((row.abs() - middle).clamp_min(0).sum()) > limit else (low, middle)
        expected = row if float(row.abs().sum()) <= limit else (row.abs() - high).clamp_min(0) * row.sign()
        torch.testing.assert_close(point, expected, atol=1e-9, rtol=0)


def test_centred_projection_keeps_the_sum_zero() -> None:
    rows = torch.randn(20, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    rows -= rows.mean(1, keepdim=True)
    found = project_onto_ball(rows, torch.full((20,), 5.0, dtype=torch.float64), True)
    assert float(found.sum(1).abs().max()) < 1e-9
    torch.testing.assert_close(row_norms(found, 0, True), torch.full((20,), 5.0, dtype=torch.float64))


def test_projection_start_is_nearer_than_shrinking() -> None:
    """The Euclidean start loses less of the float weights than dividing them until they fit (A2Q+, section 4)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 8))
    x = torch.randn(32, 200)
    q = edgemat.quantize(model, edgemat.Recipe(input="ufixed<8,3>", weights="fixed<8,1>", accumulator=16))
    edgemat.calibrate(q, [x])
    layer = q.get_submodule("0")
    weight = model[0].weight.detach()
    centred = weight - weight.mean(1, keepdim=True)
    norms, limits = (row_norms(w.detach(), 0, True) for w in (centred, layer.weight))
    assert bool((limits < norms).all())
    shrunk = centred * (limits / norms)[:, None]
    started, divided = (float((w.detach() - centred).square().sum()) for w in (layer.weight, shrunk))
    assert started < 0.9 * divided, (started, divided)


def test_training_with_frozen_statistics_is_evaluation() -> None:
    torch.manual_seed(0)
    q = edgemat.quantize(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2)),
        edgemat.Recipe(
            input="fixed<6,2>", weights="fixed<5>", activations="fixed<5>", accumulator=11, outputs="fixed<8>"
        ),
    )
    x = torch.randn(16, 2, 6, 6)
    edgemat.calibrate(q, [x])
    q.train()
    q.get_submodule("1").eval()
    y = q(x)
    assert torch.equal(y, q.eval()(x))


def test_batch_statistics_see_the_deployed_size() -> None:
    """With the batch's statistics as running ones, a step's result is the deployed one up to the weights' rounding."""
    torch.manual_seed(0)
    q = edgemat.quantize(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)),
        edgemat.Recipe(input="fixed<8,3>", weights="fixed<12>", accumulator=16, accumulator_bound="a2q"),
    )
    norm = q.get_submodule("1")
    norm.momentum = 1.0
    x = torch.randn(64, 2, 6, 6)
    edgemat.calibrate(q, [x])
    with torch.no_grad():
        q.get_submodule("0").weight_quantizer.frac.add_(4.0)  # far too fine: the bound binds
    q.train()
    for _ in range(3):
        y = q(x)
    deviation = (q.eval()(x) - y).abs().max() / y.abs().max()
    free = norm.normalize(q.get_submodule("0").apply_weight(x, q.get_submodule("0").real_weight(), None))
    assert float(deviation.detach()) < 0.05
    assert float(((free - y).abs().max() / y.abs().max()).detach()) > 0.3, "the bound did not bind"


def test_penalty_brings_norms_back() -> None:
    torch.manual_seed(0)
    q = edgemat.quantize(
        nn.Sequential(nn.Linear(32, 4)), edgemat.Recipe(input="fixed<8,3>", weights="fixed<8,1>", accumulator=13)
    )
    assert float(edgemat.accumulator_penalty(QuantLinear(2, 2, input="fixed<8,3>"))) == 0.0
    with pytest.raises(FormatError, match="holds no layer of edgemat"):
        edgemat.accumulator_penalty(nn.Linear(2, 2))
    edgemat.calibrate(q, [torch.randn(8, 32)])
    assert float(edgemat.accumulator_penalty(q).detach()) < 1e-3
    quantizer = next(m for m in q.modules() if isinstance(m, AccumulatorQuantizer))
    with torch.no_grad():
        quantizer.log2_norm.add_(3.0)
    before = edgemat.accumulator_penalty(q)
    assert float(before.detach()) == pytest.approx(4 * 3.0, rel=0.2)
    before.backward()
    assert torch.allclose(quantizer.log2_norm.grad, torch.ones(4))


def test_gradients_reach_everything_learned() -> None:
    torch.manual_seed(0)
    q = edgemat.quantize(
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
        edgemat.Recipe(input="fixed<8,3>", weights="fixed<6>", activations="fixed<6>", accumulator=24),
    )
    x = torch.randn(32, 16)
    edgemat.calibrate(q, [x])
    q.train()
    q(x).square().sum().backward()
    for name, parameter in q.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().sum()) > 0, name


def test_a_row_of_zeros_and_wild_norms_stay_finite() -> None:
    torch.manual_seed(0)
    layer = QuantLinear(8, 3, weights=spec(12, "a2q+"), input="fixed<5,2>")
    with torch.no_grad():
        layer.weight[1] = 0.0
    x = torch.randn(16, 8)
    edgemat.calibrate(layer, [x])
    layer.train()
    for norm in (0.0, 500.0, -500.0):
        with torch.no_grad():
            layer.weight_quantizer.log2_norm.fill_(norm)
        layer.zero_grad()
        layer(x).square().sum().backward()
        assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)
        assert holds(layer, 12)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_batch_norm_of_scale_zero_keeps_gradients_finite(bound: str) -> None:
    """Pruned channels have such a scale; a binary point that is NaN after the first step ends the training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))
    with torch.no_grad():
        model[1].weight[1] = 0.0
    q = edgemat.quantize(model, edgemat.Recipe(accumulator=20, accumulator_bound=bound))
    x = torch.randn(8, 2, 5, 5)
    edgemat.calibrate(q, [x])
    q.train()
    (q(x).square().sum() + edgemat.accumulator_penalty(q)).backward()
    assert all(bool(p.grad.isfinite().all()) for p in q.parameters() if p.grad is not None)


def test_float_checkpoints_load_and_own_ones_resume() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    recipe = edgemat.Recipe(input="fixed<8,3>", weights="fixed<6>", activations="fixed<6>", accumulator=14)
    q, x = edgemat.quantize(model, recipe), torch.randn(32, 16)
    q.load_state_dict(model.state_dict())
    edgemat.calibrate(q, [x])
    other = edgemat.quantize(model, recipe)
    other.load_state_dict(q.state_dict())
    assert torch.equal(q.eval()(x), other.eval()(x))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"accumulator": 4}, "cannot hold one weight code times its input's codes -128 to 127"),
        ({"accumulator": 16, "weights": "fixed<8,1,RND_CONV>"}, "only rounding toward zero"),
        ({"accumulator": 16, "weights": "fixed<8,1,TRN_ZERO,WRAP>"}, "overflow SAT"),
        ({"accumulator": 16, "khot": 2}, "expected one of the two"),
        ({"accumulator": 16, "learn_widths": "weights"}, "a learned width"),
        ({"accumulator": 16, "weight_groups": "weight"}, "per weight or group"),
        ({"accumulator": 16, "points": "statistics"}, "points from statistics"),
    ],
)
def test_what_cannot_hold_is_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        recipe = edgemat.Recipe(**{"input": "fixed<8,3>", "weights": "fixed<6>"} | change)
        q = edgemat.quantize(nn.Sequential(nn.Linear(8, 4)), recipe)
        edgemat.calibrate(q, [torch.randn(4, 8)])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_refused_layers_and_the_least_width() -> None:
    with pytest.raises(FormatError, match="transposed"):
        QuantConvTranspose2d(2, 2, 2, weights=spec(16, "a2q"))
    for least in (9, 10):  # one weight code of 1 and a bias of at most half: 127 * 2 + 3 need 10 bits with A2Q
        layer = QuantLinear(8, 4, weights=spec(least, "a2q"), input="fixed<8,3>")
        if least == 9:
            with pytest.raises(FormatError, match="expected at least 10 bits"):
                edgemat.calibrate(layer, [torch.randn(4, 8)])
        else:
            edgemat.calibrate(layer, [torch.randn(4, 8)])
            assert holds(layer, least)


@pytest.fixture(scope="module")
def tight(tmp_path_factory: pytest.TempPathFactory):
    """A network whose sums need every bit of their 12."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    recipe = edgemat.Recipe(
        input="fixed<6,2>", weights="fixed<6>", activations="fixed<5>", accumulator=12, outputs="fixed<6>"
    )
    q = edgemat.quantize(model, recipe)
    x = torch.randn(64, 2, 6, 6)
    edgemat.calibrate(q, [x])
    with torch.no_grad():
        for part in q.modules():
            if isinstance(part, AccumulatorQuantizer):
                part.log2_norm.add_(8.0)
    path = tmp_path_factory.mktemp("tight") / "net.onnx"
    edgemat.to_onnx(q.eval(), x[:2], path)
    return q, path, x


def test_file_inspection_and_backends_agree(tight) -> None:
    module, path, x = tight
    graph = read(path)
    stated = [call for call in graph.nodes if call.bounds.width is not None]
    assert [call.op.name for call in stated] == ["Conv", "Linear"]
    assert [call.bounds.width for call in stated] == [needed_bits(call.bounds) for call in stated] == [12, 12]
    found = report.inspect(graph, target="mcu")
    nodes = {node.name: node for node in found.nodes if node.accumulator}
    assert [(node.accumulator, node.needed_bits) for node in nodes.values()] == [(12, 12)] * 2
    assert {row[2] for row in found.target.rows if row[0] in nodes} == {"int16_t"}
    names = tuple(n for n in ("onnx", "hls:parallel", "mcu") if rooms.make(n, None).missing() is None)
    result = edgemat.verify(path, x.numpy(), backends=names, module=module)
    assert result.ok, result.to_dict()


def test_a_weight_one_lsb_larger_is_refused(tight) -> None:
    """The control of the proof: the untouched file reads, one whose widest sum grew past 12 bits is refused by node."""
    _, path, _ = tight
    model = onnx.load(path)
    graph = read(path)
    call = next(c for c in graph.nodes if c.op.name == "Linear")
    codes = call.constant(1)
    low, high = call.x[0].lo, call.x[0].hi
    spans = [reach(codes[o : o + 1], call.constant(2)[o : o + 1], low, high) for o in range(len(codes))]
    row = int(np.argmax([max(-under - 1, over) for under, over in spans]))
    under, over = spans[row]
    grow = 1 if over >= -under - 1 else -1
    column = int(np.argmax(codes[row] * grow == np.abs(codes[row]).min()))
    tensor = next(t for t in model.graph.initializer if t.name == call.inputs[1])
    values = onnx.numpy_helper.to_array(tensor).copy()
    for _ in range(2 + ((1 << 11) - max(-under, over)) // max(high, 1)):
        values[row, column] += grow
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    with pytest.raises(LoweringError) as caught:
        read_bytes(model.SerializeToString())
    text = str(caught.value)
    assert call.name in text and "need an accumulator of 13 bits, but the file states 12" in text


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("ufixed<12,4,TRN,WRAP>", "expected a signed format"),
        ("fixed<12,9,TRN,WRAP>", "on the grid"),
        ("fixed<12>", "attribute 'accumulator'.*has a learned binary point"),
        ("fixed<12,{i},TRN,SAT>", "TRN,SAT>, which rounds or saturates.*'fixed<12,{i},TRN,WRAP>'"),
        ("fixed<12,{i},RND,SAT>", "rounds or saturates"),
        ("fixed<12,{i},RND,WRAP>", "rounds or saturates"),
    ],
)
def test_other_statements_are_refused(tight, stated: str, words: str) -> None:
    model = onnx.load(tight[1])
    node = next(n for n in model.graph.node if n.op_type == "Linear")
    attribute = next(a for a in node.attribute if a.name == "accumulator")
    point = attribute.s.decode().partition(",")[2].rpartition(",TRN")[0]  # of the sum
    attribute.s = stated.format(i=point).encode()
    with pytest.raises(EdgematError, match=words.format(i=re.escape(point))):
        read_bytes(model.SerializeToString())


def test_an_hls_accumulator_of_one_bit_less_is_seen(tight, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := rooms.make("hls:parallel", None).missing()) is not None:
        pytest.skip(reason)
    typedef, seen = ConfigBuilder.typedef, []

    def narrower(self, name: str, text: str) -> None:
        if name == "acc_t" and text == "ap_int<12>":
            seen.append(text)
            text = "ap_int<11>"
        typedef(self, name, text)

    monkeypatch.setattr(ConfigBuilder, "typedef", narrower)
    assert not edgemat.verify(tight[1], samples=8, backends=("hls:parallel",)).ok and len(seen) >= 2


def test_a_c_accumulator_of_eight_bits_is_seen(tight, monkeypatch: pytest.MonkeyPatch) -> None:
    if (reason := rooms.make("mcu", None).missing()) is not None:
        pytest.skip(reason)
    choice = epilogue.EpilogueChoice.__init__

    def eight(self, step, arrays) -> None:
        choice(self, step, arrays)
        self.macros = [(k, "8" if k == "EM_SUM_BITS" else v) for k, v in self.macros]

    monkeypatch.setattr(epilogue.EpilogueChoice, "__init__", eight)
    assert not edgemat.verify(tight[1], samples=8, backends=("mcu",)).ok


def test_auto_takes_the_bound_that_suits_the_input() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))
    q = edgemat.quantize(model, edgemat.Recipe(accumulator=20, rules={"3": {"accumulator_bound": "a2q+"}}))
    bounds = [m.bound for m in q.modules() if isinstance(m, AccumulatorQuantizer)]
    assert bounds == ["a2q", "a2q+", "a2q+"]
    for given, bound in (("fixed<6,2>", "a2q"), ("ufixed<6,2>", "a2q+"), ("bipolar", "a2q")):
        assert QuantLinear(8, 4, weights=spec(16, "auto"), input=given).weight_quantizer.bound == bound
        assert QuantLinear(8, 4, weights=spec(16, "a2q+"), input=given).weight_quantizer.bound == "a2q+"


def test_convolution_by_hand_and_summary_of_a_layer() -> None:
    layer = QuantConv2d(3, 4, 3, groups=1, weights=spec(14, "a2q+"), input="ufixed<4,1>")
    edgemat.calibrate(layer, [torch.rand(2, 3, 5, 5)])
    assert holds(layer, 14)
    assert "accumulator=14, bound=a2q+" in repr(layer)
