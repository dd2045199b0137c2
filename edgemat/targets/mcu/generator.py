"""The MCU project: what each file says, and writing the folder in one go.

`project` turns a lowered graph into a `Project` (typed call objects: everything is decided and spelled here, the
templates only loop), `Project.files` renders it, `export` writes it to a temporary folder beside the target and renames
that on success. The same graph gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import edgemat
from edgemat.errors import EdgematError
from edgemat.targets.identifiers import Identifiers, identifier
from edgemat.targets.layout import Network, NativeTensor, to_native
from edgemat.targets.mcu.arena import Arena, plan_arena, tensor_bytes
from edgemat.targets.mcu.sample import sample_codes
from edgemat.targets.mcu.variants import (
    ConstantArray,
    KernelCall,
    Variant,
    array_storage,
    c_type,
    plan_calls,
    size_of,
    storage,
)

_HEADERS = (
    "edgemat_kernels.h", "edgemat_requantize.h", "edgemat_variant.h", "edgemat_variant_end.h", "edgemat_float.h"
)  # fmt: skip
_INCLUDED = {
    "conv.c": ("edgemat_window.h",),
    "conv__depthwise.c": ("edgemat_window.h",),
    "max_pool.c": ("edgemat_window.h",),
    "average_pool.c": ("edgemat_window.h",),
    "add.c": ("edgemat_binary.h",),
    "sub.c": ("edgemat_binary.h",),
    "mul.c": ("edgemat_binary.h",),
    "slice.c": ("edgemat_strided.h",),
    "transpose.c": ("edgemat_strided.h",),
}
_TEMPLATES = (
    "model.h", "model.c", "weights.h", "weights.c", "kernels.h", "kernels.c", "main.c", "sample.h", "Makefile",
    "CMakeLists.txt",
)  # fmt: skip
_LOCALS = ("model", "arena", "results", "samples", "count", "arguments", "differ", "i", "status", "values", "codes")


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
    fracs: tuple[int, ...]
    frac_name: str
    frac_linkage: str
    real_format_name: str
    real_type: str
    rounding: str
    overflow: str
    range_remark: str


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
class EpilogueText:
    """The members of an ``em_epilogue``."""

    y_min: str
    y_max: str
    channels: int


@dataclass(frozen=True)
class Traced:
    """A tensor a traced build reports: its number in `Project.traced`, where it lies, its size."""

    index: int
    text: str
    bytes: int


@dataclass(frozen=True)
class CallText:
    """One call of model.c."""

    function: str
    struct: str
    params_name: str
    fields: tuple[Member, ...]
    epilogue: EpilogueText | None
    epilogue_name: str
    shift_name: str
    arguments: tuple[str, ...]
    comment: str
    traced: tuple[Traced, ...]


@dataclass(frozen=True)
class Copy:
    """An output that is copied at the end."""

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
        context: dict[str, Any] = {"model": self, "version": edgemat.__version__, "trace": trace, "samples": ()}
        names = [name for name in _TEMPLATES if example or name not in ("main.c", "sample.h")]
        if example:
            context["samples"] = self.sample()
        found = {name: _render(name, context) for name in names}
        needed = set(_HEADERS)
        for variant in self.variants:
            needed |= {variant.file, *_INCLUDED.get(variant.file, ())}
        folder = kernel_folder()
        for name in sorted(needed):
            found[f"kernels/{name}"] = folder.joinpath(name).read_text(encoding="utf-8")
        return found

    def harness(self, *, trace: bool = False) -> str:
        """The host runner's main file."""
        return _render("harness.c", {"model": self, "version": edgemat.__version__, "trace": trace})

    def emulated(self, *, trace: bool = False) -> str:
        """The emulator's main file."""
        traced = sum(map(tensor_bytes, self.traced))
        return _render("emulated.c", {"model": self, "trace": trace, "trace_bytes": traced})

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


def _render(name: str, context: dict[str, Any]) -> str:
    return _environment().get_template(f"{name}.j2").render(context)


def _environment() -> jinja2.Environment:
    folder = resources.files("edgemat.targets.mcu").joinpath("templates")
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )


