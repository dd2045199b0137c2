"""The recurrence over a whole sequence gives the codes and the gradients of the quantiser called step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from edgemat.nn.mlgru import MLGRU
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.recurrence import carrier_of, gated_means, takes_sequences

SHARE, STATES = "ufixed<8,0>", ("fixed<16,4>", "fixed<6,0>", "fixed<8,1,RND_CONV,SAT_SYM>", "fixed<7,1,TRN,WRAP>")


def drawn(
    state: str, fresh: str, steps: int = 40
) -> tuple[FixedQuantizer, FixedQuantizer, FixedQuantizer, Tensor, Tensor]:
    """The three quantisers, shares with both of their ends among them, and what enters, with its rails."""
    torch.manual_seed(0)
    quantizers = FixedQuantizer(state), FixedQuantizer(SHARE), FixedQuantizer(fresh)
    f, c = torch.rand(3, steps, 5) * 1.2 - 0.1, torch.randn(3, steps, 5) * 2.0 ** int(fresh[6:-1].split(",")[1])
    return *quantizers, quantizers[1](f).detach(), quantizers[2](c).detach()


def by_steps(f: Tensor, c: Tensor, state: FixedQuantizer) -> Tensor:
    """What `gated_means` replaces: the quantiser step by step, in float64."""
    h, made = torch.zeros_like(f[:, 0]), []
    for t in range(f.shape[1]):
        f_t, c_t = f[:, t].double(), c[:, t].double()
        h = state(f_t * h.double() + (1.0 - f_t) * c_t)
        made.append(h)
    return torch.stack(made, 1)


@pytest.mark.parametrize("fresh", ["fixed<8,3>", "fixed<8,-2>"])
@pytest.mark.parametrize("state", STATES)
def test_states_are_those_of_single_steps(state: str, fresh: str) -> None:
    kept, share, entering, f, c = drawn(state, fresh)
    assert takes_sequences(kept, share, entering)
    found = gated_means(f, c, kept, share, entering)
    expected = by_steps(f, c, kept)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    if state == "fixed<6,0>" and fresh == "fixed<8,3>":  # both rails are reached
        assert set(found.unique().tolist()) >= {-0.5, 0.5 - 2**-6}
    for other in STATES:  # control: the format, rounding and overflow of another state are other codes
        if other != state:
            assert not torch.equal(gated_means(f, c, FixedQuantizer(other), share, entering), found)
    backwards = gated_means(f.flip(1), c.flip(1), kept, share, entering).flip(1)
    assert not torch.equal(backwards, found)  # control: the order of the steps


def test_a_tie_is_rounded_as_the_format_says() -> None:
    share, entering = FixedQuantizer(SHARE), FixedQuantizer("fixed<8,4>")
    f, c = torch.tensor([[[0.0], [0.5]]]), torch.tensor([[[0.0625], [0.0]]])
    made = {mode: gated_means(f, c, FixedQuantizer(f"fixed<8,4,{mode}>"), share, entering) for mode in ("RND", "TRN")}
    assert made["RND"].flatten().tolist() == [0.0625, 0.0625]
    assert made["TRN"].flatten().tolist() == [0.0625, 0.0]


@pytest.mark.parametrize(
    ("state", "fresh", "carrier"),
    [
        ("fixed<15,4>", "fixed<8,3>", torch.float32),  # 2**14 * 2**8: one bit below 2**24 is left
        ("fixed<16,4>", "fixed<8,3>", torch.float32),
        ("fixed<17,4>", "fixed<8,3>", torch.float64),
        ("fixed<16,4>", "fixed<8,5>", torch.float64),  # what enters reaches further than the state
    ],
)
def test_the_carrier_holds_every_sum(state: str, fresh: str, carrier: torch.dtype) -> None:
    kept, share, entering, f, c = drawn(state, fresh)
    assert carrier_of(kept, share, entering) == carrier
    assert torch.equal(gated_means(f, c, kept, share, entering), by_steps(f, c, kept))


@pytest.mark.parametrize("state", ["fixed<16>", "fixed<6>"])
def test_gradients_are_those_of_single_steps(state: str) -> None:
    kept, share, entering, f, c = drawn(state, "fixed<8,2>")
    kept.set_frac(5.0)
    weights, found = torch.randn(f.shape), []
    for way in (lambda a, b: gated_means(a, b, kept, share, entering), lambda a, b: by_steps(a, b, kept)):
        a, b = f.clone().requires_grad_(), c.clone().requires_grad_()
        kept.frac.grad = None
        (way(a, b) * weights).sum().backward()
        found.append((a.grad, b.grad, kept.frac.grad))
    for ours, expected in zip(*found, strict=True):
        assert ours is not None and expected is not None and expected.abs().max() > 0
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_mixer_takes_it_and_falls_back() -> None:
    torch.manual_seed(0)
    layer, x = MLGRU(6, output="fixed<12>"), torch.randn(2, 9, 6)
    kept, share, entering = (part.output_quantizer for part in (layer.state, layer.sigmoid, layer.silu))
    assert kept is not None and share is not None and entering is not None
    assert not takes_sequences(kept, share, entering)  # not set yet
    layer.train()(x)
    assert takes_sequences(kept, share, entering)
    f, c, _ = layer.projected(layer.enter(x))
    whole = layer.states(f, c)
    kept.delayed = True
    assert not takes_sequences(kept, share, entering)
    assert torch.equal(layer.states(f, c), whole)  # step by step: the same
