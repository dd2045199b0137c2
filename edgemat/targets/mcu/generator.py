"""From a lowered graph to the folder of its C library.

`project` decides everything (typed call objects; the templates only loop), `export` writes the files to a temporary
folder beside the target and renames that on success. The same graph gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgemat.errors import UnsupportedOpError
from edgemat.targets.destination import write_project
from edgemat.targets.identifiers import Identifiers, identifier
from edgemat.targets.layout import NativeTensor, Network, to_native
from edgemat.targets.mcu.arena import Arena, plan_arena, tensor_bytes
from edgemat.targets.mcu.library import (
    ArrayText,
    CallText,
    Copy,
    Member,
    Port,
    Project,
    StateText,
    Traced,
    array_text,
    member_text,
)
from edgemat.targets.mcu.storage import ConstantArray, c_type, literal, size_of, storage
from edgemat.targets.mcu.ternary import state_packing
from edgemat.targets.mcu.variants import KERNELS, KernelCall, Variant, plan_calls
from edgemat.targets.scales import scale_literal

_LOCALS = ("model", "arena", "results", "samples", "count", "arguments", "differ", "i", "status", "values", "codes")


PRODUCTS = ("shift_add", "compiler")


def project(graph: Any, products: str = "shift_add", ternary_packing: str = "auto") -> Project:
    """Plan the C library of a lowered graph.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`.
        products: How K-hot weights multiply: by shifts and additions, or (``"compiler"``) by ``*`` like all others,
            which is faster on a core with a multiplier. The integers are the same.
        ternary_packing: Bits a ternary weight takes in flash: ``"2"``, ``"1.6"``, or the faster one (``"auto"``).

    Raises:
        UnsupportedOpError: an operator has no kernel, a sum needs more than 64 bits, or an option is unknown.
    """
    if products not in PRODUCTS:
        raise UnsupportedOpError(f"products is {products!r}, expected one of {', '.join(PRODUCTS)}")
    network = state_packing(to_native(graph), ternary_packing)
    if products == "compiler":
        plain = ({key: value for key, value in step.params.items() if key != "khot"} for step in network.steps)
        steps = tuple(replace(step, params=params) for step, params in zip(network.steps, plain, strict=True))
        network = replace(network, steps=steps)
    return _Planner(network, plan_arena(network)).project()


def export(graph: Any, output: Path | str, products: str = "shift_add", ternary_packing: str = "auto") -> Path:
    """Write the C library of a lowered graph; an existing folder of that name is replaced.

    Args:
        graph: A `Graph` of `edgemat.lower.reader`.
        output: Folder to write.
        products: How K-hot weights multiply (`project`).
        ternary_packing: Bits a ternary weight takes in flash (`project`).

    Returns:
        The folder.

    Raises:
        EdgematError: it cannot be written; nothing is left behind.
    """
    return write_project(project(graph, products, ternary_packing).files(), Path(output), "mcu", "model.h")


def _is_index(kind: str, tensor: NativeTensor) -> bool:
    """Whether an input is an index: its largest code is stated and lies below its format's."""
    return kind == "input" and (tensor.lo, tensor.hi) != tensor.format.rails


def _range_remark(tensor: NativeTensor, index: bool) -> str:
    if index:
        return f", EM_ERROR_RANGE for an index beyond {tensor.hi}"
    return ", EM_ERROR_RANGE for infinities" if tensor.format.overflow == "WRAP" else ""


class _Planner:
    def __init__(self, network: Network, arena: Arena) -> None:
        self.network = network
        self.arena = arena
        self.identifiers = Identifiers()
        self.arguments = Identifiers(_LOCALS)
        self.prefix = f"em_{model_identifier(network.name)}"
        self.arrays: list[ArrayText] = []
        self.weight_bytes = 0
        self.shifts: dict[tuple[int, ...], str] = {}
        self.widths: dict[tuple[int, ...], str] = {}

    def project(self) -> Project:
        graph = self.network.graph
        inputs = self.ports("input", self.network.inputs, getattr(graph, "input_names", graph.inputs))
        outputs = self.ports("output", self.network.outputs, getattr(graph, "output_names", graph.outputs))
        made = Project(
            self.network, self.arena, f"Model {self.prefix[3:]}", self.prefix, self.prefix.upper(), inputs, outputs
        )
        self.places = made
        made.states = self.states()
        variants: dict[str, Variant] = {}
        calls = []
        for number, step in enumerate(self.network.steps):
            for call in plan_calls(step):
                known = variants.setdefault(call.variant.function, call.variant)
                assert known == call.variant, f"two variants are called {known.function}"
                calls.append(self.call(call, made, number))
        made.variants = tuple(variants.values())
        made.calls = tuple(calls)
        made.arrays = tuple(self.arrays)
        made.weight_bytes = self.weight_bytes
        made.copies = tuple(
            Copy(made.outputs[i].argument, self.pointer(name, made, const=True), tensor_bytes(made.outputs[i].tensor))
            for name, i in self.arena.copies
        )
        made.keeps = tuple(
            Copy(f"model->{text.field}", self.pointer(state.written.name, made, const=True), text.bytes)
            for text, state in zip(made.states, self.network.states, strict=True)
        )
        texts = [text for call in made.calls for text in call.arguments]
        texts += [copy.source for copy in (*made.copies, *made.keeps)]
        made.uses_arena = any("arena" in text for text in texts)
        return made

    def ports(self, kind: str, tensors: Sequence[NativeTensor], names: Sequence[str]) -> tuple[Port, ...]:
        made, own = [], Identifiers()  # names may differ only behind what an identifier keeps of them
        for tensor, name in zip(tensors, names, strict=True):
            single = len(tensors) == 1
            ident = self.arguments[kind if single else f"{kind}_{own[name]}"]
            prefix = f"{self.prefix}_{ident}"
            fmt = tensor.format
            verb = "quantize" if kind == "input" else "dequantize"
            low, high = fmt.rails
            lowest, highest = (tuple(map(literal, rail.tolist())) for rail in fmt.channel_rails())
            scale = scale_literal(self.network.graph, name)
            if scale:
                low, high = tensor.lo, tensor.hi
                lowest, highest = (literal(low),), (literal(high),)
            index = not scale and _is_index(kind, tensor)
            element = storage(fmt)
            made.append(
                Port(
                    kind=kind, name=ident, argument=ident, upper=prefix.upper(), type_name=f"{prefix}_t",
                    function=f"{self.prefix}_{verb}_{ident}", tensor=tensor, element=element, c_type=c_type(element),
                    format=str(fmt) if not fmt.per_channel else f"{fmt.width} bits, a binary point per channel",
                    shape="x".join(map(str, tensor.shape)) or "1", size=tensor.size, width=fmt.width,
                    signed=int(fmt.signed), y_min=literal(low), y_max=literal(high), lowest=lowest, highest=highest,
                    fracs=fmt.fracs,
                    frac_name=f"{prefix}_frac_bits", frac_linkage="" if len(fmt.fracs) > 1 else "static ",
                    real_format_name=f"{prefix}_real", real_type="float" if scale or fmt.width <= 24 else "double",
                    rounding=f"EM_{fmt.rounding}", overflow=f"EM_{fmt.overflow.replace('SAT_SYM', 'SAT')}",
                    range_remark=_range_remark(tensor, index), limit=literal(tensor.hi) if index else "",
                    scale=scale,
                )
            )  # fmt: skip
        return tuple(made)

    def states(self) -> tuple[StateText, ...]:
        """The members of the model's structure that hold its recurrent states."""
        fields = Identifiers()
        made = []
        for state in self.network.states:
            tensor, field = state.held, f"state_{fields[state.name]}"
            fmt = str(tensor.format) if not tensor.format.per_channel else f"{tensor.format.width} bits by channel"
            shape = "x".join(map(str, tensor.shape))
            made.append(
                StateText(
                    field, f"{self.prefix}_{field}".upper(), c_type(storage(tensor.format)), tensor.size,
                    tensor_bytes(tensor), fmt, shape, tensor,
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
        if place.kind == "state":
            return f"model->{made.states[place.index].field}"
        port = (made.inputs if place.kind == "input" else made.outputs)[place.index]
        if port.c_type == element:
            return port.argument
        return f"({qualifier}{element} *)({qualifier}void *){port.argument}"

    def array(self, array: ConstantArray, step_name: str, comment: str) -> str:
        name = f"{step_name}_{array.role}"
        self.arrays.append(array_text(name, array.element, array.values, comment))
        self.weight_bytes += array.values.size * size_of(array.element)
        return name

    def call(self, call: KernelCall, made: Project, number: int) -> CallText:
        step = call.step
        name = f"{self.prefix}_{self.identifiers[f'{step.name} {call.suffix}' if call.suffix else step.name]}"
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
        shift_name = self.shift(call.shift, name) if call.shift else ""
        width_name = self.width(call.widths, name) if call.widths else ""
        if call.takes_epilogue:
            arguments.append(f"&{name}_epilogue" if call.shift or call.widths else "NULL")
        arguments.append(self.pointer(step.outputs[0].name, made, const=False))
        if call.scratch_bytes:
            arguments.append(f"arena + {self.arena.scratch[number]}")
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
            max(len(call.shift), len(call.widths)), f"{name}_epilogue", shift_name, width_name, tuple(arguments),
            f"{name[len(self.prefix) + 1 :]}: {', '.join(texts[:-1])} to {texts[-1]}", tuple(traced),
        )  # fmt: skip

    def shift(self, shift: tuple[int, ...], name: str) -> str:
        """The shared array of these shifts."""
        if shift not in self.shifts:
            values = np.asarray(shift, dtype=np.int64)
            self.shifts[shift] = self.array(ConstantArray("shift", "s8", values), name, "shifts")
        return self.shifts[shift]

    def width(self, widths: tuple[int, ...], name: str) -> str:
        """The shared array of these widths of channels."""
        if widths not in self.widths:
            values = np.asarray(widths, dtype=np.int64)
            self.widths[widths] = self.array(ConstantArray("width", "u8", values), name, "bits of the channels' codes")
        return self.widths[widths]


def model_identifier(name: str) -> str:
    """The model's name as an identifier; ``em_<it>`` and ``em_<it>_...`` collide with no name of the kernel library."""
    base = identifier(name or "model", "model")
    words = {*KERNELS, "status", "epilogue", "real_format", "span", "binary", "pool", "strided", "quantize"}
    words |= {"dequantize", "round", "overflow", "shift_left", "widen", "divide", "taps", "trace", "signs"}
    return f"net_{base}" if any(base == word or base.startswith(f"{word}_") for word in words) else base
