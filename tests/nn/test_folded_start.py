"""Weights with a batch norm folded in: binary points and statistics that agree before a training begins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import edgemat
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import FixedQuantizer
from edgemat.nn.folded_start import settled_factors, settled_points, sizes_of
from edgemat.nn.weight_points import best_frac


def network() -> tuple[nn.Sequential, list[Tensor]]:
    """Two convolutions with batch norms that have seen the smooth images, and the images."""
    torch.manual_seed(0)
    x = nn.functional.avg_pool2d(torch.randn(96, 3, 20, 20), 3, 1)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.BatchNorm2d(24), nn.ReLU()
    )
    for norm in (net[1], net[4]):
        norm.momentum = None
        nn.init.uniform_(norm.weight, 0.4, 2.0)
    net.train()(x)
    for norm in (net[1], net[4]):
        norm.momentum = 0.1
    return net.eval(), list(x.split(32))


def calibrated(bits: int, **options: str) -> tuple[nn.Module, list[Tensor]]:
    net, batches = network()
    recipe = edgemat.Recipe(input="fixed<8,2>", weights=f"fixed<{bits}>", activations="fixed<8>")
    q = edgemat.quantize(net, recipe)
    edgemat.calibrate(q, batches, "mse", **options)
    return q, batches


def statistics(q: nn.Module) -> list[Tensor]:
    return [v.clone() for name, v in q.named_buffers() if name.endswith(("running_mean", "running_var"))]


def saturated(q: nn.Module) -> float:
    """Share of the second layer's codes at the rails, as deployed."""
    layer = q.get_submodule("3")
    codes = layer.weight_quantizer.codes(layer.quantized()[0])
    grid = layer.weight_quantizer.grid
    return float(((codes == grid.low) | (codes == grid.high)).double().mean())


def test_scales_settle_where_the_size_is_reached() -> None:
    torch.manual_seed(0)
    rows = torch.randn(50, 40, dtype=torch.float64)
    quantizer, fracs = FixedQuantizer("fixed<3>"), torch.tensor([0, 1] * 25)
    sizes = sizes_of(rows) * 0.9
    sizes[7] = 0.0
    factors = settled_factors(rows, sizes, fracs, quantizer.round_codes)
    step = torch.exp2(fracs.double())

    def reached(t: Tensor) -> Tensor:
        codes = (rows * (t * step)[:, None]).add(0.5).floor().clamp(-4, 3)
        return sizes_of(codes) / step

    inside = (factors > 0.26) & (factors < 3.9)
    inside[7] = False
    assert inside.sum() > 40 and factors[7] == 1.0
    assert (reached(factors)[inside] >= sizes[inside]).all()
    assert (reached(factors * 0.999)[inside] < sizes[inside]).all()  # the smallest such factor
    assert (reached(factors)[factors > 3.9] < sizes[factors > 3.9]).all()


def test_points_are_taken_where_a_settled_scale_exists() -> None:
    torch.manual_seed(1)
    rows = torch.randn(64, 72, dtype=torch.float64) * torch.exp2(torch.linspace(-1, 1, 64).double())[:, None]
    quantizer = FixedQuantizer(Fixed(2, None, True, "RND", "SAT_SYM"))
    plain = torch.tensor([best_frac(row, -3, quantizer.round_codes) for row in rows])
    sizes = sizes_of(rows)

    def settled(fracs: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        step = torch.exp2(fracs.double())[:, None]
        codes = quantizer.round_codes(rows * factors[:, None] * step, 1.0)
        return nn.functional.cosine_similarity(codes, rows, 1), sizes_of(codes / step) / sizes

    before, reach = settled(plain, settled_factors(rows, sizes, plain, quantizer.round_codes))
    points, factors = settled_points(rows, sizes, plain, quantizer.round_codes)
    after, found = settled(points, factors)
    assert (reach < 0.99).sum() > 5  # the control: where the error is least there may be no such scale
    assert (found > 0.99).all() and after.mean() > 0.85
    assert torch.equal(after[points == plain], before[points == plain])


def test_a_training_that_only_watches_stays_where_it_started() -> None:
    shares = {}
    for choice in ("follow", "keep"):
        q, batches = calibrated(2, batch_norm=choice)
        start = [v.clone() for v in statistics(q)]
        first = saturated(q)
        q.train()
        with torch.no_grad():
            for _ in range(20):
                for batch in batches:
                    q(batch)
        var = (statistics(q)[3] / start[3]).log2().abs()
        shares[choice] = float(var.mean()), abs(saturated(q) - first)
    assert shares["follow"][0] < 0.5 * shares["keep"][0], shares
    assert shares["follow"][1] < shares["keep"][1], shares


def test_statistics_move_by_what_quantisation_changes_and_once() -> None:
    kept, _ = calibrated(2, batch_norm="keep")
    net = network()[0]
    assert all(torch.equal(a, b) for a, b in zip(statistics(kept), statistics(net), strict=True))
    wide, batches = calibrated(12)
    before = statistics(wide)
    assert all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(before, statistics(net), strict=True))
    few, _ = calibrated(2)
    assert not torch.allclose(statistics(few)[3], statistics(net)[3], rtol=0.05)
    assert [int(few.get_buffer(f"{n}.num_batches_tracked")) for n in (1, 4)] == [1, 1]
    edgemat.calibrate(wide, batches, "mse")  # the statistics are those of the deployed weights by now
    assert all(torch.allclose(a, b, rtol=0.02, atol=0.02) for a, b in zip(statistics(wide), before, strict=True))


def test_frozen_and_lonely_samples_leave_statistics_alone() -> None:
    net, batches = network()
    q = edgemat.quantize(net, edgemat.Recipe(input="fixed<8,2>", weights="fixed<2>"))
    edgemat.freeze_batch_norm(q)
    edgemat.calibrate(q, batches, "mse")
    assert all(torch.equal(a, b) for a, b in zip(statistics(q), statistics(net), strict=True))
    rows = torch.randn(64, 5)
    dense = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).train()
    dense(rows)
    q = edgemat.quantize(dense.eval(), edgemat.Recipe(weights="fixed<2>"))
    edgemat.calibrate(q, rows[:3].split(1), "mse")
    assert all(torch.equal(a, b) for a, b in zip(statistics(q), statistics(dense), strict=True))
    edgemat.calibrate(q, [{next(n.target for n in q.graph.nodes if n.op == "placeholder"): rows}], "mse")
    assert not torch.equal(statistics(q)[1], statistics(dense)[1])


def test_fresh_batch_norms_get_the_statistics_of_the_deployed_weights() -> None:
    net, batches = network()
    for norm in (net[1], net[4]):
        norm.reset_running_stats()
    q = edgemat.quantize(net, edgemat.Recipe(input="fixed<12,4>", weights="fixed<12>", activations="fixed<12>"))
    edgemat.calibrate(q, batches, "mse")
    assert all(torch.allclose(a, b, rtol=0.05, atol=0.05) for a, b in zip(statistics(q), statistics(network()[0])))
    assert int(q.get_buffer("1.num_batches_tracked")) == len(batches)


def test_an_unknown_treatment_is_refused() -> None:
    with pytest.raises(FormatError, match="batch_norm is 'move', expected one of follow, keep"):
        calibrated(4, batch_norm="move")
