"""Nodes of particular tools and operator sets, imported and run by the Simulator, against onnxruntime or a formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import edgemat
from edgemat.foreign.importing import ImportRefused

from .real_files import by_onnxruntime

RNG = np.random.default_rng(0)


def model_of(
    nodes: list[onnx.NodeProto], shape: tuple[int, ...], constants: dict[str, Any], opset: int = 13, samples: int = 256
) -> onnx.ModelProto:
    """A model from x [samples, ...] to y."""
    ends = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [samples, *shape]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
    ]
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "file", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def imported(model: onnx.ModelProto, x: np.ndarray, folder: Path, stated: str = "fixed<8,8>") -> np.ndarray:
    onnx.save(model, folder / "file.onnx")
    edgemat.import_onnx(folder / "file.onnx", folder / "net.onnx", inputs={"x": stated}, strict=True)
    return np.asarray(edgemat.Simulator(folder / "net.onnx")(x))


def bytes_of(*shape: int) -> np.ndarray:
    """Signed bytes as float32 [256, ...], each of them in each place."""
    codes = np.arange(-128, 128, dtype=np.float32)
    return np.stack([np.roll(codes, place) for place in range(int(np.prod(shape)))], axis=1).reshape(256, *shape)


# -- Deeploy ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("signed", [0, 1])
@pytest.mark.parametrize("domain", ["", "PACTOps"])
def test_requant_shift_is_its_formula(domain: str, signed: int, tmp_path: Path) -> None:
    """Multipliers of either sign and 0; sums on halves; results beyond both rails."""
    mul = np.array([1, 3, -8, 0, 1000], np.float32).reshape(5, 1)
    add = np.array([0, 5, -4, 37, -9999], np.float32).reshape(5, 1)
    attributes = {"div": 16.0, "n_levels_out": [64.0], "signed": [float(signed)]}
    node = helper.make_node("RequantShift", ["x", "m", "a"], ["y"], "rq", domain=domain)
    for key, value in attributes.items():
        tensor = numpy_helper.from_array(np.asarray(value, np.float32))
        node.attribute.append(helper.make_attribute(key, tensor))
    x = bytes_of(5, 2)
    found = imported(model_of([node], (5, 2), {"m": mul, "a": add}), x, tmp_path)
    sums = x.astype(np.int64) * mul.astype(np.int64) + add.astype(np.int64)
    low = -32 if signed else 0
    assert np.array_equal(found, np.clip((sums + 8) >> 4, low, low + 63))
    assert not np.array_equal(found, np.clip(sums >> 4, low, low + 63))  # the control: without rounding
    assert {low, low + 63} <= set(found.reshape(-1).tolist())


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"div": 10.0}, "division by 10"), ({"signed": 2.0}, "signed 2"), ({"m": 0.5}, "input 1 has fractions")],
)
def test_requant_shift_refuses(changed: dict[str, float], message: str, tmp_path: Path) -> None:
    values = {"div": 16.0, "n_levels": 256.0, "signed": 1.0, "m": 1.0, **changed}
    attributes = {key: value for key, value in values.items() if key != "m"}
    node = helper.make_node("RequantShift", ["x", "m", "a"], ["y"], "rq", **attributes)
    constants = {"m": np.float32(values["m"]), "a": np.float32(0)}
    with pytest.raises(ImportRefused, match=message):
        imported(model_of([node], (3,), constants), bytes_of(3), tmp_path)


def test_inputs_whose_long_names_begin_alike(tmp_path: Path) -> None:
    """QuantLab's names differ behind 48 characters; the arguments of the C library must differ too."""
    names = [f"{'features_ql_replaced_integerize_pact_conv2d_pass_' * 2}{number}" for number in range(2)]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 3]) for name in (*names, "y")]
    graph = helper.make_graph([helper.make_node("Add", names, ["y"])], "file", ends[:2], ends[2:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)]), tmp_path / "file.onnx")
    stated = dict.fromkeys(names, "fixed<8,8>")
    edgemat.import_onnx(tmp_path / "file.onnx", tmp_path / "net.onnx", inputs=stated)
    assert edgemat.verify(tmp_path / "net.onnx", samples=4, backends=("reference", "mcu")).ok


