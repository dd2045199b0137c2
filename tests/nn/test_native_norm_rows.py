"""Norms in native passes against torch's operations: the same bits forward; gradients to their summation order."""

from __future__ import annotations

import ctypes
import re
import subprocess
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from edgemat import Fixed
from edgemat.formats import OVERFLOWS, ROUNDINGS
from edgemat.nn import FixedQuantizer, QuantLayerNorm, QuantRMSNorm, native, normalization_rows
from edgemat.nn.normalization import QuantRowNorm
from edgemat.nn.normalization_rows import RowSetting, native_forward
from edgemat.ops.reciprocal_root import TABLE
from edgemat.targets.mcu.host import SANITIZE, STRICT
from edgemat.targets.toolchain import compile, find_c

pytestmark = pytest.mark.skipif(native.load() is None, reason="install gcc for the native passes")

# Input, norm (None: the layer's own), weights (None: no gain), output, and what the carriers then are.
FORMATS = {
    "floats": ("fixed<8,4>", None, "fixed<8>", "fixed<8>", (torch.float32, torch.float32)),
    "unsigned": ("ufixed<6,3>", None, "fixed<6,2>", "ufixed<8>", (torch.float32, torch.float32)),
    "one bit": ("ufixed<1,1>", None, "fixed<8>", "fixed<5,4>", (torch.float32, torch.float32)),
    "a double": ("fixed<12,5>", None, "fixed<8>", "fixed<12,4>", (torch.float64, torch.float32)),
    "doubles": ("fixed<16,6>", "fixed<31,7>", "fixed<16>", "fixed<22,6>", (torch.float64, torch.float64)),
    "saturating": ("fixed<8,4>", "fixed<6,1>", "fixed<8,1>", "fixed<8,-1,RND,SAT_SYM>", (torch.float32, torch.float32)),
    "exact": ("fixed<6,3>", None, "fixed<8>", None, (torch.float32, torch.float32)),
    "no gain": ("fixed<8,4>", None, None, "fixed<7,3>", (torch.float32, torch.float32)),
    "exact, no gain": ("fixed<12,4>", "fixed<24,8>", None, None, (torch.float64, torch.float32)),
}
KINDS = {"rms": QuantRMSNorm, "layer": QuantLayerNorm}
SHAPES = ((11, 24), (3, 7, 1), (9, 2), (70, 131), (12, 1100))


def layer_of(
    kind: str,
    features: int,
    input: str,
    norm: str | None = None,
    weights: str | None = "fixed<8>",
    output: str | None = "fixed<8>",
    relu: bool = False,
) -> QuantRowNorm:
    """A layer with random parameters, its binary points set."""
    torch.manual_seed(0)
    made = None if output is None else FixedQuantizer(output, relu=relu, role="requantize")
    given: dict = {"gain": weights is not None, "weights": weights or "fixed<8>", "norm": norm}
    if kind == "layer":
        given["bias"] = weights is not None
    layer = KINDS[kind](features, input=None, output=made, **given)
    with torch.no_grad():
        for parameter in (layer.weight, layer.bias):
            if parameter is not None:
                parameter.normal_()
    source = FixedQuantizer(input)
    layer.link(source)
    layer(source(torch.randn(16, features) * 3))
    return layer


def hostile(input: str, *shape: int) -> Tensor:
    """Zeros, rails in turn, single elements, the smallest codes, constants, ramps; random rows of all sizes."""
    fmt = Fixed.parse(input)
    low, high = fmt.rails
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(low, high + 1, shape, generator=generator).double()
    rows = x.view(-1, shape[-1])
    sizes = torch.logspace(0, -5, len(rows), base=4.0, dtype=torch.float64)
    rows.mul_(sizes[torch.randperm(len(rows), generator=generator), None]).round_()
    rows[0], rows[1], rows[2] = 0.0, low, high
    rows[3, ::2], rows[3, 1::2] = low, high
    rows[4] = 0.0
    rows[4, 0] = 1.0
    rows[5] = 0.0
    rows[5, -1] = low or high
    rows[6] = (torch.arange(shape[-1]) % 2).double()
    rows[7] = torch.linspace(low, high, shape[-1], dtype=torch.float64).round()
    rows[8] = 1.0
    return (x * 2.0**-fmt.frac_bits).float()


