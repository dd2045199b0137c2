"""K-hot weights in torch: the projection against its definition, gradients, calibration, checkpoints, and the file."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError, LoweringError
from edgemat.formats import ROUNDINGS
from edgemat.lower.reader import read, read_bytes
from edgemat.nn import khot as khot_module
from edgemat.nn.khot import KHotQuantizer, Projection
from edgemat.nn.rounding import LN2, Grid
from edgemat.recipe import WeightSpec
from edgemat.signed_digits import digit_count, project


def quantizer(text: str, khot: int, **options: int) -> KHotQuantizer:
    return KHotQuantizer(text, khot, **options)


@pytest.mark.parametrize("khot", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 3, 6, 8, 12, 13, 16, 24, 32])
def test_values_are_the_nearest_allowed_ones(width: int, khot: int) -> None:
    low, high = -(1 << (width - 1)), (1 << (width - 1)) - 1
    step = max(1, (high - low) // 3000)
    scaled = np.arange(4 * low - 8, 4 * high + 9, step) / 4.0
    for rounding in ROUNDINGS:
        q = quantizer(f"fixed<{width},{width},{rounding},SAT>", khot)
        expected = project(scaled, low, high, khot, rounding)
        assert (q(torch.from_numpy(scaled)).numpy() == expected).all(), rounding
        if width <= 20:
            assert (q(torch.from_numpy(scaled.astype(np.float32))).numpy() == expected).all(), rounding
    assert (digit_count(expected) <= khot).all()


def test_the_table_and_the_search_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(0, 300, 20000))
    values[:4001] = torch.arange(-2000, 2001) / 4.0
    grids = [Grid.of(edgemat.Fixed(9, 9, True, mode, over)) for mode in ROUNDINGS for over in ("SAT", "SAT_ZERO")]
    tables = [Projection(grid, 2)(values * 2.0) for grid in grids]
    monkeypatch.setattr(khot_module, "TABLE_WIDTH", 0)
    searched = [Projection(grid, 2)(values * 2.0) for grid in grids]
    for grid, a, b in zip(grids, tables, searched, strict=True):
        assert torch.equal(a, b.to(a.dtype)), grid
    assert not torch.equal(tables[0], tables[1])


def test_overflow_modes() -> None:
    x = torch.tensor([-9.0, -8.4, -8.0, -7.0, 6.0, 7.0, 7.4, 7.6, 12.0])
    assert quantizer("fixed<4,4,RND,SAT>", 1)(x).tolist() == [-8, -8, -8, -8, 4, 4, 4, 4, 4]
    assert quantizer("fixed<4,4,RND,SAT_SYM>", 2)(x).tolist() == [-7, -7, -7, -7, 6, 7, 7, 7, 7]
    assert quantizer("fixed<4,4,RND,SAT_ZERO>", 1)(x).tolist() == [0, -8, -8, -8, 4, 4, 4, 0, 0]
    assert quantizer("ufixed<4,4,RND,SAT>", 1)(x).tolist() == [0, 0, 0, 0, 8, 8, 8, 8, 8]
    assert math.isnan(quantizer("fixed<4,4>", 1)(torch.tensor([math.nan])).item())
    assert math.isnan(quantizer("fixed<20,4>", 1)(torch.tensor([math.nan])).item())


@pytest.mark.parametrize("text", ["fixed<6>", "fixed<6,[2,1,3]>", "fixed<14>"])
def test_gradients_follow_the_projected_value(text: str) -> None:
    """In range dv/dx = 1 and dv/df = ln2 * (x - v), outside 0 and -ln2 * v."""
    q = KHotQuantizer(text.replace("[2,1,3]", "").replace(",>", ">"), 1, channels=3)
    fracs = torch.tensor([3.0, 4.3, 1.0]) + (8 if "14" in text else 0)
    q.set_frac(fracs)
    x = torch.tensor([[0.7, -9.0, 0.3, 100.0], [0.2, 1.1, -0.9, 3.0], [5.0, -20.0, 11.0, 0.1]], requires_grad=True)
    g = torch.tensor([[1.0, 2.0, -3.0, 0.5], [1.5, -1.0, 2.0, 1.0], [0.25, 4.0, -2.0, 3.0]])
    v = q(x)
    v.backward(g)
    scale = 2.0 ** fracs.round()[:, None]
    inside = (torch.floor(x.detach() * scale + 0.5) >= q.grid.low) & (
        torch.floor(x.detach() * scale + 0.5) <= q.grid.high
    )
    assert torch.equal(x.grad, torch.where(inside, g, 0.0))
    slope = torch.where(inside, LN2 * (x.detach() - v.detach()), -LN2 * v.detach())
    assert torch.allclose(q.frac.grad, (g * slope).sum(1), rtol=1e-6)
    plain = edgemat.nn.FixedQuantizer("fixed<6>" if "14" not in text else "fixed<14>", channels=3, axis=0)
    plain.set_frac(fracs)
    plain(x).backward(g)
    assert not torch.allclose(plain.frac.grad, q.frac.grad), "the control: plain rounding has other gradients"


def test_a_binary_point_for_the_tensor_gets_the_sum() -> None:
    q = KHotQuantizer("fixed<6>", 2)
    q.set_frac(3.0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    v = q(x)
    v.sum().backward()
    assert q.frac.grad.shape == () and torch.allclose(q.frac.grad, LN2 * (x.detach() - v.detach()).sum(), atol=1e-6)


def test_folding_divides_the_scale_out_again() -> None:
    q = KHotQuantizer("fixed<8>", 2, channels=2)
    q.set_frac(torch.tensor([5.0, 6.0]))
    w = torch.tensor([[0.3, -1.2], [0.7, 0.01]], requires_grad=True)
    scale = torch.tensor([0.5, -2.0])
    folded = q.folded(w, scale)
    assert torch.equal(folded * scale[:, None], q(w * scale[:, None]))
    folded.sum().backward()
    assert torch.equal(w.grad, torch.ones(2, 2))


def test_the_range_is_held_by_what_is_allowed() -> None:
    """0.99 of 8 bits is 126.7, whose nearest power of two is 128: one bit coarser it is 64, which fits."""
    x = torch.tensor([[0.99, -0.3], [0.6, -0.1]])
    plain = edgemat.nn.FixedQuantizer("fixed<8>", channels=2, axis=0, role="weights")
    one, two = KHotQuantizer("fixed<8>", 1, channels=2), KHotQuantizer("fixed<8>", 2, channels=2)
    for q in (plain, one, two):
        q.fit(x)
    assert plain.exponents().tolist() == [7, 7] and two.exponents().tolist() == [7, 7]
    assert one.exponents().tolist() == [6, 7]
    assert one(x)[:, 0].tolist() == [1.0, 0.5]


def test_mse_calibration_measures_with_the_projection() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 16))
    nn.init.normal_(net[0].weight)
    errors = {}
    for method in ("minmax", "mse"):
        q = edgemat.quantize(net, edgemat.Recipe(weights="fixed<6>", khot=1))
        edgemat.calibrate(q, [torch.randn(32, 64)], method=method)
        layer = q.get_submodule("0")
        errors[method] = float((layer.weight_quantizer(layer.weight) - layer.weight).detach().square().sum())
        exponents = layer.weight_quantizer.exponents().clone()
    best = torch.full((16,), math.inf)
    for frac in range(-2, 12):
        layer.weight_quantizer.set_frac(torch.full((16,), float(frac)))
        best = torch.minimum(best, (layer.weight_quantizer(layer.weight) - layer.weight).square().sum(1).detach())
    layer.weight_quantizer.set_frac(exponents.float())
    assert errors["mse"] == pytest.approx(float(best.sum()), rel=1e-5) and errors["mse"] < errors["minmax"]


def test_checkpoints_keep_the_number_of_digits() -> None:
    net = nn.Linear(4, 3)
    made = {k: edgemat.quantize(nn.Sequential(net), edgemat.Recipe(weights="fixed<6>", khot=k)) for k in (None, 1, 2)}
    for q in made.values():
        edgemat.calibrate(q, [torch.randn(8, 4)])
    kept = made[2].state_dict()
    fresh = edgemat.quantize(nn.Sequential(nn.Linear(4, 3)), edgemat.Recipe(weights="fixed<6>", khot=2))
    fresh.load_state_dict(kept)
    x = torch.randn(5, 4)
    assert torch.equal(fresh.eval()(x), made[2].eval()(x))
    for other in (None, 1):
        with pytest.raises(RuntimeError, match="the checkpoint holds"):
            made[other].load_state_dict(kept)
    words = r"is fixed<6,RND,SAT> with khot=1 in this network, .* with khot=2; quantise"
    with pytest.raises(RuntimeError, match=words):
        made[1].load_state_dict(kept)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learn_width": True}, "khot=2 and a learned width"),
        ({"groups": "weight"}, "a binary point per weight or group"),
        ({"accumulator": 14}, "a bound on its accumulator"),
        ({"points": "statistics"}, "points from statistics"),
        ({"format": edgemat.Fixed(8, None, True, "RND", "WRAP")}, "overflow WRAP, expected SAT"),
        ({"khot": 4}, "khot is 4, expected one of 1, 2, 3"),
    ],
)
def test_what_does_not_combine_is_refused(change: dict, words: str) -> None:
    spec = {"format": edgemat.Fixed(8), "khot": 2, **change}
    with pytest.raises(FormatError, match=words):
        edgemat.nn.QuantLinear(3, 2, weights=WeightSpec(**spec))


class Blocks(nn.Module):
    """Every kind of weight, scale and slope."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.slope = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6)
        self.depth, self.up = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.leaky, self.fc = nn.LeakyReLU(0.1), nn.Linear(4 * 36, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.slope(self.norm(self.conv(x)))
        y = self.leaky(self.up(torch.relu(self.depth(y)[:, :, :3, :3])))
        return self.fc(torch.flatten(y, 1))


def trained(khot: int | None, batch_norm: str, seed: int = 0) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(seed)
    x = torch.randn(24, 1, 8, 8)
    recipe = edgemat.Recipe(
        input="fixed<8,3>", weights="fixed<6>", activations="fixed<6>", khot=khot, batch_norm=batch_norm
    )
    q = edgemat.quantize(Blocks(), recipe)
    edgemat.calibrate(q, [x])
    optimizer = torch.optim.SGD(q.parameters(), lr=0.05)
    q.train()
    for _ in range(3):
        loss = nn.functional.cross_entropy(q(x), torch.arange(24) % 5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return q.eval(), x


@pytest.mark.parametrize("batch_norm", ["fold", "affine"])
@pytest.mark.parametrize("khot", [1, 2, 3])
def test_every_weight_scale_and_slope_is_stated_and_exact(tmp_path, khot: int, batch_norm: str) -> None:
    q, x = trained(khot, batch_norm)
    path = tmp_path / "net.onnx"
    edgemat.to_onnx(q, x[:2], path)
    graph = read(path)
    weighted = [c for c in graph.nodes if "khot" in c.op.attributes]
    assert {c.op.name for c in weighted} >= {"Conv", "ConvTranspose", "Linear", "PRelu"}
    assert ("Affine" in {c.op.name for c in weighted}) == (batch_norm == "affine")
    assert all(c.attrs["khot"] == khot for c in weighted)
    assert max(int(digit_count(c.constants[1]).max()) for c in weighted) <= khot
    assert all(c.op.cost(c).multiplies == 0 for c in graph.nodes)
    for call in (c for c in weighted if c.op.name in ("Linear", "ConvTranspose")):
        places = 9 if call.op.name == "ConvTranspose" else 1
        cost = call.op.cost(call)
        assert cost.additions == cost.shift_adds == places * int(digit_count(call.constants[1]).sum())
    with torch.no_grad():
        expected = q(x).numpy()
    found = onnxruntime.InferenceSession(str(path)).run(None, {graph.input_names[0]: x.numpy()})[0]
    assert (found == expected).all()
    # The control: some weight of the same network without the constraint has more digits.
    plain = read_bytes(_exported(trained(None, batch_norm)[0], x, tmp_path))
    assert all(c.attrs["khot"] is None for c in plain.nodes if "khot" in c.op.attributes)
    assert max(int(digit_count(c.constants[1]).max()) for c in plain.nodes if "khot" in c.op.attributes) > min(khot, 2)
    assert sum(c.op.cost(c).multiplies for c in plain.nodes) > 0


def _exported(q: nn.Module, x: torch.Tensor, folder) -> bytes:
    edgemat.to_onnx(q, x[:2], folder / "plain.onnx")
    return (folder / "plain.onnx").read_bytes()


def test_a_rule_sets_single_layers(tmp_path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    q = edgemat.quantize(net, edgemat.Recipe(weights="fixed<6>", rules={"2": {"khot": 1}}))
    edgemat.calibrate(q, [torch.randn(9, 4)])
    graph = read_bytes(_exported(q.eval(), torch.randn(2, 4), tmp_path))
    assert [c.attrs["khot"] for c in graph.nodes if c.op.name == "Linear"] == [None, 1]
    model = onnx.load(tmp_path / "plain.onnx")
    nodes = [n for n in model.graph.node if n.op_type == "Linear"]
    assert [any(a.name == "khot" for a in n.attribute) for n in nodes] == [False, True]
    declared = {f.overload: "khot" in f.attribute for f in model.functions if f.name == "Linear"}
    assert [declared[n.overload] for n in nodes] == [False, True], "files of earlier versions stay as they are"


def test_a_file_that_promises_too_much_is_refused(tmp_path) -> None:
    q, x = trained(2, "fold")
    data = _exported(q, x, tmp_path)
    model = onnx.load_from_string(data)
    node = next(n for n in model.graph.node if n.op_type == "Conv")
    value = next(t for t in model.graph.initializer if t.name == node.input[1])
    codes = onnx.numpy_helper.to_array(value).copy()
    at = np.unravel_index(int(np.abs(codes.astype(int)).argmax()), codes.shape)
    codes[at] = 11 * np.sign(codes[at])
    value.CopyFrom(onnx.numpy_helper.from_array(codes, value.name))
    with pytest.raises(LoweringError, match="11 is a sum of 3 signed powers of two, but khot is 2"):
        read_bytes(model.SerializeToString())
    model = onnx.load_from_string(data)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "khot":
                attribute.i = 1
    with pytest.raises(LoweringError, match="signed powers of two, but khot is 1"):
        read_bytes(model.SerializeToString())
    for attribute in model.graph.node[1].attribute:
        if attribute.name == "khot":
            attribute.i = 7
    with pytest.raises(LoweringError, match="khot is 7; expected one of 1, 2, 3"):
        read_bytes(model.SerializeToString())


@pytest.mark.parametrize("text", ["fixed<6>", "fixed<14>"])
def test_compiled_steps_have_the_bits_of_eager_ones(text: str) -> None:
    """One operator in the graph, no break, the same values and gradients."""
    eager, traced = (KHotQuantizer(text, 2, channels=3).train() for _ in range(2))
    for q in (eager, traced):
        q.set_frac(torch.tensor([3.0, 4.0, 2.0]))
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))
    scale = torch.tensor([0.5, -1.5, 2.0])
    compiled = torch.compile(lambda x: traced(x) + traced.folded(x, scale), backend="aot_eager", fullgraph=True)
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    expected = eager(a) + eager.folded(a, scale)
    found = compiled(b)
    (expected * w).sum().backward()
    (found * w).sum().backward()
    assert torch.equal(found, expected) and torch.equal(a.grad, b.grad)
    assert torch.allclose(eager.frac.grad, traced.frac.grad)
