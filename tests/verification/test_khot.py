"""Multiplier-free networks: every backend gives the same integers, one wrong digit is noticed, nothing multiplies."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import edgemat
from edgemat.errors import ToolchainError
from edgemat.lower.graph import Graph
from edgemat.lower.reader import read
from edgemat.report import inspect
from edgemat.signed_digits import DigitWords, digit_count, pack_digits, signed_digits
from edgemat.sim.session import copy
from edgemat.targets import toolchain
from edgemat.targets.apheaders import require_ap_headers
from edgemat.targets.hls import Plan, Simulation, model_cost
from edgemat.targets.hls.plan import PlanError
from edgemat.targets.mcu import project as c_project
from edgemat.targets.mcu.host import SANITIZE, STRICT, HostProgram
from edgemat.verification.verify import verify


def missing_cxx() -> str | None:
    try:
        require_ap_headers()
        toolchain.find_cxx()
    except ToolchainError as error:
        return str(error)
    return None


needs_cxx = pytest.mark.skipif(missing_cxx() is not None, reason=str(missing_cxx()))


def small_network(khot: int | None) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.PReLU(6), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.ConvTranspose2d(6, 3, 2), nn.LeakyReLU(0.3), nn.Flatten(), nn.Linear(27, 4),
    )  # fmt: skip
    recipe = edgemat.Recipe(
        input="fixed<8,3>", weights="fixed<8>", activations="fixed<6>", khot=khot, batch_norm="affine"
    )
    q = edgemat.quantize(net, recipe)
    edgemat.calibrate(q, [torch.randn(32, 2, 6, 6)])
    return q.eval()


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[int | None, tuple[nn.Module, Graph]]:
    folder = tmp_path_factory.mktemp("khot")
    made: dict[int | None, tuple[nn.Module, Graph]] = {}
    for khot in (None, 1, 2, 3):
        q = small_network(khot)
        edgemat.to_onnx(q, torch.randn(2, 2, 6, 6), folder / f"{khot}.onnx")
        made[khot] = q, read(folder / f"{khot}.onnx")
    return made


@pytest.mark.parametrize("khot", [1, 2, 3])
def test_torch_onnx_and_c_agree(networks, khot: int) -> None:
    q, graph = networks[khot]
    report = verify(graph, samples=16, module=q, backends=["onnx", "mcu"])
    assert report.ok and set(report.backends) == {"torch", "onnx", "mcu"}


@needs_cxx
def test_hls_agrees(networks) -> None:
    assert verify(networks[2][1], samples=8, backends=["hls:stream"]).ok


def one_wrong_digit(bit: int):
    """`pack_digits` with one bit of one word flipped: bit 0 is the sign of its lowest digit, bit 1 in its shift."""
    left = [1]

    def pack(codes: np.ndarray, count: int, dense: bool = False) -> DigitWords:
        packed = pack_digits(codes, count, dense)
        if left[0] and codes.size > 50:
            left[0] = 0
            words = packed.words.copy()
            words.reshape(-1)[int(np.abs(codes.reshape(-1)).argmax())] ^= 1 << bit
            return replace(packed, words=words)
        return packed

    return pack


@pytest.mark.parametrize("bit", [0, 1], ids=["sign", "shift"])
def test_one_wrong_digit_in_c_is_noticed(networks, monkeypatch, bit: int) -> None:
    graph = networks[2][1]
    monkeypatch.setattr("edgemat.targets.mcu.variants.pack_digits", one_wrong_digit(bit))
    report = verify(graph, samples=16, backends=["mcu"])
    assert not report.ok and report.first_mismatch is not None


@needs_cxx
@pytest.mark.parametrize("bit", [0, 1], ids=["sign", "shift"])
def test_one_wrong_digit_in_hls_is_noticed(networks, monkeypatch, bit: int) -> None:
    monkeypatch.setattr("edgemat.targets.hls.digits.pack_digits", one_wrong_digit(bit))
    assert not verify(networks[2][1], samples=8, backends=["hls"]).ok


@pytest.mark.parametrize("what", ["sign", "shift"])
def test_one_wrong_digit_in_onnx_and_torch_is_noticed(networks, what: str) -> None:
    q, graph = networks[2]
    call = next(c for c in graph.nodes if c.op.name == "Linear")
    codes = call.constants[1].copy()
    place = np.unravel_index(int(np.abs(codes).argmax()), codes.shape)
    signs, shifts = signed_digits(codes[place], 2)
    digit = int(signs[0]) << int(shifts[0])
    codes[place] += -2 * digit if what == "sign" else digit
    model = copy(graph.model)
    value = next(v for v in model.graph.initializers.values() if v.name == call.inputs[1])
    value.const_value = ir.tensor(codes.astype(np.int8), name=value.name)
    assert not verify(replace(graph, model=model), samples=16, backends=["onnx"]).ok
    layer = q.get_submodule("9")
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        step = 2.0 ** -layer.weight_quantizer.exponents().double()[place[0]]
        layer.weight[place] = float(codes[place] * step)
    try:
        assert not verify(graph, samples=16, module=q, backends=["torch"]).ok
    finally:
        with torch.no_grad():
            layer.weight.copy_(kept)


@needs_cxx
def test_hls_instantiates_no_multiplication(networks) -> None:
    """Every code is an ap_int here, so any product of codes leaves a symbol of ap_int's operator*."""
    if shutil.which("nm") is None or toolchain.find_cxx().name == "zig":
        pytest.skip("needs g++ or clang++ and binutils' nm (make toolchains)")
    found = {}
    for khot in (2, None):
        with Simulation(
            networks[khot][1], Plan(reuse=2), optimize="0", defines={"EDGEMAT_HARDWARE_TYPES": None}
        ) as built:
            symbols = subprocess.run(["nm", "-C", str(built.program)], capture_output=True, text=True, check=True)
        found[khot] = [line for line in symbols.stdout.splitlines() if "operator*<" in line]
    assert found[2] == [] and len(found[None]) > 4