def both(layer: QuantRowNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """The native result and torch's."""
    setting = RowSetting(layer, layer.known_source(), layer.output_quantizer)
    parameters = layer.parameters_on_grid()
    passes = normalization_rows._passes(x, parameters[0], setting)
    assert passes is not None
    return native_forward(passes, x, *parameters, setting), setting.result(x, *parameters)


def test_the_settings_have_the_members_of_the_c_structure() -> None:
    """Names, types and order, and with them the size: nothing else would notice a member that moved."""
    source = Path(native.__file__).with_name("norm_rows.c").read_text("utf-8")
    found = re.search(r"typedef struct \{(.*?)\} EdgematRows;", source, re.DOTALL)
    assert found is not None
    text = re.sub(r"/\*.*?\*/", "", found[1], flags=re.DOTALL)
    kinds = {"int64_t": ctypes.c_int64, "int32_t": ctypes.c_int32, "double": ctypes.c_double}
    lines = re.findall(r"(\w+) ([\w, ]+);", text)
    members = [(name, kinds[kind]) for kind, names in lines for name in names.split(", ")]
    assert len(members) > 20 and members == list(normalization_rows._Passes._fields_)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str, name: str, relu: bool) -> None:
    *formats, carriers = FORMATS[name]
    for shape in SHAPES:
        layer = layer_of(kind, shape[-1], *formats, relu=relu)
        setting = RowSetting(layer, layer.known_source(), layer.output_quantizer)
        if kind == "rms" and shape == (11, 24):
            assert setting.carriers() == carriers
        found, expected = both(layer, hostile(formats[0], *shape))
        assert found.dtype == expected.dtype and torch.equal(found, expected)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_rounding_and_overflow(kind: str, relu: bool) -> None:
    x, seen = hostile("fixed<6,3>", 200, 9), set()
    for i, (rounding, overflow) in enumerate(product(ROUNDINGS, OVERFLOWS)):
        norm = f"fixed<9,2,{rounding},{overflow}>"
        other = f"fixed<6,2,{ROUNDINGS[i % 5 - 1]},{OVERFLOWS[i // 4 % 4]}>"
        found, expected = both(layer_of(kind, 9, "fixed<6,3>", norm, "fixed<5,2>", other, relu=relu), x)
        assert torch.equal(found, expected), (norm, other)
        output = f"fixed<5,2,{rounding},{overflow}>"
        found, expected = both(layer_of(kind, 9, "fixed<6,3>", "fixed<9,4>", "fixed<5,2>", output, relu=relu), x)
        assert torch.equal(found, expected), output
        seen.add(found.numpy().tobytes())
    assert relu or len(seen) == 28, "the control: every mode gives a result of its own"


def limits(kind: str) -> tuple[QuantRowNorm, Tensor]:
    """Totals within 2**-4 of 2**62, which neither float holds."""
    features = 32767 if kind == "rms" else 255
    layer = layer_of(kind, features, "fixed<24,4>", "fixed<22,9>", "fixed<4>", "fixed<12,9>")
    setting = RowSetting(layer, layer.known_source(), layer.output_quantizer)
    assert setting.total > (1 << 61) * (1 if kind == "layer" else 0.99)
    return layer, hostile("fixed<24,4>", 12, features)


@pytest.mark.parametrize("kind", KINDS)
def test_totals_at_the_limit(kind: str) -> None:
    found, expected = both(*limits(kind))
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "norm"), [("rms", "fixed<24,4>"), ("layer", "fixed<28,4>")])
def test_controls_a_bit_of_the_table_a_rounding_and_a_gain_show(kind: str, norm: str) -> None:
    """On grids so fine that products with the mantissa are ties."""
    given = "fixed<8,4>", norm, "fixed<8,3>", "fixed<22,2>"
    layer, x = layer_of(kind, 16, *given), hostile(given[0], 400, 16)
    found, expected = both(layer, x)
    assert torch.equal(found, expected)
    TABLE[::10] ^= 512
    try:
        changed, also = both(layer, x)
    finally:
        TABLE[::10] ^= 512
    assert torch.equal(changed, also) and not torch.equal(changed, expected)
    for at in (1, 3):
        text = given[at].replace(">", ",RND_CONV,SAT>")
        changed, also = both(layer_of(kind, 16, *given[:at], text, *given[at + 1 :]), x)
        assert torch.equal(changed, also) and not torch.equal(changed, expected), "a tie is among the cases"
    with torch.no_grad():
        layer.weight[3] += 2.0**-5
    assert not torch.equal(both(layer, x)[0], expected)


def test_a_value_that_is_none_leaves_the_others_alone() -> None:
    for kind in KINDS:
        layer, x = layer_of(kind, 24, "fixed<8,4>"), hostile("fixed<8,4>", 11, 24)
        plain, _ = both(layer, x)
        x[9, 5] = torch.nan
        x[10, 6] = torch.inf
        found, expected = both(layer, x)
        assert found[9].isnan().any() and torch.equal(found[9].isnan(), expected[9].isnan())
        assert torch.equal(found[:9], plain[:9])