# -- integers by arithmetic -------------------------------------------------------------------------------------------
def nemo(divided: str, top: float, gain: float = 1.0) -> onnx.ModelProto:
    """A dense layer and NEMO's quantiser: integers that floats carry, clipped by attributes (operator set 9)."""
    constants = {
        "w": RNG.integers(-60, 60, (4, 3)).astype(np.float32),
        "k": np.array([[2000.0, 17.0, -900.0]], np.float32) * np.float32(gain),
        "l": np.array([[-5e5, 301.0, 77777.0]], np.float32) * np.float32(gain),
        "m": np.int64(11),
        "d": np.int64(1 << 14),
        "f": np.float32(16384.0 / 11),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["s"]),
        helper.make_node("Mul", ["k", "s"], ["scaled"]),
        helper.make_node("Add", ["scaled", "l"], ["a"]),
    ]
    if divided == "integers":
        nodes += [
            helper.make_node("Cast", ["a"], ["i"], to=TensorProto.INT64),
            helper.make_node("Mul", ["i", "m"], ["im"]),
            helper.make_node("Div", ["im", "d"], ["id"]),
            helper.make_node("Cast", ["id"], ["q"], to=TensorProto.FLOAT),
        ]
    else:
        nodes += [helper.make_node("Div", ["a", "f"], ["v"]), helper.make_node("Floor", ["v"], ["q"])]
    nodes += [
        helper.make_node("Clip", ["q"], ["c"], min=0.0, max=top),
        helper.make_node("MatMul", ["c", "w2"], ["y"]),
    ]
    constants["w2"] = np.array([[1.0, -3.0], [2.0, 5.0], [7.0, 0.0]], np.float32)
    return model_of(nodes, (4,), constants, 9)


@pytest.mark.parametrize("divided", ["integers", "floor"])
def test_integers_by_arithmetic_are_a_quantiser(divided: str, tmp_path: Path) -> None:
    model, x = nemo(divided, 255.0), bytes_of(4)
    wanted = by_onnxruntime(model, x, optimised=False)
    assert np.array_equal(imported(model, x, tmp_path), wanted)
    assert len(np.unique(wanted)) > 100


def test_a_clip_off_the_integers_ends_them(tmp_path: Path) -> None:
    """254.5 is no integer: what follows reads a fraction, and there is no quantiser."""
    with pytest.raises(ImportRefused, match="no quantiser stands between"):
        imported(nemo("floor", 254.5, 1 / 256), bytes_of(4), tmp_path)


def test_scaled_integers_are_added_exactly(tmp_path: Path) -> None:
    """DORY's residual sum: (40 * a + 64 * b) / 64, floored."""
    nodes = [
        helper.make_node("Mul", ["x", "k"], ["a"]),
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[2], strides=[1], pads=[1, 0]),
        helper.make_node("Mul", ["p", "d"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["s"]),
        helper.make_node("Div", ["s", "d"], ["v"]),
        helper.make_node("Floor", ["v"], ["f"]),
        helper.make_node("Clip", ["f"], ["y"], min=-100.0, max=90.0),
    ]
    model, x = model_of(nodes, (2, 3), {"k": np.float32(40), "d": np.float32(64)}, 9), bytes_of(2, 3)
    wanted = by_onnxruntime(model, x, optimised=False)
    assert np.array_equal(imported(model, x, tmp_path), wanted)
    assert wanted.min() == -100 and wanted.max() == 90


