"""parameter_groups, freeze_batch_norm and DistillationLoss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import FormatError
from edgemat.nn import FixedQuantizer
from tests.networks import models
from tests.nn.networks import Net, conv


def by_name(q: nn.Module, groups: list[dict]) -> dict[str, str]:
    """The group of each parameter."""
    names = {id(p): n for n, p in q.named_parameters()}
    return {names[id(p)]: group["name"] for group in groups for p in group["params"]}


def test_each_parameter_is_in_one_group() -> None:
    q = edgemat.quantize(models.ResNet8())
    groups = edgemat.parameter_groups(q, lr=0.1, format_lr=0.001, weight_decay=1e-4, momentum=0.9)
    found = by_name(q, groups)
    assert set(found) == {name for name, _ in q.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(found)
    assert found["conv.weight"] == found["dense.weight"] == "weights"
    assert found["conv.bias"] == found["bn.weight"] == found["bn.bias"] == "vectors"
    assert found["conv.weight_quantizer.frac"] == found["x_quantizer.frac"] == "formats"
    settings = {group["name"]: (group["lr"], group["weight_decay"], group["momentum"]) for group in groups}
    assert settings == {"weights": (0.1, 1e-4, 0.9), "vectors": (0.1, 0.0, 0.9), "formats": (0.001, 0.0, 0.9)}


def test_small_weights_decay_and_learned_constants_do_not() -> None:
    net = Net(
        lambda s, x: s.p(s.l(s.c(x) * s.g).flatten(1)),
        c=conv(3, 1),
        g=nn.Parameter(torch.rand(1, 1, 1, 1)),
        l=nn.Conv2d(1, 1, 8),
        p=nn.Sequential(nn.Linear(1, 4), nn.PReLU()),
    )
    q = edgemat.quantize(net)
    found = by_name(q, edgemat.parameter_groups(q, 0.1))
    assert {name: group for name, group in found.items() if not name.endswith("frac")} == {
        "g": "vectors",
        "c.weight": "weights",
        "c.bias": "vectors",
        "l.weight": "weights",
        "l.bias": "vectors",
        "p.0.weight": "weights",
        "p.0.bias": "vectors",
        "p.1.weight": "vectors",
    }


def test_decay_never_reaches_a_binary_point() -> None:
    """Zero gradients, so that only decay acts; the control is one group for all."""
    torch.manual_seed(0)
    q = edgemat.calibrate(edgemat.quantize(models.Mlp()), [torch.randn(8, 16)])
    plain, before = copy.deepcopy(q), copy.deepcopy(q)
    for module, groups in ((q, edgemat.parameter_groups(q, 0.1, weight_decay=0.5)), (plain, plain.parameters())):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        torch.optim.SGD(groups, lr=0.1, weight_decay=0.5).step()
    fracs = [
        torch.cat([p.frac.detach().flatten() for p in m.modules() if isinstance(p, FixedQuantizer)])
        for m in (q, plain, before)
    ]
    assert torch.equal(fracs[0], fracs[2]) and not torch.equal(fracs[1], fracs[2])
    layers = [m.get_submodule("0") for m in (q, before)]
    assert torch.equal(layers[0].bias, layers[1].bias) and not torch.equal(layers[0].weight, layers[1].weight)


def test_frozen_parameters_are_left_out_and_nothing_is_refused() -> None:
    q = edgemat.quantize(models.Mlp())
    q.get_submodule("0").weight.requires_grad_(False)
    assert "0.weight" not in by_name(q, edgemat.parameter_groups(q, 0.1))
    with pytest.raises(FormatError, match="has no trainable parameter"):
        edgemat.parameter_groups(q.requires_grad_(False), 0.1)
    with pytest.raises(FormatError, match="weight_decay is -1"):
        edgemat.parameter_groups(edgemat.quantize(models.Mlp()), 0.1, weight_decay=-1)


# -- freeze_batch_norm ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_norm", ["fold", "affine"])
def test_a_frozen_network_trains_with_the_deployed_bits(batch_norm: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(32, 3, 32, 32)
    recipe = edgemat.Recipe(weights="fixed<4>", activations="fixed<5>", batch_norm=batch_norm)
    q = edgemat.calibrate(edgemat.quantize(models.ResNet8(), recipe), [x]).train()
    assert not torch.equal(copy.deepcopy(q)(x), copy.deepcopy(q).eval()(x).float())  # the control
    frozen = edgemat.freeze_batch_norm(q)
    assert len(frozen.names) == 7 and "stack1.bn1" in frozen.names
    q.train()
    before = {name: value.clone() for name, value in q.named_buffers()}
    y = q(x)
    assert torch.equal(y, q.eval()(x).float())
    y.sum().backward()
    assert q.get_submodule("bn").weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[name]) for name, value in q.named_buffers())
    frozen.undo()
    q.train()(x)
    assert not torch.equal(q.get_submodule("bn").running_mean, before["bn.running_mean"])


def test_affine_parameters_and_undo() -> None:
    q = edgemat.quantize(models.ResNet8())
    norm = q.get_submodule("bn")
    norm.bias.requires_grad_(False)
    with edgemat.freeze_batch_norm(q, statistics=False, affine=True) as frozen:
        assert not norm.weight.requires_grad and not norm.frozen
        assert not {"bn.weight", "stack2.bn1.bias"} & set(by_name(q, edgemat.parameter_groups(q, 0.1)))
    assert norm.weight.requires_grad and not norm.bias.requires_grad
    norm.weight.requires_grad_(False)
    frozen.undo()
    assert not norm.weight.requires_grad  # once is enough
    outer = edgemat.freeze_batch_norm(q)
    edgemat.freeze_batch_norm(q).undo()
    assert norm.frozen
    outer.undo()
    assert not norm.frozen
    assert edgemat.freeze_batch_norm(edgemat.quantize(models.Mlp())).names == ()


# -- distillation -----------------------------------------------------------------------------------------------------
def test_the_formula() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 5), torch.randn(6, 5), torch.randint(0, 5, (6,))
    p, q = torch.softmax(teacher / 3, 1), torch.softmax(student / 3, 1)
    soft = 9 * (p * (p / q).log()).sum(1).mean()
    hard = F.cross_entropy(student, labels)
    loss = edgemat.DistillationLoss(temperature=3.0, alpha=0.7)
    torch.testing.assert_close(loss(student, teacher, labels), 0.7 * soft + 0.3 * hard)
    torch.testing.assert_close(edgemat.DistillationLoss(3.0, 1.0)(student, teacher), soft)
    torch.testing.assert_close(edgemat.DistillationLoss(3.0, 0.0)(student, teacher, labels), hard)
    assert abs(loss(student, teacher, labels) - loss(teacher, student, labels)) > 1e-3  # the order matters


def test_no_gradient_reaches_the_teacher_and_none_remains_where_both_agree() -> None:
    student = torch.randn(4, 3, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    edgemat.DistillationLoss(alpha=1.0)(student, teacher).backward()
    assert teacher.grad is None and student.grad.abs().max() < 1e-6
    maps = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    flat = [m.permute(0, 2, 3, 1).reshape(-1, 3) for m in maps]
    loss = edgemat.DistillationLoss(alpha=1.0)
    torch.testing.assert_close(loss(*maps), loss(*flat))


def test_several_outputs() -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(4, 3) for _ in range(4))
    labels = torch.randint(0, 3, (4,))
    loss = edgemat.DistillationLoss(alpha=0.5)
    expected = loss(a, c, labels) + loss(b, d, labels)
    torch.testing.assert_close(loss((a, b), (c, d), labels), expected)
    torch.testing.assert_close(loss({"x": a, "y": b}, {"y": d, "x": c}, {"x": labels, "y": labels}), expected)
    weighted = edgemat.DistillationLoss(alpha=0.5, weights={"x": 1.0, "y": 0.25})
    torch.testing.assert_close(
        weighted({"x": a, "y": b}, {"x": c, "y": d}, labels), loss(a, c, labels) + 0.25 * loss(b, d, labels)
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: edgemat.DistillationLoss(0), "temperature is 0"),
        (lambda: edgemat.DistillationLoss(float("inf")), "temperature is inf, expected a finite number"),
        (lambda: edgemat.parameter_groups(nn.Linear(2, 2), float("nan")), "lr is nan, expected a finite number"),
        (lambda: edgemat.DistillationLoss(alpha=1.1), "alpha is 1.1, expected a number from 0 to 1"),
        (lambda: edgemat.DistillationLoss()(torch.rand(2, 3), torch.rand(2, 4)), r"the teacher gives \(2, 4\) for the"),
        (lambda: edgemat.DistillationLoss()(torch.rand(2, 3), torch.rand(2, 3)), "no labels came"),
        (
            lambda: edgemat.DistillationLoss(alpha=1)((torch.rand(2, 3),) * 2, (torch.rand(2, 3),)),
            "teacher do not match",
        ),
        (lambda: edgemat.DistillationLoss(alpha=1)({"a": torch.rand(2, 3)}, {"b": torch.rand(2, 3)}), "no entry 'a'"),
        (lambda: edgemat.DistillationLoss(alpha=1)([], []), "has no outputs"),
    ],
)
def test_what_does_not_match(call, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        call()


def test_a_quantised_student_learns_from_a_float_teacher() -> None:
    torch.manual_seed(0)
    teacher = models.Mlp().eval()
    x = torch.randn(256, 16)
    q = edgemat.calibrate(edgemat.quantize(teacher, edgemat.Recipe(weights="fixed<3>", activations="fixed<4>")), [x])
    loss = edgemat.DistillationLoss(temperature=1.0, alpha=1.0)
    with torch.no_grad():
        targets = teacher(x)
        before = float(loss(q.eval()(x).float(), targets))
    optimizer = torch.optim.Adam(edgemat.parameter_groups(q, 3e-3))
    q.train()
    for _ in range(60):
        optimizer.zero_grad()
        loss(q(x), targets).backward()
        optimizer.step()
    with torch.no_grad():
        assert float(loss(q.eval()(x).float(), targets)) < 0.6 * before