def test_what_stays_with_torch() -> None:
    x = hostile("fixed<8,4>", 11, 24)

    def taken(layer: QuantRowNorm, x: Tensor) -> bool:
        setting = RowSetting(layer, layer.known_source(), layer.output_quantizer)
        return normalization_rows._passes(x, layer.parameters_on_grid()[0], setting) is not None

    assert taken(layer_of("rms", 24, "fixed<8,4>"), x)
    assert not taken(layer_of("rms", 24, "fixed<8,4>", output="fixed<28,4>"), x)
    assert not taken(layer_of("rms", 24, "fixed<8,4>", norm="fixed<30,6>", output=None), x)
    assert not taken(layer_of("rms", 24, "fixed<8,4>", output="fixed<8,-50>"), x)
    assert not taken(layer_of("rms", 24, "fixed<26,6>"), x.double())
    strided = layer_of("rms", 24, "fixed<8,4>")
    turned = x.t().contiguous().t()
    assert not turned.is_contiguous() and torch.equal(both(strided, turned)[0], both(strided, x)[0])


def gradients(layer: QuantRowNorm, x: Tensor) -> list[Tensor]:
    """The result and the gradients of x, gain, bias and the quantiser's binary point."""
    x = x.clone().requires_grad_()
    leaves = [x, layer.weight, layer.bias, None if layer.output_quantizer is None else layer.output_quantizer.frac]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    y = layer(x)
    weigh = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    return [y.detach(), *torch.autograd.grad(y, wanted, weigh)]


@pytest.mark.parametrize("shape", [(9, 1), (150, 65), (2, 40, 1100)])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str, name: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    *formats, _ = FORMATS[name]
    layer, x = layer_of(kind, shape[-1], *formats), hostile(formats[0], *shape)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(normalization_rows, "_SMALL", 0)
    fast = gradients(layer, x)
    with monkeypatch.context() as patch:
        patch.setattr(native, "kernel", lambda *tensors: None)
        slow = gradients(layer, x)
    assert len(fast) == len(slow) and torch.equal(fast[0], slow[0])
    for a, b in zip(fast[1:], slow[1:], strict=True):
        # A value on the brink of the quantiser's range may fall either way, and rows of single bits have large ones.
        assert a.shape == b.shape and float((a - b).norm()) <= 2e-3 * float(b.norm()) + 1e-3
    if shape[-1] > 1:
        assert float((fast[1] * 1.01 - slow[1]).norm()) > 5e-3 * float(slow[1].norm()), "the control"


def test_second_derivatives_go_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("rms", 24, "fixed<8,4>"), hostile("fixed<8,4>", 11, 24)[7:].requires_grad_()
    called: list[bool] = []
    monkeypatch.setattr(normalization_rows, "native_backward", lambda *given: called.append(True))
    (dx,) = torch.autograd.grad(layer(x).square().sum(), [x], create_graph=True)
    assert not called and dx.requires_grad


# -- under the sanitisers -----------------------------------------------------------------------------------------
DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
typedef struct EdgematRows EdgematRows;
void edgemat_rows_forward(const void*, float*, const float*, const void*, const void*, const int64_t*);
void edgemat_rows_backward(const void*, float*, float*, const float*, const float*, const float*, const float*,
                           const float*, double, double, double, double*);
