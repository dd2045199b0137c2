"""verify on sequences: every backend exact on every cell, and each way to get a state wrong is seen and named."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn

import edgemat
from edgemat.errors import EdgematError, FormatError
from edgemat.lower import read
from edgemat.lower.graph import Graph
from edgemat.sim import reference
from edgemat.sim.simulator import Simulator
from edgemat.targets.mcu import library as mcu_library
from edgemat.verification import backends as rooms
from edgemat.verification.corners import corner_codes
from edgemat.verification.report import Report
from edgemat.verification.sequences import compared, make_batches
from tests.state.cells import Leaky, made, needs

hls_project = importlib.import_module("edgemat.targets.hls.project")  # the package has a function of that name
Files = dict[str, tuple[nn.Module, Path]]
BACKENDS = ("onnx", "mcu", "mcu:cortex-m4", "mcu:rv32imc", "hls:parallel", "hls:stream")


def row(report: Report, backend: str) -> tuple[str, int]:
    return report.backends[backend].status, report.backends[backend].compared


@pytest.mark.parametrize("cell", ["Leaky", "Gated", "Registers"])
def test_torch_and_onnxruntime_keep_the_codes_of_hundreds_of_steps(files: Files, cell: str) -> None:
    module, path = files[cell]
    report = edgemat.verify(path, module=module, backends=["reference", "torch", "onnx"], steps=256, samples=2)
    assert report.ok and (report.steps, report.corner_steps) == (256, 32) and report.corners >= 2
    graph = read(path)
    sizes = [*(graph.tensors[name].size for name in graph.outputs), *(state.size for state in graph.states)]
    assert report.backends["torch"].compared == (256 * 2 + 32 * report.corners) * sum(sizes)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("cell", ["Leaky", "Gated", "Registers"])
def test_generated_code_keeps_the_codes(files: Files, cell: str, backend: str) -> None:
    needs(backend)
    path = files[cell][1]
    steps = 256 if backend == "mcu" or (cell, backend) == ("Leaky", "hls:parallel") else 32
    report = edgemat.verify(path, backends=[backend], steps=steps, samples=2)
    assert report.ok, report.first_mismatch
    assert report.backends[backend].compared > 0


def test_given_sequences_run_as_values_and_as_codes(files: Files) -> None:
    module, path = files["Leaky"]
    values = np.random.default_rng(0).normal(0, 2, (20, 3, 5)).astype(np.float32)
    report = edgemat.verify(path, values, module=module, backends=["torch", "onnx"])
    assert report.ok and report.steps == 20 and report.samples == 3 + report.corners
    codes = np.random.default_rng(0).integers(-128, 128, (20, 3, 5))
    assert edgemat.verify(path, codes, codes=True, backends=["onnx"]).ok


def test_a_report_keeps_what_each_backend_returned(files: Files) -> None:
    module, path = files["Gated"]
    x = np.random.default_rng(2).normal(0, 2, (6, 2, 4)).astype(np.float32)
    report = edgemat.verify(path, x, module=module, backends=["reference", "onnx"], keep=True)
    assert report.ok and report.corners and list(report.outputs) == ["torch", "reference", "onnx"]
    simulator = Simulator(path)
    expected = [simulator.codes(row) for row in x]
    for outputs in report.outputs.values():
        assert list(outputs) == read(path).output_names and len(outputs) == 2
        for name, codes in outputs.items():
            assert np.array_equal(codes, np.stack([step[name] for step in expected]))  # type: ignore[call-overload]
    assert edgemat.verify(path, x, backends=["reference"]).outputs == {}


def test_what_does_not_fit_is_refused(files: Files, tmp_path: Path) -> None:
    path = files["Leaky"][1]
    with pytest.raises(FormatError, match=r"expected sequences \(T, N, \.\.\.\)"):
        edgemat.verify(path, np.zeros(5, np.float32), backends=["onnx"])
    with pytest.raises(EdgematError, match="inputs and steps exclude each other"):
        edgemat.verify(path, np.zeros((2, 2, 5), np.float32), steps=3)
    with pytest.raises(EdgematError, match="steps is 0"):
        edgemat.verify(path, steps=0)
    with pytest.raises(EdgematError, match="corner_steps is -1, expected at least 1, or 0 for no corner sequences"):
        edgemat.verify(path, corner_steps=-1)


def test_corner_sequences_reach_the_rails_of_the_state(files: Files) -> None:
    graph = read(files["Leaky"][1])
    drawn, corners = make_batches(graph, None, None, None, None, False, 0)
    assert (drawn.steps, drawn.count, corners.steps) == (256, 4, 32)
    (state,) = graph.states
    held = reference.run_sequence(graph, corners.codes, compared(graph))[state.output]
    assert (held.min(), held.max()) == state.format.rails


@pytest.mark.parametrize("length", [1, 3, 32, 2000])
def test_every_corner_vector_is_held_and_comes_in_a_random_order(files: Files, length: int) -> None:
    graph = read(files["Leaky"][1])
    _, corners = make_batches(graph, None, 5, 1, length, False, 0)
    assert corners.steps == length
    (vectors,) = corner_codes(graph, 0)[0].values()
    (codes,) = corners.codes.values()
    for vector in vectors:
        assert (codes == vector).all(axis=2).sum() >= min(8, length) + 1


def test_the_length_of_corner_sequences_is_their_own(files: Files) -> None:
    module, path = files["Leaky"]
    values = np.random.default_rng(0).normal(0, 2, (300, 1, 5)).astype(np.float32)
    names, sizes = ["torch", "onnx"], 3 + 5
    for asked, ran in ((None, 32), (40, 40), (0, 0)):
        report = edgemat.verify(path, values, module=module, backends=names, corner_steps=asked)
        assert report.ok and (report.steps, report.corner_steps) == (300, ran)
        assert (report.corners == 0) == (ran == 0) and report.samples == 1 + report.corners
        assert report.backends["torch"].compared == (300 + ran * report.corners) * sizes
        title = str(report.render().renderables[0].title)  # type: ignore[union-attr, attr-defined]
        beside = f"{report.corners} corner sequences of {ran} steps" if ran else "no corner sequences"
        assert title == f"1 sequence of 300 steps, {beside}"
        assert report.to_dict()["corner_steps"] == ran
    assert edgemat.verify(path, values[:4], backends=["onnx"]).corner_steps == 4


@pytest.mark.parametrize("backend", ["onnx", "mcu", "mcu:cortex-m4"])
def test_a_difference_in_a_corner_sequence_is_found_and_counted_on(
    files: Files, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    needs(backend)
    room = rooms.make(backend, None)
    run = type(room).run_sequences

    def changed(self: rooms.Backend, graph: Graph, batches: list[rooms.Batch], **options: Any) -> list[Any]:
        found = run(self, graph, batches, **options)
        found[1][graph.outputs[0]][7, 1, 2] ^= 1
        return found

    monkeypatch.setattr(type(room), "run_sequences", changed)
    report = edgemat.verify(files["Leaky"][1], backends=[backend], steps=9, samples=3)
    first = report.first_mismatch
    assert not report.ok and first is not None and report.backends[backend].mismatches == 1
    assert (first.step, first.index) == (7, [3 + 1, 2])


# -- controls: a state handled wrongly is found -----------------------------------------------------------------------
def mutated(monkeypatch: pytest.MonkeyPatch, module: object, file: str, change: Callable[[str], str]) -> None:
    """Changes the text of one generated file."""
    render = module.render  # type: ignore[attr-defined]

    def changed(package: str, name: str, **context: object) -> str:
        text = render(package, name, **context)
        if name != file or not context.get("model", context.get("p")).states:  # type: ignore[union-attr, attr-defined]
            return text
        assert change(text) != text
        return change(text)

    monkeypatch.setattr(module, "render", changed)


def late(text: str) -> str:
    """C: the state takes over at the beginning of a step what the step before computed, so it is a step late."""
    copies = [line for line in text.splitlines() if "memcpy(model->state" in line]
    text = "\n".join(line for line in text.splitlines() if line not in copies)
    before = "    static int8_t kept[2][64];\n    static int which;\n"
    before += "    memcpy(model->state_state, kept[which], sizeof model->state_state);\n"
    after = "    memcpy(kept[which], arena_next, sizeof model->state_state);\n    which = 1 - which;\n"
    source = copies[0].split(", ")[1]
    text = text.replace("    /* scale", before + "    /* scale", 1)
    end = text.index("    return EM_OK;", text.index("_run("))
    return text[:end] + after.replace("arena_next", source) + text[end:]


MUTANTS_C = {
    "a wrong initial code": lambda t: t.replace("memset(model->state_state, 0,", "memset(model->state_state, 1,"),
    "no reset": lambda t: t.replace("    memset(model->state_state, 0, sizeof model->state_state);\n", ""),
    "the last code stays": lambda t: re.sub(r"(memcpy\(model->state_state, .*), 5\);", r"\1, 4);", t),
    "one step late": late,
    "a state nobody writes": lambda t: "\n".join(x for x in t.splitlines() if "memcpy(model->state" not in x),
}


@pytest.mark.parametrize("mutant", MUTANTS_C)
def test_c_that_handles_its_state_wrongly_is_found(files: Files, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    needs("mcu")
    mutated(monkeypatch, mcu_library, "model.c", MUTANTS_C[mutant])
    report = edgemat.verify(files["Leaky"][1], backends=["mcu"], steps=12, samples=3)
    first = report.first_mismatch
    assert not report.ok and first is not None and first.step is not None
    if mutant == "a wrong initial code":
        assert (first.step, first.node) == (0, "scale")


MUTANTS_HLS = {
    "no reset": lambda t: t.replace("(reset, ", "(false, "),
    "a state nobody writes": lambda t: "\n".join(x for x in t.splitlines() if "keep_state" not in x) + "\n",
}


@pytest.mark.parametrize("mutant", MUTANTS_HLS)
def test_hls_that_handles_its_state_wrongly_is_found(
    files: Files, monkeypatch: pytest.MonkeyPatch, mutant: str
) -> None:
    needs("hls:parallel")
    mutated(monkeypatch, hls_project, "top.cpp", MUTANTS_HLS[mutant])
    report = edgemat.verify(files["Leaky"][1], backends=["hls:parallel"], steps=6, samples=2)
    first = report.first_mismatch
    assert not report.ok and first is not None and first.step is not None
    assert first.node in ("scale", "state state")


@pytest.mark.parametrize("wrong", ["initial", "late", "bit"])
def test_a_simulator_that_handles_its_state_wrongly_is_found(
    files: Files, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    held, before = Simulator._held, {}

    def changed(self: Simulator, samples: int) -> dict[str, np.ndarray]:
        found = {name: array.copy() for name, array in held(self, samples).items()}
        if wrong == "initial" and not self._states:
            return {name: array + 1 for name, array in found.items()}
        if wrong == "late":
            last = before.get(id(self), {name: np.zeros_like(array) for name, array in found.items()})
            before[id(self)] = found
            return last
        if wrong == "bit":
            for array in found.values():
                array.flat[-1] ^= 1
        return found

    monkeypatch.setattr(Simulator, "_held", changed)
    report = edgemat.verify(files["Leaky"][1], backends=["onnx"], steps=12, samples=2)
    assert not report.ok and report.first_mismatch is not None and report.first_mismatch.step is not None


class Forgetful(Leaky):
    """Keeps zeros whatever it writes."""

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        assert self.state.value is not None
        self.state.value = self.state.value * 0
        return result


def test_a_torch_module_that_forgets_is_found(files: Files) -> None:
    report = edgemat.verify(files["Leaky"][1], module=made(Forgetful), backends=["torch"], steps=4)
    assert not report.ok and report.first_mismatch is not None
    assert (report.first_mismatch.step, report.first_mismatch.node) == (0, "state state")