def project(graph: Any) -> Project:
    """Plan the C library of a lowered graph.

    Raises:
        UnsupportedOpError: an operator has no kernel, or a sum needs more than 64 bits.
    """
    network = to_native(graph)
    return _Planner(network, plan_arena(network)).project()


def export(graph: Any, output: Path | str) -> Path:
    """Write the C library of a lowered graph; an existing folder of that name is replaced.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`.
        output: Folder to write.

    Returns:
        The folder.

    Raises:
        EdgematError: it cannot be written; nothing is left behind.
    """
    files = project(graph).files()
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    except OSError as error:
        raise EdgematError(f"folder {output} cannot be written ({error.strerror}); choose another") from error
    try:
        write_files(files, staging)
        staging.chmod(0o755)
        _replace(staging, output)
    except OSError as error:
        raise EdgematError(
            f"folder {output} cannot be written ({error.strerror}); make room or choose another"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output


def write_files(files: dict[str, str], folder: Path) -> None:
    """Write rendered files below a folder, with Unix line ends."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")


def _replace(staging: Path, output: Path) -> None:
    if not output.exists():
        os.replace(staging, output)
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "model.h").exists()):
        raise EdgematError(f"{output} exists and is not an edgemat mcu project; choose another folder or remove it")
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    os.replace(output, old / "previous")
    try:
        os.replace(staging, output)
    except BaseException:
        os.replace(old / "previous", output)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def array_text(name: str, element: str, values: np.ndarray, comment: str = "") -> ArrayText:
    """A constant array as lines of numbers."""
    numbers = [literal(value) for value in values.tolist()]
    lines = tuple(", ".join(numbers[at : at + 16]) + "," for at in range(0, len(numbers), 16))
    return ArrayText(name, c_type(element), len(numbers), lines, comment)


def literal(value: int) -> str:
    """An integer constant of C99; the most negative one has no literal of its own."""
    return "(-9223372036854775807 - 1)" if value == -(1 << 63) else str(value)


class _Planner:
    def __init__(self, network: Network, arena: Arena) -> None:
        self.network = network
        self.arena = arena
        self.identifiers = Identifiers()
        self.arguments = Identifiers(_LOCALS)
        base = identifier(network.name or "model", "model")
        self.prefix = f"em_{base}"
        self.arrays: list[ArrayText] = []
        self.weight_bytes = 0
        self.shifts: dict[tuple[int, ...], str] = {}

    def project(self) -> Project:
        graph = self.network.graph
        inputs = self.ports("input", self.network.inputs, getattr(graph, "input_names", graph.inputs))
        outputs = self.ports("output", self.network.outputs, getattr(graph, "output_names", graph.outputs))
        made = Project(
            self.network, self.arena, f"Model {self.prefix[3:]}", self.prefix, self.prefix.upper(), inputs, outputs
        )
        self.places = made
        variants: dict[str, Variant] = {}
        calls = []
        for step in self.network.steps:
            for call in plan_calls(step):
                known = variants.setdefault(call.variant.function, call.variant)
                assert known == call.variant, f"two variants are called {known.function}"
                calls.append(self.call(call, made))
        made.variants = tuple(variants.values())
        made.calls = tuple(calls)
        made.arrays = tuple(self.arrays)
        made.weight_bytes = self.weight_bytes
        made.copies = tuple(
            Copy(made.outputs[i].argument, self.pointer(name, made, const=True), tensor_bytes(made.outputs[i].tensor))
            for name, i in self.arena.copies
        )
        texts = [text for call in made.calls for text in call.arguments] + [copy.source for copy in made.copies]
        made.uses_arena = any("arena" in text for text in texts)
        return made

    def ports(self, kind: str, tensors: Sequence[NativeTensor], names: Sequence[str]) -> tuple[Port, ...]:
        made = []
        for tensor, name in zip(tensors, names, strict=True):
            single = len(tensors) == 1
            ident = self.arguments[kind if single else f"{kind}_{identifier(name)}"]
            prefix = f"{self.prefix}_{ident}"
            fmt = tensor.format
            verb = "quantize" if kind == "input" else "dequantize"
            low, high = fmt.rails
            element = storage(fmt)
            made.append(
                Port(
                    kind=kind, name=ident, argument=ident, upper=prefix.upper(), type_name=f"{prefix}_t",
                    function=f"{self.prefix}_{verb}_{ident}", tensor=tensor, element=element, c_type=c_type(element),
                    format=str(fmt) if not fmt.per_channel else f"{fmt.width} bits, a binary point per channel",
                    shape="x".join(map(str, tensor.shape)) or "1", size=tensor.size, width=fmt.width,
                    signed=int(fmt.signed), y_min=literal(low), y_max=literal(high), fracs=fmt.fracs,
                    frac_name=f"{prefix}_frac_bits", frac_linkage="" if len(fmt.fracs) > 1 else "static ",
                    real_format_name=f"{prefix}_real", real_type="float" if fmt.width <= 24 else "double",
                    rounding=f"EM_{fmt.rounding}", overflow=f"EM_{fmt.overflow.replace('SAT_SYM', 'SAT')}",
                    range_remark=", EM_ERROR_RANGE for infinities" if fmt.overflow == "WRAP" else "",
                )
            )  # fmt: skip
        return tuple(made)

    def pointer(self, name: str, made: Project, const: bool) -> str:
        """C expression for a tensor's memory."""
        place = self.arena.places[name]
        element = c_type(storage(self.network.tensors()[name].format))
        qualifier = "const " if const else ""
        if place.kind == "arena":
            return f"({qualifier}{element} *)(void *)(arena + {place.index})"
        port = (made.inputs if place.kind == "input" else made.outputs)[place.index]
        if port.c_type == element:
            return port.argument
        return f"({qualifier}{element} *)({qualifier}void *){port.argument}"

    def array(self, array: ConstantArray, step_name: str, comment: str) -> str:
        name = f"{self.prefix}_{step_name}_{array.role}"
        self.arrays.append(array_text(name, array.element, array.values, comment))
        self.weight_bytes += array.values.size * size_of(array.element)
        return name

    def call(self, call: KernelCall, made: Project) -> CallText:
        step = call.step
        name = self.identifiers[step.name] + call.suffix
        arguments = [f"&{name}_params"]
        for position in call.operands:
            tensor = step.inputs[position]
            if tensor.values is not None:
                constant = ConstantArray(f"x{position}", storage(tensor.format), tensor.values)
                arguments.append(self.array(constant, name, "constant operand"))
            else:
                arguments.append(self.pointer(tensor.name, made, const=True))
        for array in call.arrays:
            if array is None:
                arguments.append("NULL")
            else:
                arguments.append(self.array(array, name, f"{step.stem} {array.role}"))
        epilogue, shift_name = None, ""
        if call.epilogue is not None:
            data = call.epilogue
            epilogue = EpilogueText(literal(data.y_min), literal(data.y_max), len(data.shift))
            shift_name = self.shift(data.shift, name)
        if call.takes_epilogue:
            arguments.append(f"&{name}_epilogue" if epilogue else "NULL")
        arguments.append(self.pointer(step.outputs[0].name, made, const=False))
        traced = []
        if call.suffix in ("", f"_{len(step.inputs) - 1}"):
            for tensor in step.outputs:
                traced.append(
                    Traced(len(made.traced), self.pointer(tensor.name, made, const=True), tensor_bytes(tensor))
                )
                made.traced.append(tensor)
        shapes = [tensor.shape for tensor in (*step.inputs, step.outputs[0])]
        texts = ["x".join(map(str, shape)) or "1" for shape in shapes]
        return CallText(
            call.variant.function, call.struct, f"{name}_params",
            tuple(Member(key, member_text(value)) for key, value in call.fields),
            epilogue, f"{name}_epilogue", shift_name, tuple(arguments),
            f"{name}: {', '.join(texts[:-1])} to {texts[-1]}", tuple(traced),
        )  # fmt: skip

    def shift(self, shift: tuple[int, ...], name: str) -> str:
        """The shared array of these shifts."""
        if shift not in self.shifts:
            values = np.asarray(shift, dtype=np.int64)
            assert array_storage(values) == "s8" or values.min() >= -128
            self.shifts[shift] = self.array(ConstantArray("shift", "s8", values), name, "shifts")
        return self.shifts[shift]


def member_text(value: int | tuple[int, ...]) -> str:
    """A member's initialiser."""
    return literal(int(value)) if not isinstance(value, tuple) else "{ " + ", ".join(map(literal, value)) + " }"