static void* part(void) { /* its length, then its bytes, in a block of its own */
    int64_t bytes;
    void* found;
    if (fread(&bytes, 8, 1, stdin) != 1) exit(0);
    found = bytes < 0 ? NULL : malloc((size_t)bytes);
    if (bytes > 0 && fread(found, 1, (size_t)bytes, stdin) != (size_t)bytes) exit(3);
    return found;
}
static void one(void) {
    void *forward = part(), *backward = part(), *x = part(), *gain = part(), *bias = part(), *table = part();
    void *g = part(), *y = part(), *gains = part(), *biases = part();
    double *numbers = part(), *room = part();
    float *made = part(), *dx = part(), *found = part();
    int64_t* sizes = part();
    edgemat_rows_forward(forward, made, x, gain, bias, table);
    edgemat_rows_backward(backward, dx, found, g, x, y, gains, biases, numbers[0], numbers[1], numbers[2], room);
    fwrite(made, 4, (size_t)sizes[0], stdout);
    fwrite(dx, 4, (size_t)sizes[0], stdout);
    fwrite(found, 4, (size_t)sizes[1], stdout);
    free(forward), free(backward), free(x), free(gain), free(bias), free(table), free(g), free(y), free(gains);
    free(biases), free(numbers), free(room), free(made), free(dx), free(found), free(sizes);
}
int main(void) {
    for (;;) one();
}
"""


class Recorder:
    """Stands where the native passes are, keeps what they are given, and calls them."""

    def __init__(self, rows: int, features: int):
        self.rows, self.features = rows, features
        self.passes = native.load()
        self.parts: dict[str, bytes | None] = {}

    def keep(self, **places: tuple[int | None, int]) -> None:
        self.parts |= {k: None if at is None else ctypes.string_at(at, n) for k, (at, n) in places.items()}

    def edgemat_rows_forward(self, s: int, y: int, x: int, gain: int, bias: int, table: int) -> None:
        size, n = ctypes.sizeof(normalization_rows._Passes), self.features
        wide = 8 if normalization_rows._Passes.from_address(s).wide == 2 else 4
        whole = 4 * n * self.rows
        self.keep(forward=(s, size), x=(x, whole), gain=(gain, wide * n), bias=(bias, wide * n), table=(table, 8 * 192))
        self.passes.edgemat_rows_forward(s, y, x, gain, bias, table)

    def edgemat_rows_backward(self, s: int, dx: int, found: int, g: int, x: int, *rest: int) -> None:
        y, gain, bias, *numbers = rest[:-1]
        size, n = ctypes.sizeof(normalization_rows._Passes), self.features
        whole = 4 * n * self.rows
        self.keep(backward=(s, size), g=(g, whole), y=(y, whole), gains=(gain, 4 * n), biases=(bias, 4 * n))
        self.parts |= {"numbers": np.array(numbers).tobytes()}
        self.parts |= {"room": bytes(normalization_rows._Passes.from_address(s).threads * 2 * n * 12)}
        self.passes.edgemat_rows_backward(s, dx, found, g, x, *rest)

    def stream(self) -> bytes:
        whole, n = self.features * self.rows, self.features
        kept = self.parts | {"made": bytes(4 * whole), "dx": bytes(4 * whole), "found": bytes(8 * n + 4)}
        kept |= {"sizes": np.array([whole, 2 * n + 1]).tobytes()}
        names = "forward backward x gain bias table g y gains biases numbers room made dx found sizes"
        parts = [kept[name] for name in names.split()]
        return b"".join(np.int64(-1 if p is None else len(p)).tobytes() + (p or b"") for p in parts)


def test_under_the_sanitisers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built with every warning an error, ASan and UBSan: quiet, and the same values."""
    (tmp_path / "driver.c").write_text(DRIVER)
    compiler = find_c()
    # Only GCC brings the runtimes that these need along.
    further = (*SANITIZE, "-fopenmp") if compiler.name == "gcc" else ("-Wno-unknown-pragmas",)
    object_file, program = tmp_path / "rows.o", tmp_path / "program"
    source = Path(native.__file__).parent / "norm_rows.c"
    flags = ["-c", *STRICT, "-ffp-contract=off", *further]
    compile(compiler, [source], object_file, standard="c99", optimize="1", flags=flags)
    compile(compiler, [tmp_path / "driver.c", object_file], program, flags=further, link_flags=["-lm"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(normalization_rows, "_SMALL", 0)
    cases = [(kind, shape, *f[:4]) for kind in KINDS for shape in SHAPES[::3] for f in FORMATS.values()]
    modes = product(ROUNDINGS, OVERFLOWS)
    cases += [
        ("layer", (9, 5), "fixed<6,3>", f"fixed<9,2,{r},{o}>", "fixed<5,2>", f"fixed<6,2,{r},{o}>") for r, o in modes
    ]
    made = [(layer_of(kind, shape[-1], *formats), hostile(formats[0], *shape)) for kind, shape, *formats in cases]
    made += [limits(kind) for kind in KINDS]
    bad = hostile("fixed<8,4>", 9, 5)
    bad[0, 0], bad[1, 1], bad[2, 2], bad[3] = torch.nan, torch.inf, -3e38, 3e38
    made += [(layer_of(kind, 5, "fixed<8,4>"), bad) for kind in KINDS]
    made += [(layer_of(kind, 5, "fixed<24,4>", "fixed<22,4>", "fixed<4>"), bad) for kind in KINDS]
    streams, expected = [], []
    for layer, x in made:
        recorder = Recorder(x.numel() // x.shape[-1], x.shape[-1])
        with monkeypatch.context() as patch:
            patch.setattr(normalization_rows, "_library", lambda: recorder)  # noqa: B023
            expected.append(gradients(layer, x))
        streams.append(recorder.stream())
    run = subprocess.run([program], input=b"".join(streams), capture_output=True, check=False)
    assert run.returncode == 0 and not run.stderr, run.stderr.decode()
    values = torch.frombuffer(bytearray(run.stdout), dtype=torch.float32)
    for (_, x), wanted in zip(made, expected, strict=True):
        sizes = [x.numel(), x.numel(), 2 * x.shape[-1] + 1]
        y, dx, rest, values = values.split([*sizes, len(values) - sum(sizes)])
        assert torch.equal(y.nan_to_num(), wanted[0].reshape(-1).nan_to_num())
        if x is not bad:
            assert torch.allclose(dx, wanted[1].reshape(-1), rtol=1e-4, atol=1e-4 * float(dx.abs().max()))
            assert rest.isfinite().all()
    assert not len(values)