# -- moving elements --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("opset", [9, 13])
def test_padding_in_old_and_new_operator_sets(opset: int, tmp_path: Path) -> None:
    pads, constants = [0, 0, 1, 2, 0, 0, 0, 3], {}
    node = helper.make_node("Pad", ["x"], ["y"], pads=pads, value=0.0)
    if opset > 10:
        node, constants = helper.make_node("Pad", ["x", "p"], ["y"]), {"p": np.array(pads, np.int64)}
    model, x = model_of([node], (2, 3, 2), constants, opset), bytes_of(2, 3, 2)
    wanted = by_onnxruntime(model, x)
    assert wanted.shape == (256, 2, 4, 7)
    assert np.array_equal(imported(model, x, tmp_path), wanted)


REPEATS = [
    ("asymmetric", "floor", 3),
    ("half_pixel", "round_prefer_floor", 2),
    ("half_pixel", "round_prefer_ceil", 3),
    ("pytorch_half_pixel", "round_prefer_floor", 2),
    ("tf_half_pixel_for_nn", "floor", 2),
]
OTHERS = [("asymmetric", "ceil", 2), ("align_corners", "floor", 2), ("asymmetric", "round_prefer_ceil", 2)]


def resized(coordinates: str, nearest: str, factor: int) -> onnx.ModelProto:
    node = helper.make_node(
        "Resize",
        ["x", "", "s"],
        ["y"],
        mode="nearest",
        coordinate_transformation_mode=coordinates,
        nearest_mode=nearest,
    )
    return model_of([node], (2, 3, 4), {"s": np.array([1, 1, factor, 2], np.float32)}, 13)


@pytest.mark.parametrize(("coordinates", "nearest", "factor"), REPEATS)
def test_resizing_that_repeats(coordinates: str, nearest: str, factor: int, tmp_path: Path) -> None:
    model, x = resized(coordinates, nearest, factor), bytes_of(2, 3, 4)
    assert np.array_equal(imported(model, x, tmp_path), by_onnxruntime(model, x))


@pytest.mark.parametrize(("coordinates", "nearest", "factor"), OTHERS)
def test_resizing_that_does_not_repeat_is_refused(coordinates: str, nearest: str, factor: int, tmp_path: Path) -> None:
    model, x = resized(coordinates, nearest, factor), bytes_of(2, 3, 4)
    assert not np.array_equal(by_onnxruntime(model, x), x.repeat(factor, 2).repeat(2, 3))
    with pytest.raises(ImportRefused, match="does not repeat elements"):
        imported(model, x, tmp_path)


@pytest.mark.parametrize(
    ("op", "axes", "keep"),
    [
        ("ReduceMean", [1], 0),
        ("ReduceMean", [-1], 1),
        ("ReduceMean", [2, 3], 0),
        ("ReduceMean", [1, 3], 1),
        ("ReduceMean", [1, 2, 3], 1),
        ("ReduceMean", [1, 2, 3], 0),
        ("ReduceSum", [2], 0),
        ("ReduceSum", [2, 3], 1),
    ],
)
def test_reductions_over_any_axes(op: str, axes: list[int], keep: int, tmp_path: Path) -> None:
    """Four by two by eight: every mean is exact in float32."""
    model = model_of([helper.make_node(op, ["x"], ["y"], axes=axes, keepdims=keep)], (4, 2, 8), {}, 11)
    x = bytes_of(4, 2, 8)
    if len(axes) == 3 and not keep:
        with pytest.raises(ImportRefused, match="one number a sample without an axis"):
            imported(model, x, tmp_path)
        return
    assert np.array_equal(imported(model, x, tmp_path), by_onnxruntime(model, x))


def test_a_closing_sigmoid_is_left_to_the_reader(tmp_path: Path) -> None:
    constants = {"w": RNG.integers(-60, 60, (4, 3)).astype(np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["s"]), helper.make_node("Sigmoid", ["s"], ["y"])]
    x = bytes_of(4)
    found = imported(model_of(nodes, (4,), constants), x, tmp_path)
    assert np.array_equal(found, x @ constants["w"])
