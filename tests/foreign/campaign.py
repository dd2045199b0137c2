"""Throws damaged files at the import: ``python -m tests.foreign.campaign SEED COUNT [FILE ...]``.

Each case must end in an EdgematError or in a lowered file whose reference and ONNX bodies agree, within a time and
memory. What does not is printed with its seed and kept under ``$FUZZ_KEEP``, if that is set.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import onnx
import onnx_ir as ir

from edgemat.errors import EdgematError
from edgemat.foreign.importing import imported
from edgemat.foreign.source import parse
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read_bytes
from edgemat.sim import Simulator, reference
from edgemat.sim.arrays import input_values
from edgemat.verification.against import compare_source
from tests.foreign.strangers import damaged_bytes, damaged_graph, small_graph

SECONDS = 20
"""Processor time of one case."""
ADDRESS_BYTES = 4 << 30
RESIDENT_BYTES = 2 << 30


class TooSlow(Exception):
    """A case took more than its time."""


def case(seed: int, files: list[bytes]) -> bytes:
    """The file of a seed."""
    r = Random(seed)
    if files and r.random() < 0.3:
        return damaged_bytes(r.choice(files), r)
    model = onnx.load_from_string(r.choice(files)) if files and r.random() < 0.2 else small_graph(r)
    kind = r.random()
    if kind < 0.15:
        return model.SerializeToString()
    if kind < 0.85:
        return damaged_graph(model, r).SerializeToString()
    return damaged_bytes(model.SerializeToString(), r)


def judge(data: bytes) -> str:
    """What the import says of a file: "refused", or "taken" after reference and ONNX bodies agreed on random codes.

    Raises:
        AssertionError: if they do not.
    """
    try:
        model, _ = imported(parse(data), {})
    except EdgematError as error:
        text = str(error)
        assert 0 < len(text) < 20_000
        if "do not fit each other (" in text and "FUZZ_KEEP" in os.environ:
            print("  barrier:", text[text.index("do not fit each other (") + 22 :][:140])
        return "refused"
    graph = read_bytes(ir.serde.serialize_model(model).SerializeToString())
    if max(t.size for t in graph.tensors.values()) > 1 << 20:
        return "taken, large"
    rng = np.random.default_rng(0)
    codes = {}
    for name in graph.inputs:
        tensor = graph.tensors[name]
        codes[name] = tensor.legal(rng.integers(tensor.lo, tensor.hi, (3, *tensor.sample_shape), endpoint=True))
    expected = reference.run(graph, codes)
    feeds = dict(zip(graph.input_names, codes.values(), strict=True))
    found = Simulator(graph).codes(feeds, codes=True)
    arrays = found if isinstance(found, dict) else {graph.output_names[0]: found}
    for name, tensor in zip(graph.output_names, graph.outputs, strict=True):
        assert (arrays[name] == expected[tensor]).all(), "reference and ONNX bodies differ"
    return _measure(graph, data)


def _measure(graph: Graph, data: bytes) -> str:
    """What the import took, beside the file itself on random numbers."""
    rng = np.random.default_rng(1)
    inputs = {}
    for index, name in enumerate(graph.input_names):
        tensor = graph.input_type(index)
        drawn = tensor.legal(rng.integers(tensor.lo, tensor.hi, (9, *tensor.sample_shape), endpoint=True))
        values = input_values(graph, index, drawn)
        between = rng.uniform(values.min(), values.max(), (9, *tensor.sample_shape)).astype(values.dtype)
        inputs[name] = np.concatenate([values, between])
    try:
        report = compare_source(graph, "net", parse(data), inputs)
    except EdgematError:
        return "taken, original not run"
    assert not report.unpaired, report.unpaired
    assert not report.broken, f"called exact, but not: {report.broken}"
    wrong = [node for node in report.nodes if node.own and node.fidelity == "exact"]
    if wrong and "FUZZ_KEEP" in os.environ:
        print("  exact with real scales, but:", [(n.node, n.own, n.codes, n.largest) for n in wrong], flush=True)
        Path(os.environ["FUZZ_KEEP"], "rounds.onnx").write_bytes(data)
    return "taken, but float32 rounds otherwise" if wrong else "taken"


def _ring(number: int, frame: object) -> None:
    raise TooSlow


def main(seed: int, count: int, paths: list[str]) -> int:
    """Runs the cases; returns how many were bad."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES, ADDRESS_BYTES))
    signal.signal(signal.SIGPROF, _ring)
    files = [Path(path).read_bytes() for path in paths]
    found: Counter[str] = Counter()
    bad = 0
    for number in range(seed, seed + count):
        if "FUZZ_AT" in os.environ:  # what runs now, if it never comes back
            Path(os.environ["FUZZ_AT"]).write_text(str(number))
        data = case(number, files)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            found[judge(data)] += 1
        except BaseException as error:
            signal.setitimer(signal.ITIMER_PROF, 0)
            if isinstance(error, KeyboardInterrupt):
                raise
            bad += 1
            last = traceback.extract_tb(error.__traceback__)
            own = [f for f in last if "edgemat" in f.filename][-1:] or last[-1:]
            text = (str(error).splitlines() or [""])[0][:160]
            print(f"{number}: {type(error).__name__}: {text} at {own[0].filename}:{own[0].lineno}", flush=True)
            if "FUZZ_KEEP" in os.environ:
                Path(os.environ["FUZZ_KEEP"], f"{number}.onnx").write_bytes(data)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if used > RESIDENT_BYTES:
            print(f"{number}: {used} bytes", flush=True)
            return bad + 1
    print(f"{count} cases from {seed}: {dict(found)}, {bad} bad, {used >> 20} MiB at most")
    return bad


if __name__ == "__main__":
    sys.exit(1 if main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]) else 0)
