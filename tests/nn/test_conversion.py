"""edgemat.quantize: names, state, what stays untouched, where quantisers go, what is refused and how."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgemat
from edgemat.errors import EdgematError, FormatError, LoweringError, UnsupportedOpError
from edgemat.nn import FixedQuantizer, QuantConv2d, QuantReLU
from tests.networks import models
from tests.nn.networks import NETWORKS, Net, conv


@pytest.mark.parametrize(
    "make", [models.Mlp, models.LeNet, models.ResNet8, models.DsCnn, models.EcgCnn, models.Autoencoder]
)
def test_a_float_state_loads_and_its_names_stay(make) -> None:
    torch.manual_seed(0)
    source = make()
    module = edgemat.quantize(make())
    module.load_state_dict(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    assert {n for n, _ in source.named_parameters()} <= {n for n, _ in module.named_parameters()}


def test_the_users_module_is_untouched() -> None:
    torch.manual_seed(0)
    model = models.ResNet8().train()
    before, kinds = copy.deepcopy(model.state_dict()), [type(m) for m in model.modules()]
    module = edgemat.quantize(model)
    x = torch.randn(2, 3, 32, 32)
    edgemat.calibrate(module, [x])
    module.train()(x).sum().backward()
    torch.optim.SGD(module.parameters(), 0.1).step()
    assert [type(m) for m in model.modules()] == kinds and model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_quantised_state_round_trip_restores_formats() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 1, 28, 28)
    module = edgemat.quantize(models.LeNet())
    edgemat.calibrate(module, [x])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("frac"):
                parameter.add_(0.7)
    twin = edgemat.quantize(models.LeNet())
    with pytest.raises(FormatError, match="calibrate"):
        twin.eval()(x)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(x), module.eval()(x))
    formats = [str(m.format) for m in module.modules() if isinstance(m, FixedQuantizer)]
    assert formats == [str(m.format) for m in twin.modules() if isinstance(m, FixedQuantizer)]


def test_a_whole_module_can_be_saved(tmp_path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 1, 28, 28)
    module = edgemat.quantize(models.LeNet())
    edgemat.calibrate(module, [x])
    y = module.eval()(x)
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(x), y)
    with torch.no_grad():
        loaded.get_submodule("relu_1").output_quantizer.frac.add_(1)
    assert not torch.equal(loaded(x), y)
    assert loaded.get_submodule("fc1").source() is loaded.get_submodule("relu_1").output_quantizer


def test_where_quantisers_go() -> None:
    module = edgemat.quantize(models.ResNet8(), edgemat.Recipe(input="fixed<8,1>", activations="fixed<6>"))
    assert module.get_submodule("conv").output_quantizer is None  # its ReLU quantises
    assert module.get_submodule("stack1.conv2").output_quantizer.signed  # an operand of the addition
    relus = [m for m in module.modules() if isinstance(m, QuantReLU)]
    assert len(relus) == 7 and all(not m.output_quantizer.signed and m.output_quantizer.width == 6 for m in relus)
    assert not module.get_submodule("pool").output_quantizer.signed  # an average of ReLUs
    assert module.get_submodule("dense").output_quantizer is None  # the exact accumulator


def test_a_relu_behind_max_pooling_moves_before_it() -> None:
    model = Net(lambda s, x: s.d(F.relu(F.max_pool2d(s.c(x), 2))), c=conv(), d=conv(4, 2))
    module = edgemat.quantize(model)
    quantizer = module.get_submodule("c").output_quantizer
    assert quantizer.relu and not quantizer.signed
    assert not any(isinstance(m, QuantReLU) for m in module.modules())


def test_outputs_format_and_every_layer() -> None:
    module = edgemat.quantize(models.Mlp(), edgemat.Recipe(outputs="fixed<10>", every_layer=True))
    assert str(module.get_submodule("6").output_quantizer.grid.width) == "10"
    assert module.get_submodule("0").output_quantizer is not None


def test_rules_by_name_and_type() -> None:
    recipe = edgemat.Recipe(
        weights="fixed<6>",
        rules={nn.Conv2d: {"weights": "fixed<4>"}, "conv2": {"weights": "fixed<5,1>", "activations": "fixed<7>"}},
    )
    module = edgemat.quantize(models.LeNet(), recipe)
    widths = [module.get_submodule(n).weight_quantizer.width for n in ("conv1", "conv2", "fc1")]
    assert widths == [4, 5, 6]
    assert module.get_submodule("conv2").weight_quantizer.stated
    grid = module.get_submodule("relu_1").output_quantizer.grid
    assert (grid.width, grid.signed) == (7, True)  # stated by the rule, sign included


def test_batch_norm_affine_by_rule() -> None:
    recipe = edgemat.Recipe(rules={"stack1.bn1": {"batch_norm": "affine"}})
    module = edgemat.quantize(models.ResNet8(), recipe)
    assert isinstance(module.get_submodule("stack1.bn1"), edgemat.nn.QuantBatchNorm)
    assert isinstance(module.get_submodule("stack1.bn2"), edgemat.nn.BatchNorm)


def test_several_inputs_and_a_dict_of_outputs() -> None:
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(5, 4)

        def forward(self, left, right):
            y = self.a(left) + self.b(right)
            return {"sum": y, "parts": [F.relu(y), y[:, :2]]}

    recipe = edgemat.Recipe(input={"left": "fixed<8,2>", "right": "fixed<6,1>"})
    module = edgemat.quantize(Two(), recipe)
    assert module.get_submodule("right_quantizer").width == 6
    edgemat.calibrate(module, [{"left": torch.randn(4, 3), "right": torch.randn(4, 5)}])
    y = module.eval()(torch.randn(2, 3), torch.randn(2, 5))
    assert set(y) == {"sum", "parts"} and y["parts"][1].shape == (2, 2)
    with pytest.raises(FormatError, match=r"'lefft'; did you mean 'left'"):
        edgemat.quantize(Two(), edgemat.Recipe(input={"lefft": "fixed<8>", "right": "fixed<8>"}))
    with pytest.raises(FormatError, match="'right'"):
        edgemat.quantize(Two(), edgemat.Recipe(input={"left": "fixed<8>"}))


def test_training_mode_is_kept_part_by_part() -> None:
    model = models.ResNet8().train()
    model.stack1.bn1.eval()
    module = edgemat.quantize(model)
    assert module.training and not module.get_submodule("stack1.bn1").training
    assert module.get_submodule("stack1.bn2").training
    assert not edgemat.quantize(models.Mlp().eval()).training


def test_gradients_reach_every_parameter() -> None:
    for name, (make, shapes) in NETWORKS.items():
        if name in ("arg max",):
            continue
        torch.manual_seed(0)
        xs = [torch.randn(shape) * 2 for shape in shapes]
        module = edgemat.quantize(make())
        edgemat.calibrate(module, [tuple(xs)])
        outputs = module.train()(*xs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        sum(y.float().square().sum() for y in outputs).backward() if any(y.requires_grad for y in outputs) else None
        missing = [n for n, p in module.named_parameters() if p.grad is None]
        assert not missing, (name, missing)
        assert all(torch.isfinite(p.grad).all() for p in module.parameters()), name


def test_mixed_with_edgemat_layers() -> None:
    model = Net(lambda s, x: s.d(s.r(s.c(x))), c=QuantConv2d(3, 4, 3, input="fixed<8,3>"), r=nn.ReLU(), d=conv(4, 2))
    module = edgemat.quantize(model)
    x = torch.randn(2, 3, 8, 8)
    edgemat.calibrate(module, [x])
    assert module.eval()(x).shape == (2, 2, 6, 6)


# -- refusals ---------------------------------------------------------------------------------------------------------
def _depends_on_data(s, x):
    if x.sum() > 0:  # line of the refusal
        return s.c(x)
    return x


def _loops_over_batch(s, x):
    return torch.cat([s.c(row) for row in x])


def test_control_flow_is_refused_with_file_and_line() -> None:
    for run in (_depends_on_data, _loops_over_batch):
        with pytest.raises(LoweringError) as caught:
            edgemat.quantize(Net(run, c=conv()))
        line = run.__code__.co_firstlineno + 1
        assert f"test_conversion.py:{line}" in str(caught.value)
        assert "edgemat.nn layers" in str(caught.value)


REFUSED = {
    "functional linear": (lambda: Net(lambda s, x: F.linear(x, s.w), w=nn.Parameter(torch.ones(2, 3))), "linear"),
    "exp": (lambda: Net(lambda s, x: torch.exp(x)), "exp"),
    "cumsum": (lambda: Net(lambda s, x: x.cumsum(1)), "cumsum"),
    "group norm": (lambda: Net(lambda s, x: s.n(x), n=nn.GroupNorm(1, 3)), "GroupNorm"),
    "instance norm": (lambda: Net(lambda s, x: s.n(x), n=nn.InstanceNorm2d(3)), "InstanceNorm2d"),
    "divide by tensor": (lambda: Net(lambda s, x: x / x), "divides"),
    "gelu tanh": (lambda: Net(lambda s, x: F.gelu(x, approximate="tanh")), "erf"),
    "reflect": (lambda: Net(lambda s, x: s.c(x), c=nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")), "reflect"),
    "pad value": (lambda: Net(lambda s, x: F.pad(x, (1, 1), value=1.0)), "zeros"),
    "bilinear": (lambda: Net(lambda s, x: F.interpolate(x, scale_factor=2, mode="bilinear")), "nearest"),
    "indices": (lambda: Net(lambda s, x: s.p(x)[0], p=nn.MaxPool2d(2, return_indices=True)), "indices"),
    "mean of all": (lambda: Net(lambda s, x: x.mean()), "batch"),
    "argmax of all": (lambda: Net(lambda s, x: x.argmax()), "batch"),
    "divisor": (lambda: Net(lambda s, x: F.avg_pool2d(x, 2, divisor_override=3)), "divisor"),
    "softmax of batch": (lambda: Net(lambda s, x: F.softmax(s.c(x), 0), c=conv()), "softmax"),
    "gru": (lambda: Net(lambda s, x: s.g(x), g=nn.GRU(8, 8)), "GRU"),
    "no statistics": (
        lambda: Net(lambda s, x: s.n(s.c(x)), c=conv(), n=nn.BatchNorm2d(4, track_running_stats=False)),
        "track_running_stats",
    ),
    "alpha": (lambda: Net(lambda s, x: torch.add(x, x, alpha=2)), "alpha"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_operation(name: str) -> None:
    make, word = REFUSED[name]
    with pytest.raises(EdgematError) as caught:
        edgemat.quantize(make())
    assert word in str(caught.value)
    if isinstance(caught.value, UnsupportedOpError):
        assert "test_conversion.py:" in str(caught.value)


def test_not_a_module_or_recipe() -> None:
    with pytest.raises(LoweringError, match="Module"):
        edgemat.quantize(lambda x: x)
    with pytest.raises(LoweringError, match="Recipe"):
        edgemat.quantize(models.Mlp(), {"weights": "fixed<6>"})


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(FormatError, match=r"'conv9' matches no layer of the network; did you mean 'conv"):
        edgemat.quantize(models.LeNet(), edgemat.Recipe(rules={"conv9": {"weights": "fixed<4>"}}))
    with pytest.raises(FormatError, match="GRU"):
        edgemat.quantize(models.LeNet(), edgemat.Recipe(rules={nn.GRU: {"weights": "fixed<4>"}}))


def test_names_that_collide_are_moved() -> None:
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.add, self.relu, self.x_quantizer = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return F.relu(self.add(x) + self.relu(x)) + self.x_quantizer(x)

    model = Clash()
    module = edgemat.quantize(model)
    module.load_state_dict(model.state_dict())
    edgemat.calibrate(module, [torch.randn(4, 3)])
    module.eval()(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"khot": 2, "accumulator": 20}, "'0'.*khot=2"),
        ({"learn_widths": "activations", "activation_groups": "channel", "accumulator": 20}, "'0'.*accumulator=20"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_with_the_layer(recipe: dict, words: str) -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(edgemat.FormatError, match=words):
        edgemat.quantize(net, edgemat.Recipe(**recipe))
