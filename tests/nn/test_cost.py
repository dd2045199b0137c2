"""Cost models against the file, the C project and hand counts; targets, ramps and the front."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import FormatError
from edgemat.lower.reader import read
from edgemat.report import inspect
from tests.nn.test_learned_width import Small, trained


class Mixed(nn.Module):
    """A transposed convolution, a fixed-point affine and PReLU beside a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 4, 2, stride=2)
        self.norm, self.slope = nn.BatchNorm2d(4), nn.PReLU(4)
        self.conv, self.dense = nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4 * 16, 2)

    def forward(self, x):
        return self.dense(self.conv(self.slope(self.norm(self.up(x)))).relu().flatten(1))


def ebops_of(file) -> int:
    return sum(call.op.cost(call).ebops for call in read(file).nodes)


def test_ebops_are_those_of_the_file(tmp_path):
    q, x = trained("weight", "channel", steps=40)
    edgemat.to_onnx(q, x[:2], tmp_path / "net.onnx")
    assert edgemat.cost(q, "ebops").item() == ebops_of(tmp_path / "net.onnx")
    table = edgemat.cost_table(q, "ebops")
    assert table.total == edgemat.cost(q).item() and [row[0] for row in table.rows] == ["first", "second", "dense"]
    with torch.no_grad():  # the control: one odd weight loses its lowest bit
        codes = q.dense.weight_quantizer.codes_now()
        odd = (codes.abs() * (codes % 2 != 0)).argmax()
        q.dense.weight_quantizer.frac.view(-1)[odd] = q.dense.weight_quantizer.frac.view(-1)[odd].round() - 2
    q(x)
    assert edgemat.cost(q, "ebops").item() != ebops_of(tmp_path / "net.onnx")


def test_ebops_of_fixed_widths_and_other_layers_are_those_of_the_file(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 2, 3, 3)
    recipe = edgemat.Recipe(input="fixed<5,3>", weights="fixed<4>", activations="fixed<6>", batch_norm="affine")
    q = edgemat.quantize(Mixed(), recipe)
    edgemat.calibrate(q, [x])
    q.eval()(x)
    edgemat.to_onnx(q, x[:2], tmp_path / "net.onnx")
    assert edgemat.cost(q).item() == pytest.approx(ebops_of(tmp_path / "net.onnx"), rel=0.02)
    # Differences are intervals the file proves narrower than their formats, never wider.
    assert edgemat.cost(q).item() >= ebops_of(tmp_path / "net.onnx")
    assert not edgemat.cost(q).requires_grad


def test_flash_and_multiplications_are_those_of_the_c_project(tmp_path):
    q, x = trained("weight", "channel")
    edgemat.to_onnx(q, x[:2], tmp_path / "net.onnx")
    found = inspect(tmp_path / "net.onnx", "mcu")
    assert found.target is not None
    stored = {row[0]: row[3] for row in found.target.rows}
    table = edgemat.cost_table(q, "mcu")
    assert {row[0]: row[1] for row in table.rows} == {name: stored[name] for name in ("first", "second", "dense")}
    assert edgemat.cost(q, "mcu").item() == table.total
    assert found.target.totals["arena_bytes"] == table.rows[1][-1]  # the others read the input or write the output
    macs = {node.name: node.additions for node in found.nodes}
    assert {row[0]: row[5] for row in table.rows} == {name: macs[name] for name in ("first", "second", "dense")}


def test_luts_of_a_network_counted_by_hand():
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU(), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.75, -0.5]]))  # 3 has two signed digits, -2 one
        model[2].weight.fill_(0.5)
    recipe = edgemat.Recipe(input="fixed<4,2>", weights="fixed<4,1>", activations="ufixed<3,1>".replace("u", ""))
    q = edgemat.quantize(model, recipe)
    x = torch.tensor([[1.0, 1.0]])
    edgemat.calibrate(q, [x])
    q.eval()(x)
    # Two and one digits of 4 + 1 bits, rounding and saturating 3 bits; one digit of 3 + 1 bits.
    assert edgemat.cost(q, "lut").item() == 3 * 5 + 2 * 3 + 4


