"""verify finds equality where there is equality, and every planted difference."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import edgemat
from edgemat.errors import EdgematError, FormatError, ToolchainError
from edgemat.lower import read
from edgemat.sim import reference
from edgemat.verification import backends as rooms
from edgemat.verification.corners import corner_codes
from edgemat.verification.isolated import isolated
from tests.verification.mutation import KINDS, mutant

BACKENDS = ("onnx", "hls:parallel", "hls:stream", "mcu", "mcu:cortex-m4", "mcu:rv32imc")


def usable(name: str) -> None:
    reason = rooms.make(name, None).missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_is_exact(small, name):
    usable(name)
    module, path, x = small
    report = edgemat.verify(path, x.numpy(), backends=(name,), module=module)
    assert report.ok, report.to_dict()
    assert {row.status for row in report.backends.values()} == {"exact"}
    assert report.samples == 40 + report.corners and report.corners > 10
    assert report.backends["torch"].compared == report.samples * 5
    # The sums taken apart are compared on top: conv2's map and fc's output.
    alone, codes = isolated(read(path))
    extra = sum(t.size for call in alone.nodes for t in call.y) * len(next(iter(codes.values())))
    assert report.backends[name].compared == report.samples * 5 + extra
    assert report.overflow_proved


def test_a_file_that_computes_something_else_is_seen_beside_a_simulator_that_does_not(small, monkeypatch):
    """onnx is the file under onnxruntime and the Simulator: either alone is enough to differ."""
    _, path, x = small
    honest = rooms.shown_codes
    monkeypatch.setattr(
        rooms, "shown_codes", lambda g, found: {n: c ^ (c == c.max()) for n, c in honest(g, found).items()}
    )
    assert not edgemat.verify(path, x.numpy(), backends=("onnx",)).ok
    monkeypatch.undo()
    codes = rooms.Simulator.codes
    monkeypatch.setattr(rooms.Simulator, "codes", lambda self, x, codes=False, f=codes: f(self, x, codes) ^ 1)
    assert not edgemat.verify(path, x.numpy(), backends=("onnx",)).ok


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BACKENDS)
def test_every_mutation_is_caught(small, name, kind, monkeypatch):
    """One weight, one bias, one shift, one rounding or overflow mode changed in one backend is seen and located."""
    usable(name)
    _, path, x = small
    graph = read(path)
    changed = mutant(graph, kind)
    backend = rooms.make(name, None)
    run, trace = type(backend).run, type(backend).trace
    monkeypatch.setattr(type(backend), "run", lambda self, g, c, v: _renamed(run(self, changed, c, v), changed, g))
    monkeypatch.setattr(type(backend), "trace", lambda self, g, c: trace(self, changed, c))
    # Outputs near a rail make WRAP and SAT differ; random full-range inputs reach it.
    values = x.numpy() * 8 if kind == "overflow" else x.numpy()
    report = edgemat.verify(path, values, backends=(name,))
    assert not report.ok
    assert report.backends[name].status == "mismatch" and report.backends[name].mismatches > 0
    first = report.to_dict()["first_mismatch"]
    assert first["backend"] == name and first["node"] == "fc" and first["expected"] != first["found"]
    assert len(first["index"]) == 2


def _renamed(found, source, target):
    return {t: found[s] for s, t in zip(source.outputs, target.outputs, strict=True)}


def test_torch_mutation_is_caught(small):
    module, path, x = small
    other = edgemat.quantize(
        _float_of(module),
        edgemat.Recipe(input="fixed<8,2>", weights="fixed<6>", activations="fixed<6>", outputs="fixed<8>"),
    )
    edgemat.calibrate(other, [x])
    other.load_state_dict(module.state_dict())
    assert edgemat.verify(path, x.numpy(), backends=("torch",), module=other).ok
    with torch.no_grad():
        other.fc.weight[0, 0] += 0.1
    report = edgemat.verify(path, x.numpy(), backends=("torch",), module=other)
    assert not report.ok and report.first_mismatch.backend == "torch"


def _float_of(module):
    from tests.verification.conftest import Small

    return Small()


def test_report_as_json(small):
    module, path, _ = small
    made = edgemat.verify(path, samples=7, backends=("reference", "onnx"), module=module).to_dict()
    assert json.loads(json.dumps(made)) == made
    assert set(made) >= {"ok", "samples", "backends", "first_mismatch", "overflow"}
    assert made["first_mismatch"] is None and made["overflow"] == {"proved": True}
    assert set(made["backends"]) == {"torch", "reference", "onnx"}
    assert set(made["backends"]["onnx"]) == {"status", "compared", "mismatches", "reason"}


def test_a_report_keeps_what_each_backend_returned(small):
    _, path, x = small
    report = edgemat.verify(path, x.numpy(), backends=("reference", "onnx"), keep=True)
    (name,) = read(path).output_names
    assert report.corners and list(report.outputs) == ["reference", "onnx"]
    assert all((found[name] == edgemat.Simulator(path).codes(x.numpy())).all() for found in report.outputs.values())
    assert not edgemat.verify(path, x.numpy(), backends=("reference",)).outputs


def test_codes_and_values_mean_the_same(small):
    _, path, x = small
    graph = read(path)
    codes = edgemat.sim.simulator.formats.quantize(x.numpy(), graph.input_type(0).format)
    by_value = edgemat.verify(path, x.numpy(), backends=("onnx",))
    by_code = edgemat.verify(path, codes, backends=("onnx",), codes=True)
    assert by_value.ok and by_code.ok
    assert (edgemat.Simulator(path).codes(x.numpy()) == edgemat.Simulator(path).codes(codes, codes=True)).all()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"backends": ("nonsense",)}, EdgematError),
        ({"backends": ("torch",)}, EdgematError),
        ({"backends": ()}, EdgematError),
        ({"samples": 0}, EdgematError),
        ({"inputs": np.zeros((1, 1, 6, 6)), "samples": 3}, EdgematError),
        ({"inputs": np.full((1, 1, 6, 6), np.nan)}, FormatError),
        ({"inputs": np.zeros((1, 1, 6, 5))}, FormatError),
        ({"inputs": np.zeros((0, 1, 6, 6))}, FormatError),
        ({"inputs": np.zeros((1, 1, 6, 6)), "codes": True}, FormatError),
        ({"inputs": np.full((1, 1, 6, 6), 128), "codes": True}, FormatError),
        ({"inputs": {"y": np.zeros((1, 1, 6, 6))}}, FormatError),
    ],
)
def test_wrong_use_is_refused(small, arguments, error):
    _, path, _ = small
    with pytest.raises(error):
        edgemat.verify(path, **arguments)


def test_missing_backend(small, monkeypatch):
    """By default it is a row that says why; asked for by name it is an error."""
    _, path, _ = small
    monkeypatch.setattr(rooms.Mcu, "missing", lambda self: "no compiler; install one")
    monkeypatch.setattr(rooms.Hls, "missing", lambda self: "no headers; run: edgemat headers")
    report = edgemat.verify(path, samples=2)
    assert report.ok and report.backends["mcu"].status == "unavailable"
    assert "install" in report.backends["mcu"].reason
    with pytest.raises(ToolchainError, match="no compiler"):
        edgemat.verify(path, samples=2, backends=("mcu",))


def test_corners_reach_the_proved_extremes(small):
    """The sum behind the input meets both ends of its proved interval, for the channels that span it."""
    _, path, _ = small
    graph = read(path)
    codes, met = corner_codes(graph)
    call = graph.nodes[0]
    assert call.op.name == "Conv"
    sums = call.op.compute(call, codes[graph.inputs[0]])
    assert int(sums.max()) == call.bounds.final[1]
    assert int(sums.min()) == call.bounds.final[0]
    assert met[0] >= 1 and met[1] >= met[0]
    tensors = reference.trace(graph, codes)
    for name, array in tensors.items():
        assert array.min() >= graph.tensors[name].lo and array.max() <= graph.tensors[name].hi


def test_isolated_sums_reach_their_proved_extremes(small):
    """Sums behind other sums meet both ends of their intervals when their node stands alone."""
    _, path, _ = small
    graph = read(path)
    apart = isolated(graph)
    assert apart is not None
    alone, codes = apart
    assert [call.name for call in alone.nodes] == ["conv2", "fc"]
    for call in alone.nodes:
        operand = codes[call.inputs[0]]
        assert operand.min() >= call.x[0].lo and operand.max() <= call.x[0].hi
        exact = call.op.compute(call, operand, *(call.constants[i] for i in sorted(call.constants)))
        assert (int(exact.min()), int(exact.max())) == call.bounds.final
        original = next(c for c in graph.nodes if c.name == call.name)
        assert call.bounds == original.bounds and call.y == original.y


@pytest.mark.parametrize("name", BACKENDS)
def test_a_wrong_isolated_sum_is_caught(small, name, monkeypatch):
    """A backend right on the whole network and wrong in one sum alone is a mismatch that names the node."""
    usable(name)
    _, path, x = small
    backend = type(rooms.make(name, None))
    run = backend.run_isolated

    def wrong(self, graph, codes):
        found = run(self, graph, codes)
        found[graph.outputs[-1]] = found[graph.outputs[-1]] + 1
        return found

    monkeypatch.setattr(backend, "run_isolated", wrong)
    report = edgemat.verify(path, x.numpy()[:3], backends=(name,))
    assert not report.ok and report.first_mismatch.node == "fc" and report.first_mismatch.backend == name
