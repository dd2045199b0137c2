"""What users get wrong around `quantize`, and the sentence that tells them so; copies and files of a network."""

from __future__ import annotations

import copy
import io
from collections import OrderedDict

import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import FormatError, LoweringError, UnsupportedOpError
from edgemat.nn import FixedQuantizer, QuantLinear


class Small(nn.Module):
    """A convolution, a mean and a linear layer on ``[N, 3, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.relu(self.conv(x)).mean((2, 3)))


def network(recipe: edgemat.Recipe | None = None) -> tuple[nn.Module, torch.Tensor]:
    """A calibrated `Small` and its batch."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    q = edgemat.quantize(Small(), recipe)
    edgemat.calibrate(q, [x])
    return q, x


def through_a_file(q: nn.Module) -> nn.Module:
    """What `torch.save` and `torch.load` of the whole module give."""
    file = io.BytesIO()
    torch.save(q, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [lambda q: q, copy.deepcopy, through_a_file])
def test_a_quantised_network_is_not_quantised_again(again) -> None:
    q, _ = network()
    with pytest.raises(LoweringError, match=r"quantize made already.*float module"):
        edgemat.quantize(again(q), edgemat.Recipe(weights="fixed<4>"))


def test_a_module_of_edgemat_layers_may_be_quantised() -> None:
    model = nn.Sequential(QuantLinear(3, 4, input="fixed<8,3>", output="fixed<8>"), nn.ReLU(), nn.Linear(4, 2))
    q = edgemat.quantize(model)
    edgemat.calibrate(q, [torch.randn(4, 3)])


@pytest.mark.parametrize(
    "other", [copy.deepcopy, through_a_file, lambda q: copy.deepcopy(through_a_file(copy.deepcopy(q)))]
)
def test_a_copy_writes_the_same_bytes(other, tmp_path) -> None:
    q, x = network()
    edgemat.to_onnx(q, x, tmp_path / "a.onnx")
    edgemat.to_onnx(other(q), x, tmp_path / "b.onnx")
    written = (tmp_path / "a.onnx").read_bytes()
    assert b"QuantizedSmall" in written and written == (tmp_path / "b.onnx").read_bytes()
    edgemat.to_onnx(q, x, tmp_path / "c.onnx", name="other")
    assert written != (tmp_path / "c.onnx").read_bytes()


class Product(nn.Module):
    """A matrix product with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.product(x))

    def product(self, x):
        return x @ self.weight


class MatmulProduct(Product):
    def product(self, x):
        return torch.matmul(x, other=self.weight)


class TransposedProduct(Product):
    def product(self, x):
        return torch.matmul(self.weight.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("kind", [Product, MatmulProduct, TransposedProduct])
def test_a_product_with_a_parameter_is_refused_with_its_place(kind) -> None:
    line = kind.product.__code__.co_firstlineno + 1
    with pytest.raises(UnsupportedOpError, match=rf"test_misuse\.py:{line}: function matmul multiplies by.*nn\.Linear"):
        edgemat.quantize(kind())


THREE = {"weights": "fixed<8,[2,1,2]>"}


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), "4"),
        (nn.Conv2d(3, 4, 1), "4"),
        (nn.ConvTranspose2d(3, 4, 1), "4"),
        (nn.ConvTranspose2d(3, 9, 1, groups=3), "one for the whole"),
        (nn.BatchNorm2d(4), "4"),
        (nn.PReLU(3), "one for the whole"),
    ],
)
def test_stated_points_of_another_number_of_channels_name_the_layer(layer, shape) -> None:
    recipe = edgemat.Recipe(rules={"part": THREE})
    with pytest.raises(FormatError, match=rf"layer 'part' has weights .* 3 binary points, expected {shape}"):
        edgemat.quantize(nn.Sequential(OrderedDict(part=layer)), recipe)


def test_stated_points_one_per_channel_are_taken() -> None:
    recipe = edgemat.Recipe(rules={"head": {"weights": "fixed<8,[2,1]>"}})
    q, _ = network(recipe)
    assert q.get_submodule("head").weight_quantizer.format.int_bits == (2, 1)
    with pytest.raises(FormatError, match=r"QuantLinear .*3 binary points, expected 2"):
        QuantLinear(4, 2, weights="fixed<8,[2,1,2]>")


def saved(q: nn.Module) -> dict[str, torch.Tensor]:
    """The state of `q` as a file holds it, read with tensors alone allowed."""
    file = io.BytesIO()
    torch.save(q.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_checkpoint_of_the_same_formats_loads_from_a_file() -> None:
    q, x = network()
    twin = edgemat.quantize(Small())
    assert not any(twin.load_state_dict(saved(q)))
    assert torch.equal(twin.eval()(x), q.eval()(x))
    earlier = {name: value for name, value in saved(q).items() if not name.endswith("_extra_state")}
    assert not any(edgemat.quantize(Small()).load_state_dict(earlier))


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"weights": "fixed<6>"}, r"'conv\.weight_quantizer' is fixed<6\S* in .* holds fixed<8"),
        ({"activations": "fixed<8,RND_CONV,SAT>"}, r"RND_CONV\S* in this network.* holds ufixed<8,RND,SAT"),
        ({"activations": "fixed<8,RND,SAT_SYM>"}, "SAT_SYM"),
        ({"rules": {"relu": {"activations": "fixed<8>"}}}, r"'relu\S*' is fixed<8\S* in .* holds ufixed<8"),
        ({"input": "fixed<8,7>"}, r"holds \S+ fractional bits instead of 1"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_format_is_refused(fields, found, strict) -> None:
    q, _ = network()
    with pytest.raises(RuntimeError, match=found):
        edgemat.quantize(Small(), edgemat.Recipe(**fields)).load_state_dict(saved(q), strict=strict)


def test_a_float_checkpoint_loads_into_a_quantised_network_and_leaves_its_formats() -> None:
    q, _ = network()
    before = q.get_submodule("conv").weight_quantizer.format
    found = q.load_state_dict(Small().state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    assert q.get_submodule("conv").weight_quantizer.format == before


class Convolution(nn.Module):
    """Layers that torch lets take a sample without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.conv(x))