@pytest.mark.parametrize("model", ["ebops", "lut", "mcu"])
def test_a_step_down_the_gradient_lowers_the_cost(model):
    q, x = trained("weight", "channel", steps=1)
    q.train().zero_grad()
    q(x)
    before = edgemat.cost(q, model)
    before.backward()
    formats = [p for m in q.modules() if isinstance(m, edgemat.nn.FixedQuantizer) for p in m.parameters()]
    assert all((p.grad is None) or bool((p.grad >= 0).all()) for p in formats)
    with torch.no_grad():
        for p in formats:
            if p.grad is not None:
                p.sub_(2.0 * (p.grad > 0))
    q(x)
    after = edgemat.cost(q, model)
    assert after.item() < before.item() or (model == "mcu" and after.item() <= before.item())


def test_the_table_renders_and_dumps():
    q, _ = trained("weight", "channel", steps=1)
    for model in edgemat.nn.cost.MODELS:
        table = edgemat.cost_table(q, model)
        assert table.to_dict()["layers"][0]["layer"] == "first" and json.dumps(table.to_dict())
        assert table.render().row_count == 3


# -- targets and ramps ---------------------------------------------------------------------------------------------


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes that a line all but parts."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(256) % 2
    x = torch.randn(256, 8, generator=generator)
    x[:, 0] += 3.0 * labels - 1.5
    return x, labels


