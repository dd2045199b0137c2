"""A planned C library: every value and expression the templates print, and the rendering of its files."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import resources
from typing import Any

import numpy as np

from edgemat.targets.layout import NativeTensor, Network
from edgemat.targets.mcu.arena import Arena, tensor_bytes
from edgemat.targets.mcu.sample import sample_codes
from edgemat.targets.mcu.storage import c_type, literal
from edgemat.targets.mcu.variants import Variant
from edgemat.targets.templates import render

_PACKAGE = "edgemat.targets.mcu"
_HEADERS = (
    "edgemat_kernels.h", "edgemat_requantize.h", "edgemat_variant.h", "edgemat_variant_end.h", "edgemat_float.h"
)  # fmt: skip
_INCLUDED = {
    "linear.c": ("edgemat_dot.h",),
    "conv.c": ("edgemat_dot.h", "edgemat_window.h"),
    "conv__depthwise.c": ("edgemat_window.h",),
    "linear__xnor.c": ("edgemat_signs.h",),
    "conv__xnor.c": ("edgemat_signs.h", "edgemat_window.h"),
    "linear__subsets.c": ("edgemat_subsets.h",),
    "conv__subsets.c": ("edgemat_subsets.h",),
    "linear__bipolar.c": ("edgemat_minus.h",),
    "conv__bipolar.c": ("edgemat_minus.h", "edgemat_window.h"),
    "linear__trits.c": ("edgemat_trits.h", "edgemat_trits_thumb.h", "edgemat_trits_end.h"),
    "conv__trits.c": ("edgemat_trits.h", "edgemat_trits_thumb.h", "edgemat_trits_end.h"),
    "max_pool.c": ("edgemat_window.h",),
    "average_pool.c": ("edgemat_window.h",),
    "add.c": ("edgemat_binary.h",),
    "sub.c": ("edgemat_binary.h",),
    "mul.c": ("edgemat_binary.h",),
    "slice.c": ("edgemat_strided.h",),
    "transpose.c": ("edgemat_strided.h",),
    "rms_norm.c": ("edgemat_norm.h", "edgemat_rows.h", "edgemat_rows_end.h"),
    "layer_norm.c": ("edgemat_norm.h", "edgemat_rows.h", "edgemat_rows_end.h"),
}
_TEMPLATES = (
    "model.h", "model.c", "weights.h", "weights.c", "kernels.h", "kernels.c", "main.c", "sample.h", "Makefile",
    "CMakeLists.txt",
)  # fmt: skip


@dataclass(frozen=True)
class Port:
    """An input or an output of the generated functions."""

    kind: str
    name: str
    argument: str
    upper: str
    type_name: str
    function: str
    tensor: NativeTensor
    element: str
    c_type: str
    format: str
    shape: str
    size: int
    width: int
    signed: int
    y_min: str
    y_max: str
    lowest: tuple[str, ...]
    highest: tuple[str, ...]
    fracs: tuple[int, ...]
    frac_name: str
    frac_linkage: str
    real_format_name: str
    real_type: str
    rounding: str
    overflow: str
    range_remark: str
    limit: str = ""
    scale: str = ""

    @property
    def rail_step(self) -> int:
        """1 where each channel has lowest and highest codes of its own, 0 where all share one entry."""
        return int(len(self.lowest) > 1)


@dataclass(frozen=True)
class ArrayText:
    """A constant array as text."""

    name: str
    c_type: str
    size: int
    lines: tuple[str, ...]
    comment: str = ""


@dataclass(frozen=True)
class Member:
    """One member of a parameter structure."""

    name: str
    text: str


@dataclass(frozen=True)
class Traced:
    """A tensor a traced build reports: its number in `Project.traced`, where it lies, its size."""

    index: int
    text: str
    bytes: int


@dataclass(frozen=True)
class CallText:
    """One call of model.c; without epilogue, ``epilogue_channels`` is 0."""

    function: str
    struct: str
    params_name: str
    fields: tuple[Member, ...]
    epilogue_channels: int
    epilogue_name: str
    shift_name: str
    width_name: str
    arguments: tuple[str, ...]
    comment: str
    traced: tuple[Traced, ...]


@dataclass(frozen=True)
class StateText:
    """A recurrent state as a member of the model's structure; ``tensor`` is what it holds."""

    field: str
    upper: str
    c_type: str
    size: int
    bytes: int
    format: str
    shape: str
    tensor: NativeTensor


@dataclass(frozen=True)
class Copy:
    """An output, or a state's next value, that is copied at the end."""

    target: str
    source: str
    bytes: int