class Mlp(nn.Module):
    """The same for vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize(
    ("make", "shape", "sentence"),
    [
        (Small, (4, 3, 8, 8), r"the example input has shape \(3, 8, 8\).*x\.unsqueeze\(0\)"),
        (Convolution, (4, 3, 8, 8), "layer 'conv' got a tensor of 3 axes, expected 4.*batch on axis 0"),
        (Mlp, (4, 8), r"the example input has shape \(8,\).*x\.unsqueeze\(0\)"),
    ],
)
def test_an_example_without_a_batch_gets_one_sentence(make, shape, sentence, tmp_path) -> None:
    q, x = edgemat.quantize(make()), torch.randn(shape)
    edgemat.calibrate(q, [x])
    with pytest.raises(LoweringError, match=sentence) as caught:
        edgemat.to_onnx(q, x[0], tmp_path / "a.onnx")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value) and "step 1" not in str(caught.value)
    assert not (tmp_path / "a.onnx").exists()
    edgemat.to_onnx(q, x[0].unsqueeze(0), tmp_path / "a.onnx")


class DependsOnValues(nn.Module):
    """Control flow that torch.export cannot follow."""

    def __init__(self) -> None:
        super().__init__()
        self.head = QuantLinear(8, 2, input="fixed<8,3>")

    def forward(self, x):
        y = self.head(x)
        return y if y.sum() > 0 else y[:, :1]


def test_what_the_exporter_cannot_follow_is_told_by_its_root_cause(tmp_path) -> None:
    q, x = DependsOnValues(), torch.randn(4, 8)
    edgemat.calibrate(q, [x])
    with pytest.raises(LoweringError, match=r"could not trace the model \(\w+: .*tensor values$") as caught:
        edgemat.to_onnx(q, x, tmp_path / "a.onnx")
    assert all(noise not in str(caught.value) for noise in ("\n", "\x1b", "step 1", "TorchExportError"))


@pytest.mark.parametrize("batch", [torch.randn(4, 1, 8, 8), (torch.randn(4, 1, 8, 8), torch.zeros(4))])
def test_calibrating_with_other_channels_names_shape_and_layer(batch) -> None:
    q, x = network()
    with pytest.raises(FormatError, match=r"shape \(4, 1, 8, 8\).*layer 'conv' \(QuantConv2d\) cannot take") as caught:
        edgemat.calibrate(q, [batch])
    assert "\n" not in str(caught.value)
    assert all(part._observer is None for part in q.modules() if isinstance(part, FixedQuantizer))
    edgemat.calibrate(q, [x])