def without_plain_products(files: dict[str, str]) -> dict[str, str]:
    """The generated C with the one product of an input and a code replaced by something that does not compile."""
    text = files["kernels/edgemat_variant.h"]
    assert text.count("((EM_ACC)(x) * (EM_ACC)(w))") == 1
    files["kernels/edgemat_variant.h"] = text.replace("((EM_ACC)(x) * (EM_ACC)(w))", "a_product_was_needed")
    return files


def test_c_compiles_without_the_product(networks, monkeypatch) -> None:
    planned = type(c_project(networks[2][1]))
    original = planned.files
    monkeypatch.setattr(planned, "files", lambda self, **k: without_plain_products(original(self, **k)))
    graph = networks[2][1]
    sanitize = SANITIZE if toolchain.find_c().name == "gcc" else ()
    with HostProgram(graph, flags=(*STRICT, *sanitize), optimize="1"):
        pass
    with pytest.raises(ToolchainError, match="a_product_was_needed"):
        HostProgram(networks[None][1], flags=STRICT, optimize="1")


def test_inspect_shows_shift_adds_instead_of_multiplies(networks) -> None:
    for khot in (1, 2, 3, None):
        graph = networks[khot][1]
        for target in ("hls", "mcu"):
            shown = inspect(graph, target).to_dict()
            totals = shown["totals"]
            assert (totals["multiplies"] == 0) == (khot is not None) == (totals["shift_adds"] > 0)
            stated = shown["target"]["totals"]
            figures = [stated] if target == "mcu" else [stated["parallel"], stated["stream"]]
            for part in figures:
                assert (part["shift_adds"] > 0) == (khot is not None)
                assert (part.get("multipliers", part.get("multiplies")) == 0) == (khot is not None)
    linear = next(n for n in inspect(networks[3][1]).nodes if n.operator == "Linear")
    codes = next(c for c in networks[3][1].nodes if c.op.name == "Linear").constants[1]
    assert linear.shift_adds == linear.additions == int(digit_count(codes).sum())


def test_folded_digits_take_no_more_memory_than_codes(networks) -> None:
    bits = {k: model_cost(networks[k][1], Plan(io="stream", reuse=27)).memory_bits for k in (1, 2, None)}
    assert bits[1] < bits[None] and bits[2] < 1.05 * bits[None]


def test_two_hot_constants_may_be_left_to_the_compiler(networks) -> None:
    """`products = "compiler"` keeps ``x * w`` where weights are constants of an unrolled loop, and only there."""
    from edgemat.targets.hls import project

    def products(khot: int, **choices) -> list[str]:
        text = project(networks[khot][1], Plan(**choices)).files(vectors=False)["parameters.hpp"].decode()
        return sorted({line.split("::")[1] for line in text.splitlines() if "int product = " in line})

    assert products(2) == ["SHIFT_ADD;"]
    assert products(2, products="compiler") == ["MULTIPLY;", "SHIFT_ADD;"]  # affine and slopes are read from ROMs
    assert products(2, products="compiler", io="stream", reuse=9) == ["SHIFT_ADD;"]
    assert products(3, products="compiler") == ["SHIFT_ADD;"]
    with pytest.raises(PlanError, match=r"products is 'compilr', .*did you mean 'compiler'"):
        Plan(products="compilr")