@dataclass
class Project:
    """Everything the templates print.

    Attributes:
        network: the native steps.
        arena: where each tensor lives.
        variants: kernel variants in order of first use.
        traced: native tensors in the order in which a traced build reports them.
        states: recurrent states, kept in the model's structure; ``keeps`` are the copies that write them.
    """

    network: Network
    arena: Arena
    title: str
    prefix: str
    upper: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    variants: tuple[Variant, ...] = ()
    calls: tuple[CallText, ...] = ()
    arrays: tuple[ArrayText, ...] = ()
    copies: tuple[Copy, ...] = ()
    states: tuple[StateText, ...] = ()
    keeps: tuple[Copy, ...] = ()
    traced: list[NativeTensor] = field(default_factory=list)
    weight_bytes: int = 0
    uses_arena: bool = False

    @property
    def ports(self) -> tuple[Port, ...]:
        """Inputs, then outputs."""
        return self.inputs + self.outputs

    @property
    def arena_bytes(self) -> int:
        """Size of the arena."""
        return self.arena.size_bytes

    @property
    def arena_lower_bound_bytes(self) -> int:
        """No placement of the same buffers can be smaller."""
        return self.arena.lower_bound_bytes

    @property
    def state_bytes(self) -> int:
        """Bytes of the recurrent states, which lie in the model's structure."""
        return sum(state.bytes for state in self.states)

    @property
    def argument_names(self) -> str:
        """Arguments of the run function after the model."""
        return ", ".join(port.argument for port in self.ports)

    @property
    def sample_arguments(self) -> str:
        """The same with the built-in sample as input."""
        names = [f"sample_{port.argument}" for port in self.inputs] + [port.argument for port in self.outputs]
        return ", ".join(names)

    @property
    def emulated_arguments(self) -> str:
        """The same with the arrays the emulator fills and reads."""
        return ", ".join(f"em_io_{port.argument}" for port in self.ports)

    @property
    def parameters(self) -> str:
        """Parameters of the run function after the model."""
        parts = [f"const {port.type_name} *{port.argument}" for port in self.inputs]
        return ", ".join(parts + [f"{port.type_name} *{port.argument}" for port in self.outputs])

    def files(self, *, trace: bool = False, example: bool = True) -> dict[str, str]:
        """Text of every file by relative path.

        Args:
            trace: Report every tensor to ``em_trace`` (for the runners of this package).
            example: Include the sample and its expected codes.
        """
        context: dict[str, Any] = {"model": self, "trace": trace, "samples": ()}
        names = [name for name in _TEMPLATES if example or name not in ("main.c", "sample.h")]
        if example:
            context["samples"] = self.sample()
        found = {name: render(_PACKAGE, name, **context) for name in names}
        needed = set(_HEADERS)
        for variant in self.variants:
            needed |= {variant.file, *_INCLUDED.get(variant.file, ())}
            needed |= {"edgemat_shift_add.h"} if any(macro == "EM_DIGITS" for macro, _ in variant.macros) else set()
        folder = kernel_folder()
        for name in sorted(needed):
            found[f"kernels/{name}"] = folder.joinpath(name).read_text(encoding="utf-8")
        return found

    def harness(self, *, trace: bool = False) -> str:
        """The host runner's main file."""
        return render(_PACKAGE, "harness.c", model=self, trace=trace)

    def emulated(self, *, trace: bool = False) -> str:
        """The emulator's main file."""
        traced = sum(map(tensor_bytes, self.traced))
        return render(_PACKAGE, "emulated.c", model=self, trace=trace, trace_bytes=traced)

    def sample(self) -> tuple[ArrayText, ...]:
        """One sample of input codes and the reference's output codes."""
        codes, expected = sample_codes(self.network.graph)
        made = []
        for port in self.inputs:
            flat = port.tensor.pack(codes[port.tensor.source])[0]
            made.append(array_text(f"sample_{port.argument}", port.element, flat))
        for port in self.outputs:
            flat = port.tensor.pack(expected[port.tensor.source])[0]
            made.append(array_text(f"expected_{port.argument}", port.element, flat))
        return tuple(made)


def kernel_folder() -> Any:
    """The kernel library, as a resource of this package."""
    return resources.files("edgemat.targets.mcu").joinpath("kernels")


def array_text(name: str, element: str, values: np.ndarray, comment: str = "") -> ArrayText:
    """A constant array as lines of numbers."""
    numbers = [literal(value) for value in values.tolist()]
    lines = tuple(", ".join(numbers[at : at + 16]) + "," for at in range(0, len(numbers), 16))
    return ArrayText(name, c_type(element), len(numbers), lines, comment)


def member_text(value: int | tuple[int, ...]) -> str:
    """A member's initialiser."""
    return literal(int(value)) if not isinstance(value, tuple) else "{ " + ", ".join(map(literal, value)) + " }"
