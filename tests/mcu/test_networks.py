"""Connected graphs: layout, arena and calls together, on the host and on both emulated machines."""

from __future__ import annotations

import dataclasses
import tempfile

import numpy as np
import pytest

from edgemat.errors import ToolchainError, UnsupportedOpError
from edgemat.targets.layout import to_native
from edgemat.targets.mcu import emulator
from edgemat.targets.mcu.generator import project
from edgemat.targets.mcu.host import SANITIZE, STRICT, HostProgram, run_host
from edgemat.targets.mcu.sample import run_reference
from edgemat.targets.mcu.variants import plan_calls
from tests.mcu import networks
from tests.mcu.case_graphs import CaseGraph, feeds

needs_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


@pytest.fixture(params=networks.ALL)
def graph(request) -> CaseGraph:
    return networks.ALL[request.param]()


def test_host_equals_the_reference_tensor_by_tensor(graph, cc) -> None:
    codes = feeds(graph, 40)
    expected = run_reference(graph, codes)
    flags = (*STRICT, *(SANITIZE if cc.name == "gcc" else ()))
    with HostProgram(graph, trace=True, flags=flags, optimize="1", compiler=cc) as program:
        found = program.run(codes)
    computed = {node.outputs[0] for node in graph.nodes if node.op.stem != "reshape"}
    assert computed <= set(found)
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def test_plain_run_gives_outputs_only(graph, cc) -> None:
    codes = feeds(graph, 5)
    found = run_host(graph, codes)
    assert list(found) == graph.outputs
    expected = run_reference(graph, codes)
    for name in graph.outputs:
        np.testing.assert_array_equal(found[name], expected[name])


@needs_emulator
@pytest.mark.parametrize("machine", emulator.MACHINES)
def test_emulated_machines_equal_the_reference(graph, machine) -> None:
    codes = feeds(graph, 9)
    expected = run_reference(graph, codes)
    run = emulator.emulate(graph, codes, machine, trace=True, count=True)
    assert run.instructions is not None and run.instructions > 1000
    assert 0 < run.stack_bytes < 2000
    assert set(graph.outputs) <= set(run.codes)
    for name, value in run.codes.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@needs_emulator
def test_instruction_counts_repeat_and_grow_with_work() -> None:
    small, large = networks.residual(), networks.branching()
    first = emulator.emulate(small, feeds(small, 5), count=True).instructions
    assert first == emulator.emulate(small, feeds(small, 9), count=True).instructions
    assert first != emulator.emulate(large, feeds(large, 5), count=True).instructions


@needs_emulator
def test_control_an_emulated_run_sees_a_changed_weight() -> None:
    graph = networks.residual()
    codes = feeds(graph, 9)
    expected = run_reference(graph, codes)
    node = next(node for node in graph.nodes if node.name == "a")
    weights = node.constants[1].copy()
    weights[0, 0, 1, 1] += 1
    node.constants.held[1] = weights
    found = emulator.run_emulated(graph, codes)
    assert not np.array_equal(found["head_y"], expected["head_y"])


def test_missing_packages_say_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(emulator.importlib.util, "find_spec", lambda name: None)
    graph = networks.residual()
    with pytest.raises(ToolchainError, match=r"ziglang and unicorn not installed; run: pip install"):
        emulator.run_emulated(graph, feeds(graph, 5))


def test_unknown_machine_is_named() -> None:
    graph = networks.residual()
    with pytest.raises(ToolchainError, match="machine 'avr' is unknown, expected one of cortex-m4, rv32imc"):
        emulator.run_emulated(graph, feeds(graph, 5), "avr")


def test_reshapes_are_folded_where_they_can_be() -> None:
    steps = [step.stem for step in to_native(networks.residual()).steps]
    assert "transpose" not in steps  # flatten in front of the Linear: its columns are permuted
    network = to_native(networks.reshaping())
    inserted = {step.node for step in network.steps if step.stem == "transpose" and step.name != step.node}
    assert "rows" not in inserted and "back" in inserted
    aliased = [step for step in network.steps if step.stem == "reshape"]
    for step in aliased:
        source, result = step.inputs[0], step.outputs[0]
        probe = np.arange(source.size)[None]
        logical = source.unpack(probe).reshape(1, *result.logical)
        np.testing.assert_array_equal(result.pack(logical), probe)


def test_pack_and_unpack_are_inverse(graph) -> None:
    for tensor in to_native(graph).tensors().values():
        probe = np.arange(2 * tensor.size).reshape(2, *tensor.logical)
        np.testing.assert_array_equal(tensor.unpack(tensor.pack(probe)), probe)


def test_an_operator_without_kernel_is_named() -> None:
    graph = networks.residual()
    network = to_native(graph)
    odd = dataclasses.replace(network.steps[0], stem="fourier")
    with pytest.raises(UnsupportedOpError, match="node 'stem': the target 'mcu' has no kernel for operator 'fourier'"):
        plan_calls(odd)


def test_variants_are_shared_and_int32_where_proven() -> None:
    made = project(networks.reshaping())
    functions = [variant.function for variant in made.variants]
    assert len(functions) == len(set(functions)) < len(made.calls)
    assert not any("acc64" in function for function in functions)


def test_sizes_beyond_32_bit_indices_are_refused() -> None:
    step = to_native(networks.residual()).steps[0]
    huge = dataclasses.replace(step, params={**step.params, "stride_h": 1 << 40})
    with pytest.raises(UnsupportedOpError, match=r"node 'stem': stride_h is 1099511627776, .* split the layer"):
        plan_calls(huge)


@pytest.mark.parametrize("run", [run_host, emulator.run_emulated])
def test_a_full_disk_is_one_sentence(run, monkeypatch) -> None:
    def full(*arguments, **options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(emulator, "missing", lambda: None)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    graph = networks.residual()
    with pytest.raises(ToolchainError, match=r"cannot be written \(No space left on device\); make room"):
        run(graph, feeds(graph, 5))
