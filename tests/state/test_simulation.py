"""The Simulator and the command line keep states between steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

import edgemat
from edgemat.cli import cli
from edgemat.errors import FormatError
from edgemat.lower import read
from edgemat.sim import reference

Files = dict[str, tuple[nn.Module, Path]]


def sequence(steps: int, samples: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 2, (steps, samples, *shape)).astype(np.float32)


@pytest.mark.parametrize("samples", [1, 3, 700])
def test_calls_and_sequences_are_the_reference(files: Files, samples: int) -> None:
    graph = read(files["Leaky"][1])
    x = np.random.default_rng(0).integers(-128, 128, (30, samples, 5))
    (state,) = graph.states
    wanted = reference.run_sequence(graph, {graph.inputs[0]: x}, [graph.outputs[0], state.output])
    simulate = edgemat.Simulator(graph)
    assert np.array_equal(simulate.run_sequence(x, codes=True), wanted[graph.outputs[0]])
    assert np.array_equal(simulate.state["state"], wanted[state.output][-1])
    simulate.reset()
    assert simulate.state == {}
    for step in range(30):
        tensors = simulate.trace(x[step], codes=True)  # looks, and takes no step
        assert np.array_equal(simulate(x[step], codes=True), wanted[graph.outputs[0]][step])
        assert np.array_equal(tensors[state.written], wanted[state.output][step])


def test_a_sequence_goes_on_where_the_last_ended_and_can_be_taken_up(files: Files) -> None:
    x = sequence(20, 4, (5,))
    whole, parts = edgemat.Simulator(files["Leaky"][1]), edgemat.Simulator(files["Leaky"][1])
    wanted = whole.run_sequence(x)
    first = parts.run_sequence(x[:7])
    resumed = edgemat.Simulator(files["Leaky"][1])
    resumed.state = parts.state
    assert np.array_equal(np.concatenate([first, parts.run_sequence(x[7:])]), wanted)
    assert np.array_equal(resumed.run_sequence(x[7:]), wanted[7:])
    parts.reset()
    assert not np.array_equal(parts.run_sequence(x[7:]), wanted[7:])  # the state matters


def test_several_outputs_come_by_name(files: Files) -> None:
    x = sequence(5, 2, (4,))
    found = edgemat.Simulator(files["Gated"][1]).run_sequence({"x": x})
    assert {name: array.shape for name, array in found.items()} == {"output_0": (5, 2, 6), "output_1": (5, 2, 6)}


def test_what_does_not_fit_is_refused(files: Files) -> None:
    simulate = edgemat.Simulator(files["Leaky"][1])
    simulate(np.zeros((3, 5), np.float32))
    with pytest.raises(FormatError, match=r"hold 3 samples and the step has 2.*call reset\(\)"):
        simulate(np.zeros((2, 5), np.float32))
    assert simulate.state["state"].shape == (3, 5)  # and stays as it was
    with pytest.raises(FormatError, match=r"expected \(T, N, \.\.\.\)"):
        simulate.run_sequence(np.zeros(5, np.float32))
    with pytest.raises(FormatError, match="states other were given, expected state"):
        simulate.state = {"other": np.zeros((3, 5), np.int64)}
    with pytest.raises(FormatError, match=r"state 'state' was given in shape \(3, 4\)"):
        simulate.state = {"state": np.zeros((3, 4), np.int64)}
    with pytest.raises(FormatError, match="expected -32 to 31"):
        simulate.state = {"state": np.full((3, 5), 32)}


def test_the_command_line_runs_and_verifies_sequences(files: Files, tmp_path: Path) -> None:
    path, x = files["Leaky"][1], sequence(9, 2, (5,))
    np.save(tmp_path / "x.npy", x)
    words = ["simulate", str(path), "--inputs", str(tmp_path / "x.npy"), "-o", str(tmp_path / "y.npy"), "--sequence"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert np.array_equal(np.load(tmp_path / "y.npy"), edgemat.Simulator(path).run_sequence(x))
    done = CliRunner().invoke(cli, ["verify", str(path), "--backends", "onnx", "--steps", "12", "--json"])
    found = json.loads(done.output)
    assert done.exit_code == 0 and found["steps"] == 12 and found["backends"]["onnx"]["status"] == "exact"
    both = ["verify", str(path), "--inputs", str(tmp_path / "x.npy"), "--steps", "3"]
    assert CliRunner().invoke(cli, both).exit_code == 2


def test_inspect_lists_the_states(files: Files) -> None:
    from edgemat.report import inspect

    found = inspect(files["Gated"][1]).to_dict()["states"]
    assert found == [{"name": "state", "shape": [6], "format": "fixed<12,2,TRN,SAT_SYM>", "bits": 72, "c_bytes": 12}]
    assert CliRunner().invoke(cli, ["inspect", str(files["Gated"][1])]).output.count("recurrent states") == 1
