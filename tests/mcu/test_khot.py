"""Shift-add kernels: exact under the emulators, also where the machine has no multiplier, and what they cost there."""

from __future__ import annotations

import numpy as np
import pytest

from edgemat.errors import UnsupportedOpError
from edgemat.op import Call
from edgemat.ops import OPS
from edgemat.targets.mcu import emulator, project
from edgemat.targets.mcu.host import SANITIZE, STRICT, HostProgram
from edgemat.targets.mcu.sample import run_reference
from edgemat.targets.toolchain import find_c
from tests.mcu.case_graphs import feeds, side_by_side

needs_emulator = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


def khot_cases() -> list[Call]:
    return [call for op in OPS for call in op.cases() if call.attrs.get("khot")]


def test_there_are_cases_of_every_operator_and_number_of_digits() -> None:
    found = {(call.op.name, call.attrs["khot"]) for call in khot_cases()}
    assert {name for name, _ in found} == {"Linear", "Conv", "ConvTranspose", "Affine", "PRelu"}
    assert {khot for _, khot in found} == {1, 2, 3}
    variants = project(side_by_side("khot", khot_cases())).variants
    assert {v.file for v in variants} == {
        "linear.c", "conv.c", "conv__depthwise.c", "conv_transpose.c", "affine.c", "prelu.c"
    }  # fmt: skip
    assert all(dict(v.macros).get("EM_DIGITS") in ("1", "2", "3") for v in variants)
    assert {dict(v.macros).get("EM_ACC_BITS", "32") for v in variants} == {"32", "64"}


def test_exact_under_the_sanitizers() -> None:
    graph = side_by_side("khot", khot_cases())
    codes = feeds(graph, 12)
    expected = run_reference(graph, codes)
    flags = (*STRICT, *(SANITIZE if find_c().name == "gcc" else ()))
    with HostProgram(graph, flags=flags, optimize="1") as program:
        found = program.run(codes)
    assert [name for name in graph.outputs if not np.array_equal(found[name], expected[name])] == []


@needs_emulator
def test_exact_and_cheaper_without_a_multiplier() -> None:
    """On RV32IC a product is a routine of more than a hundred instructions; shifts and additions never call it."""
    conv = next(c for c in khot_cases() if c.op.name == "Conv" and c.attrs["khot"] == 2 and c.attrs["groups"] == 1)
    plain = Call(conv.op, conv.name, conv.x, {**conv.attrs, "khot": None}, conv.constants)
    counts = []
    for call in (conv, plain):
        graph = side_by_side("one", [call])
        codes = feeds(graph, 3)
        expected = run_reference(graph, codes)
        run = emulator.emulate(graph, codes, emulator.WITHOUT_MULTIPLIER, count=True)
        assert all(np.array_equal(run.codes[name], expected[name]) for name in graph.outputs)
        counts.append(run.instructions)
    assert counts[0] * 2 < counts[1]


def test_products_may_be_left_to_the_compiler(tmp_path) -> None:
    graph = side_by_side("khot", [c for c in khot_cases() if c.op.name == "Linear"][:3])
    codes = feeds(graph, 6)
    expected = run_reference(graph, codes)
    plain = project(graph, "compiler")
    assert all("EM_DIGITS" not in dict(v.macros) for v in plain.variants)
    assert "kernels/edgemat_shift_add.h" not in plain.files(example=False)
    with HostProgram(plain, flags=STRICT, optimize="1") as program:
        found = program.run(codes)
    assert all(np.array_equal(found[name], expected[name]) for name in graph.outputs)
    with pytest.raises(UnsupportedOpError, match="products is 'fast', expected one of shift_add, compiler"):
        project(graph, "fast")
