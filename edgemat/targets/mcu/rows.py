"""Operators over rows in C: the widths of their integers, and the modes of roundings that are not the epilogue's."""

from __future__ import annotations

from edgemat.formats import OVERFLOWS, ROUNDINGS
from edgemat.targets.layout import Step
from edgemat.targets.mcu.epilogue import overflow_kind, overflow_macros, overflow_name

NORMS = ("rms_norm", "layer_norm")
MANTISSA_BITS = 16


def choose_rows(step: Step, macros: list[tuple[str, str]], name: list[str]) -> None:
    """Adds what a kernel over rows defines beyond element types and epilogue; other steps stay as they are."""
    if step.stem in NORMS:
        _choose_norm(step, macros, name)
    elif step.stem == "token_exponent":
        _accumulate(max(-step.inputs[0].lo, step.inputs[0].hi) < 1 << 31, macros, name)
    elif step.stem == "token_quantize":
        _choose_quotient(step, macros, name)


def _accumulate(short: bool, macros: list[tuple[str, str]], name: list[str]) -> None:
    if not short:
        macros.append(("EM_ACC_BITS", "64"))
        name.append("acc64")


def _choose_norm(step: Step, macros: list[tuple[str, str]], name: list[str]) -> None:
    p = step.params
    if not p["has_gain"]:
        macros.append(("EM_W", "int32_t"))
    reach = int(p["norm_reach"])
    first, last = int(p["norm_shift"]), int(p["norm_shift"]) + int(p["exponent_max"])
    small = int(p["numerator_bits"]) + MANTISSA_BITS <= 31 and reach < 1 << 30 and last <= 30 and first >= -30
    total = 32 if int(p["total_bits"]) <= 31 else 64
    # A norm's format is compared with rounded codes by its rails; the interval says where that can be left out.
    fits = int(p["norm_min"]) <= (-reach if step.inputs[0].lo < 0 or step.stem == "layer_norm" else 0)
    fits = fits and reach <= int(p["norm_max"])
    mode = OVERFLOWS[int(p["norm_overflow"])]
    overflow = "FITS" if fits else {"SAT_SYM": "SAT"}.get(mode, mode)
    rounding = ROUNDINGS[int(p["norm_rounding"])]
    macros += [
        ("EM_TOTAL_BITS", str(total)),
        ("EM_NORM_BITS", "32" if small else "64"),
        ("EM_NORM_ROUNDING", f"EM_{rounding}"),
        ("EM_NORM_OVERFLOW", f"EM_{overflow}"),
    ]
    name += [f"t{total}n{32 if small else 64}", f"{rounding}{overflow}".lower().replace("_", "")]


def _choose_quotient(step: Step, macros: list[tuple[str, str]], name: list[str]) -> None:
    x, fmt = step.inputs[0], step.outputs[0].format
    # Dividing by 2**0 changes nothing: the rails that matter are those of the input itself.
    overflow = overflow_kind(fmt, x.lo, x.hi)
    macros.append(("EM_ROUNDING", f"EM_{fmt.rounding}"))
    name.append(fmt.rounding.lower())
    if overflow != "FITS":
        macros += overflow_macros(fmt, overflow)
        name.append(overflow_name(fmt))
    short = max(-x.lo, x.hi) < 1 << 31 and int(step.params["exponent_max"]) <= 30 and fmt.rails[1] < 1 << 31
    _accumulate(short, macros, name)
