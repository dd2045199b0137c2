"""What torch lets a user write in several ways means the same after `quantize`."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import LoweringError, UnsupportedOpError

FINE = edgemat.Recipe(input="fixed<14,1>", weights="fixed<14>", activations="fixed<14>")


class Block(nn.Module):
    """Two linear layers and what a test does with them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.activation = nn.ReLU(inplace=True)


class Keywords(Block):
    def forward(self, x):
        return self.second(input=F.relu(input=self.first(input=x)))


class ReadAfterChange(Block):
    def forward(self, x):
        y = self.first(x)
        z = y.relu_()
        return self.second(y + z)


class ReadAfterModule(Block):
    def forward(self, x):
        y = self.first(x)
        z = self.activation(y)
        y += z
        return self.second(F.relu(y, True) - y)


class SizesAreNumbers(Block):
    def forward(self, x):
        size = x.size(0)
        count = size
        count *= 1
        return self.second(self.first(x).view(size, -1))


class ReadThroughView(Block):
    def forward(self, x):
        y = self.first(x)
        view = y.view(-1, 2, 4)
        y.relu_()
        return self.second(view.flatten(1))


class FunctionalDropout(Block):
    def forward(self, x):
        return self.second(F.dropout(self.first(x), 0.5, self.training))


@pytest.mark.parametrize("kind", [Keywords, ReadAfterChange, ReadAfterModule, SizesAreNumbers])
def test_every_spelling_computes_what_the_float_module_does(kind) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.rand(16, 8) * 2 - 1
    expected = model(x.clone())
    q = edgemat.quantize(model, FINE)
    edgemat.calibrate(q, [x])
    assert torch.allclose(q.eval()(x).float(), expected, atol=0.01)


def test_a_change_seen_through_a_view_is_refused_with_its_place() -> None:
    with pytest.raises(UnsupportedOpError, match=r"test_normal_form\.py:\d+.*relu_.*reads through a view"):
        edgemat.quantize(ReadThroughView())


@pytest.mark.parametrize("training", [True, False])
def test_functional_dropout_follows_the_mode(training: bool) -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 8)
    q = edgemat.quantize(FunctionalDropout().train(training), FINE)
    edgemat.calibrate(q, [x])
    assert q.training is training
    assert torch.equal(q.eval()(x), q(x))
    assert not torch.equal(q.train()(x), q(x))


def test_a_single_layer_is_refused_with_the_remedy() -> None:
    with pytest.raises(LoweringError, match=r"single Linear.*torch\.nn\.Sequential"):
        edgemat.quantize(nn.Linear(4, 2))


def test_a_traced_module_and_one_inside_another_can_be_quantised() -> None:
    torch.manual_seed(0)
    x = torch.rand(16, 8) * 2 - 1
    traced = torch.fx.symbolic_trace(Keywords())
    for model in (traced, nn.Sequential(traced)):
        q = edgemat.quantize(model, FINE)
        edgemat.calibrate(q, [x])
        assert torch.allclose(q.eval()(x).float(), model(x), atol=0.01)
