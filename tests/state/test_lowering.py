"""States in the lowered file: kept by the passes, run by a stock onnxruntime, and refused where they do not pair up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import nn

from edgemat.errors import LoweringError
from edgemat.formats import Fixed
from edgemat.lower import read, writer
from edgemat.lower.passes import simplify
from edgemat.lower.passes.drop_dead import DropDead
from edgemat.lower.reader import read_bytes
from edgemat.op import Call, Tensor, code_dtype
from edgemat.ops import BY_NAME
from edgemat.ops.cases import tensor
from edgemat.sim.session import copy
from tests.core.test_ops_contract import Runner
from tests.state.cells import Twins, exported

Files = dict[str, tuple[nn.Module, Path]]
CARRIERS = {"int8": "fixed<8,8>", "uint8": "ufixed<8,8>", "int32": "fixed<32,32>", "int64": "fixed<64,64>"}


def test_a_stock_onnxruntime_runs_a_sequence(files: Files) -> None:
    module, path = files["Gated"]
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [v.name for v in session.get_inputs()] == ["x", "state"]
    assert [v.name for v in session.get_outputs()] == ["output_0", "output_1", "state.next"]
    held = np.zeros((3, 6), np.int32)
    module.state.reset()  # type: ignore[union-attr, operator]
    for x in torch.randn(50, 3, 4):
        with torch.no_grad():
            wanted = module(x)
        *found, held = session.run(None, {"x": x.numpy(), "state": held})
        for ours, theirs in zip(found, wanted, strict=True):
            assert np.array_equal(ours, theirs.numpy())
        assert np.array_equal(held * 2.0**-10, wanted[0].numpy())
    module.state.reset()  # type: ignore[union-attr, operator]


def test_codes_from_outside_saturate_at_the_format(files: Files) -> None:
    session = ort.InferenceSession(str(files["Leaky"][1]), providers=["CPUExecutionProvider"])
    x = np.zeros((4, 5), np.float32)
    outside = np.array([[-128], [-33], [32], [127]], np.int8) * np.ones((1, 5), np.int8)
    found = session.run(None, {"x": x, "state": outside})
    wanted = session.run(None, {"x": x, "state": np.clip(outside, -32, 31)})
    assert all(np.array_equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    "fmt",
    [
        "fixed<6,3>", "ufixed<6,3>", "fixed<8,3>", "ufixed<8,3>", "fixed<8,3,RND,SAT_SYM>", "fixed<5,3,TRN,WRAP>",
        "fixed<20,4>", "fixed<32,4>", "ufixed<32,4>", "fixed<40,4,RND,SAT_ZERO>", "fixed<6,[1,2,3]>",
        "fixed<[6,3,0],[1,2,3],RND,SAT>", "ufixed<[20,3,8],[1,2,3],RND,SAT_SYM>",
    ],
)  # fmt: skip
def test_the_body_of_a_state_is_its_reference(fmt: str) -> None:
    x = tensor(CARRIERS[code_dtype(Fixed.parse(fmt)).name], (None, 3, 4), "h")
    call = Call(BY_NAME["State"], "state", [x], {"y_format": str(Fixed.parse(fmt))})
    low, high = call.y[0].format.channel_rails()
    rng = np.random.default_rng(0)
    limits = np.iinfo(x.dtype)
    rails = [end + step for end in (*low.tolist(), *high.tolist()) for step in (-1, 0, 1)]
    codes = np.clip([*rails, 0, limits.min, limits.max], limits.min, limits.max)
    feed = rng.choice(codes, (40, 3, 4)).astype(np.int64)
    found = Runner(call)([feed])
    wanted = call.op.reference(call, feed)
    assert found.dtype == call.y[0].dtype and np.array_equal(found, wanted)
    assert wanted.min() == low.min() and wanted.max() == high.max()
    for channel in range(3):
        ends = [int(rail[channel] if rail.size > 1 else rail[0]) for rail in (low, high)]
        assert ends[0] <= wanted[:, channel].min() and wanted[:, channel].max() <= ends[1]


@pytest.mark.parametrize("dtype", ["fixed<8,8>", "ufixed<8,8>"])
def test_a_state_in_another_code_type_or_without_zero_is_refused(dtype: str) -> None:
    wrong = "ufixed<6,3>" if dtype.startswith("fixed") else "fixed<6,3>"
    with pytest.raises(LoweringError, match=r"expected u?int8 with the batch"):
        _ = Call(BY_NAME["State"], "s", [tensor(dtype, (None, 3), "h")], {"y_format": wrong}).y
    with pytest.raises(LoweringError, match="bipolar"):
        _ = Call(BY_NAME["State"], "s", [tensor("fixed<8,8>", (None, 3), "h")], {"y_format": "bipolar"}).y


def test_equal_states_stay_two_and_passes_keep_every_state(tmp_path: Path) -> None:
    _, path = exported(Twins, tmp_path)
    graph = read(path)
    assert [state.name for state in graph.states] == ["a", "b"]
    assert graph.states[0].written == graph.states[1].written  # one tensor, two states
    before = [(node.op_type, node.name) for node in graph.model.graph]
    model = copy(graph.model)
    writer.finish(model)
    simplify(model)
    DropDead()(model)
    assert [(node.op_type, node.name) for node in model.graph] == before
    assert [value.name for value in model.graph.inputs] == ["x", "a", "b"]


def node_of(model: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op_type)


def unwritten(model: ir.Model) -> None:
    node = node_of(model, "NextState")
    model.graph.outputs.remove(node.outputs[0])
    model.graph.remove(node, safe=True)


def unread(model: ir.Model) -> None:
    node_of(model, "NextState").attributes["state"] = ir.AttrString("state", "other")


def repeated(model: ir.Model) -> None:
    old = node_of(model, "NextState")
    attrs = [ir.AttrString("state", "state")]
    made = ir.Node("edgemat", "NextState", [old.inputs[0]], attrs, outputs=[ir.Value(name="twice")], name="twice")
    model.graph.append(made)
    model.graph.outputs.append(made.outputs[0])


def other_format(model: ir.Model) -> None:
    node_of(model, "State").attributes["y_format"] = ir.AttrString("y_format", "fixed<6,2,RND,SAT>")


def too_narrow(model: ir.Model) -> None:
    node_of(model, "State").attributes["y_format"] = ir.AttrString("y_format", "fixed<6,3,RND,SAT_SYM>")


def other_shape(model: ir.Model) -> None:
    next(v for v in model.graph.inputs if v.name == "state").shape = ir.Shape(["batch", 1])


def read_twice(model: ir.Model) -> None:
    old = node_of(model, "State")
    attrs = [ir.AttrString("y_format", "fixed<6,3,RND,SAT>")]
    made = ir.Node("edgemat", "State", [old.inputs[0]], attrs, outputs=[ir.Value(name="more")], name="more")
    model.graph.insert_after(old, made)
    node_of(model, "Mul").replace_input_with(0, made.outputs[0])


def read_raw(model: ir.Model) -> None:
    """The body that keeps codes inside the format is gone around."""
    state = node_of(model, "State")
    node_of(model, "Mul").replace_input_with(0, state.inputs[0])


def kept_inside(model: ir.Model) -> None:
    """What is written does not leave the graph."""
    model.graph.outputs.remove(node_of(model, "NextState").outputs[0])


def codes_of_nothing(model: ir.Model) -> None:
    value = ir.Value(name="loose", shape=ir.Shape(["batch", 5]))
    value.dtype = ir.DataType.INT8
    model.graph.inputs.append(value)


TAMPERED: dict[Callable[[ir.Model], None], str] = {
    unwritten: "read but never written",
    unread: "written but never read",
    repeated: "written a second time",
    other_format: r"of fixed<6,2,RND,SAT> is written in fixed<6,3",
    too_narrow: "written with codes -32 to 31",
    other_shape: "shape",
    read_twice: "read by State, State",
    read_raw: "read by (State, Mul|Mul, State)|holds codes",
    kept_inside: "0 of the graph's outputs",
    codes_of_nothing: "holds codes and is read by nothing",
}


@pytest.mark.parametrize("tamper", TAMPERED, ids=lambda tamper: tamper.__name__)
def test_readers_refuse_states_that_do_not_belong_together(
    files: Files, monkeypatch: pytest.MonkeyPatch, tamper: Callable[[ir.Model], None]
) -> None:
    graph = read(files["Leaky"][1])
    model = copy(graph.model)
    tamper(model)
    monkeypatch.setattr(writer, "pair_states", lambda graph, calls: [])  # a stranger's writer checks nothing
    for node in model.graph:
        node.overload = ""
    writer.finish(model)
    data = ir.serde.serialize_model(model).SerializeToString()
    with pytest.raises(LoweringError, match=TAMPERED[tamper]) as refusal:
        read_bytes(data)
    assert "\n" not in str(refusal.value)


def test_the_same_model_untouched_is_read(files: Files) -> None:
    model = copy(read(files["Leaky"][1]).model)
    writer.finish(model)
    assert len(read_bytes(ir.serde.serialize_model(model).SerializeToString()).states) == 1


def test_what_a_reader_sees(files: Files) -> None:
    graph = read(files["Leaky"][1])
    (state,) = graph.states
    held: Tensor = graph.tensors[state.read]
    assert (state.name, state.output, state.shape, state.size) == ("state", "state.next", (5,), 5)
    assert (held.lo, held.hi) == state.format.rails == (-32, 31)
    assert state.read not in graph.inputs and state.written not in graph.outputs
    assert not {"State", "NextState"} & {call.op.name for call in graph.nodes}
    assert graph.input_names == ["x"] and graph.output_names == ["output"]