def small(**options) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A perceptron of learned widths."""
    torch.manual_seed(0)
    x, labels = blobs()
    recipe = edgemat.Recipe(
        input="fixed<8,4>", learn_widths="all", weight_groups="weight", activation_groups="channel", **options
    )
    q = edgemat.quantize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), recipe)
    edgemat.calibrate(q, [x])
    return q.train(), x, labels


def run(q, x, labels, target, steps: int) -> None:
    optimizer = torch.optim.Adam(q.parameters(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        loss = F.cross_entropy(q(x), labels) + target.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        target.update()


@pytest.mark.parametrize(("model", "at_most"), [("ebops", 900), ("lut", 300)])
def test_a_target_is_met_and_not_by_pruning_everything(model, at_most):
    q, x, labels = small()
    target = edgemat.CostTarget(q, model, at_most=at_most)
    q(x)
    assert edgemat.cost(q, model).item() > 3 * at_most
    assert not target.met() and "not met" in target.report()
    run(q, x, labels, target, 400)
    assert target.met() and target.report().endswith("met")
    assert target.present() > 0.3 * at_most  # what was asked for is used
    assert (q.eval()(x).argmax(1) == labels).float().mean() > 0.9


def test_a_target_out_of_reach_says_so():
    q, x, labels = small()
    target = edgemat.CostTarget(q, "mcu", at_most=16)  # int8 weights take a byte each, pruned or not
    run(q, x, labels, target, 30)
    assert not target.met() and "still growing" in target.report()
    target.multiplier = 1e9
    target.update()
    assert "cannot be learned away" in target.report()


def test_a_target_resumes_bit_for_bit():
    runs = []
    for stop in (40, 20):
        q, x, labels = small()
        target = edgemat.CostTarget(q, at_most=900)
        run(q, x, labels, target, stop)
        runs.append((q, target))
    state = runs[1][1].state_dict()
    fresh = edgemat.CostTarget(runs[1][0], at_most=1.0)
    fresh.load_state_dict(json.loads(json.dumps(state)))
    assert fresh.state_dict() == state and fresh.at_most == 900
    with pytest.raises(FormatError, match="'ebops'"):
        edgemat.CostTarget(runs[1][0], "lut", at_most=1).load_state_dict(state)


def test_a_ramp_grows_by_one_factor_and_resumes():
    q, x, _ = small()
    ramp = edgemat.CostRamp(q, start=1e-6, stop=1e-2, steps=5)
    q(x)
    cost, betas = edgemat.cost(q).item(), []
    for _ in range(6):
        betas.append(ramp.beta)
        assert ramp.penalty().item() == pytest.approx(ramp.beta * cost)
        ramp.step()
    assert betas == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-2])
    fresh = edgemat.CostRamp(q, start=1.0, stop=2.0, steps=9)
    fresh.load_state_dict(ramp.state_dict())
    assert (fresh.beta, fresh.count) == (ramp.beta, 6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda q: edgemat.cost(q, "lots"), "did you mean|expected ebops"),
        (lambda q: edgemat.cost(nn.Linear(2, 2)), "edgemat.quantize first"),
        (lambda q: edgemat.cost(edgemat.quantize(Small())), "first; call q|call q"),
        (lambda q: edgemat.CostTarget(q, at_most=0), "at_most is 0"),
        (lambda q: edgemat.CostTarget(q).update(), "before the first penalty"),
        (lambda q: edgemat.CostRamp(q, start=0.0), "start is 0.0"),
        (lambda q: edgemat.CostRamp(q, steps=0), "steps is 0"),
    ],
)
def test_refusals_say_what_to_do(make, message):
    q, _, _ = small()
    with pytest.raises(FormatError, match=message):
        make(q)


def test_a_network_of_fixed_widths_has_no_target():
    model = nn.Linear(2, 2)
    q = edgemat.quantize(nn.Sequential(model))
    edgemat.calibrate(q, [torch.ones(2, 2)])
    q.train()(torch.ones(2, 2))
    with pytest.raises(FormatError, match="learn_widths='all'"):
        edgemat.CostTarget(q, at_most=5).penalty()


# -- the front -----------------------------------------------------------------------------------------------------


def test_a_front_keeps_what_nothing_beats(tmp_path):
    q, _, _ = small()
    front = edgemat.Front(tmp_path / "front")
    offers = [
        (0.8, 100, True),
        (0.7, 200, False),
        (0.9, 300, True),
        (0.8, 100, False),
        (0.85, 100, True),
        (0.9, 250, True),
    ]
    for accuracy, cost, kept in offers:
        assert front.offer(q, accuracy, torch.tensor(float(cost))) is kept
    assert [(p.accuracy, p.cost) for p in front.points] == [(0.85, 100), (0.9, 250)]
    files = {p.name for p in (tmp_path / "front").iterdir()}
    assert files == {"front.json", *(p.file for p in front.points)}
    index = json.loads((tmp_path / "front" / "front.json").read_text())
    assert [p["cost"] for p in index["points"]] == [100, 250]
    assert front.table().row_count == 2


def test_a_front_gives_its_networks_back_and_opens_again(tmp_path):
    q, x, _ = small()
    y = q.eval()(x)
    front = edgemat.Front(tmp_path)
    front.offer(q, 0.5, 10)
    with torch.no_grad():
        for p in q.parameters():
            p.mul_(0.5)
    assert not torch.equal(q(x), y)
    again = edgemat.Front(tmp_path)
    assert again.points == front.points
    again.load(q, 0)
    assert torch.equal(q(x), y)
    assert torch.load(tmp_path / again.points[0].file, weights_only=True)
    assert again.offer(q, 0.6, 20) and again.points[1].file != again.points[0].file
    (tmp_path / again.points[0].file).unlink()
    assert [p.cost for p in edgemat.Front(tmp_path).points] == [20]


def test_a_front_refuses_nan_broken_and_foreign_indices(tmp_path):
    q, _, _ = small()
    with pytest.raises(FormatError, match="accuracy is nan, expected a finite number"):
        edgemat.Front(tmp_path).offer(q, float("nan"), 1)
    with pytest.raises(FormatError, match="cost is inf, expected a finite number"):
        edgemat.Front(tmp_path).offer(q, 0.9, float("inf"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(FormatError, match="cannot be a folder"):
        edgemat.Front(tmp_path / "file")
    (tmp_path / "front.json").write_text("{")
    with pytest.raises(FormatError, match="cannot be read"):
        edgemat.Front(tmp_path)
    point = {"accuracy": 1, "cost": 1, "file": "../other.pt"}
    (tmp_path / "front.json").write_text(json.dumps({"version": 1, "count": 1, "points": [point]}))
    with pytest.raises(FormatError, match="its own folder"):
        edgemat.Front(tmp_path)


def test_a_front_survives_a_checkpoint_that_cannot_be_written(tmp_path, monkeypatch):
    q, _, _ = small()
    front = edgemat.Front(tmp_path)
    front.offer(q, 0.5, 10)

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        front.offer(q, 0.9, 5)
    assert [p.cost for p in edgemat.Front(tmp_path).points] == [10]
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".pt"}
