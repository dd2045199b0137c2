"""One step of the network as one call of the top function: its config struct, its arguments, its loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgemat.targets.hls.config import (
    BINARY,
    DOTS,
    HELD,
    POOLS,
    ROWS,
    UNARY,
    ConfigBuilder,
    ConstantArray,
    average_divisor,
    common_lanes,
)
from edgemat.targets.hls.digits import COMPILER_KHOT, shift_adds, store_digits
from edgemat.targets.hls.plan import Plan, PlanError, folding
from edgemat.targets.hls.process import BeatConcat, Blocks, Channel, Lockstep, Pattern, Process, Repeat, Window
from edgemat.targets.hls.ternary import TernaryUnit
from edgemat.targets.layout import Step


class CallMaker:
    """Makes the process of one step.

    Args:
        plan: choices of the project.
        step: the step.
        name: its identifier.
        dataflow: whether the calls of the top function run at the same time.
    """

    def __init__(self, plan: Plan, step: Step, name: str, dataflow: bool) -> None:
        self.step = step
        self.choice = plan.node(step.name)
        self.stream = plan.io == "stream"
        self.dataflow = dataflow
        self.builder = ConfigBuilder(step, name)
        self.fold, self.multipliers = 1, 0
        self.compiled = plan.products == "compiler"
        self.shift_adds = 0
        self.unit: TernaryUnit | None = None
        if step.params.get("ternary"):
            self.unit = TernaryUnit(plan, step)
        elif self.choice.weights or self.choice.packing:
            raise PlanError(
                f"the plan states weights or packing of node {step.name!r}, whose weights are not ternary; leave them "
                "out or give it weights of fixed<2,...,SAT_SYM>"
            )

    def make(self, sources: Sequence[Channel | None], constants: dict[int, ConstantArray], result: Channel) -> Process:
        """The process that carries out the step.

        Args:
            sources: channel of each operand; None for a constant array that the call reads itself.
            constants: constant operands by position.
            result: the channel it writes.
        """
        self.fill()
        made = (self.stream_process if self.stream else self.array_process)(sources, constants, result)
        made.traced = (result,)
        return made

    def fill(self) -> None:
        """All members of the config struct but the lanes."""
        self.builder.element_types(self.step.inputs)
        self.builder.accumulator()
        self.builder.epilogue()
        p, stem = self.step.params, self.step.stem
        if stem in DOTS:
            weight = self.step.arrays["weight"].reshape(self.step.arrays["weight"].shape[0], -1)
            bias = self.step.arrays.get("bias", np.zeros(len(weight), np.int64))
            if self.unit is None:
                self.dense(weight)
            else:
                self.unit.fill(self.builder)
                self.fold = self.unit.cycles
            self.builder.typedef("bias_t", self.builder.array("bias", bias.reshape(-1)).element)
            self.builder.parameters(p, ("has_bias", "pad_bottom", "pad_right", "bipolar", "ternary", "khot"))
        elif stem in POOLS:
            self.builder.parameters(p, () if stem == "average_pool" else ("pad_bottom", "pad_right"))
            if stem == "average_pool":
                self.builder.constant("dilation_h", 1)
                self.builder.constant("dilation_w", 1)
                average_divisor(self.builder)
        elif stem == "thresholds":
            self.builder.thresholds()
            self.builder.constant("size", self.builder.y.size)
        elif stem in UNARY:
            self.unary()
        elif stem in BINARY:
            self.builder.parameters(p)
            for i, x in enumerate(self.step.inputs):
                self.builder.constant(f"x{i}_size", x.size)
        elif stem == "concat":
            self.builder.parameters(p)
            self.builder.constant("total", sum(p["inner"]))
            self.builder.constant("y_size", self.builder.y.size)
        else:
            if stem == "softmax":
                self.builder.softmax()
            elif stem in ROWS:
                self.builder.rows()
            else:
                self.builder.parameters(p)
            if stem == "embedding":
                self.builder.look_up("table", self.step.arrays["table"])
            for i, x in enumerate(self.step.inputs):
                self.builder.constant(f"x{i}_size", x.size)
            self.builder.constant("y_size", self.builder.y.size)
            if stem == "matmul":
                _, simd = folding(1, p["k"], self.choice, self.step.name)
                self.builder.constant("simd", simd)
                self.fold = p["k"] // simd
                self.multipliers = simd

    def dense(self, weight: np.ndarray) -> None:
        """Weights in an array of codes, signs or digits, `pe` rows of `simd` of them a cycle."""
        weight = self.product(weight)
        self.builder.typedef("weight_t", self.builder.array("weight", weight).element)
        outputs, depth = weight.shape
        pe, simd = folding(outputs, depth, self.choice, self.step.name)
        self.builder.constant("pe", pe)
        self.builder.constant("simd", simd)
        self.fold = (outputs // pe) * (depth // simd)
        self.multipliers = 0 if self.step.params.get("bipolar") or self.khot else pe * simd

    def product(self, weight: np.ndarray) -> np.ndarray:
        """States how products are formed; returns the weights as they are stored for that (signs: 1 for -1)."""
        p = self.step.params
        signs = bool(p.get("bipolar"))
        both = signs and self.step.inputs[0].format.bipolar
        if self.khot and not signs:
            outputs, depth = weight.shape
            pe, simd = folding(outputs, depth, self.choice, self.step.name)
            constant = pe * simd == weight.size
            if not (self.compiled and constant and self.khot <= COMPILER_KHOT):
                self.shift_adds = self.pixels() * shift_adds(weight, self.khot, constant)
                return self.digits("weight", weight, constant)
        self.builder.named("product", "COUNT_SIGNS" if both else "ADD_SIGNED" if signs else "MULTIPLY")
        if both:
            self.builder.constant("padded", any(p.get(f"pad_{side}") for side in ("top", "left", "bottom", "right")))
        return (weight < 0).astype(np.int64) if signs else weight

    @property
    def khot(self) -> int:
        """Largest number of digits of the step's constants, or 0 where they are any codes."""
        return int(self.step.params.get("khot", 0))

    def digits(self, key: str, codes: np.ndarray, constant: bool) -> np.ndarray:
        """States products by shifts and additions; returns the constants as they are stored for that."""
        made = store_digits(codes, self.khot, constant)
        self.builder.named("product", "SHIFT_ADD")
        self.builder.constant("digit_count", made.packed.count)
        self.builder.constant("digit_bits", made.packed.field_bits)
        self.builder.constant("digit_none", made.packed.none)
        if made.table is None:
            self.builder.accessor("int", "digits(int i)", "return i;")
        else:
            array = self.builder.array(f"{key}_digits", made.table)
            self.builder.accessor("int", "digits(int i)", f"return {array.name}[i];")
        return made.stored

    def unary(self) -> None:
        self.builder.parameters(self.step.params, ("channels", "size", "low", "high", "x_min", "khot"))
        self.builder.constant("size", self.builder.y.size)
        for key in ("low", "high", "x_min"):
            if key in self.step.params:
                self.builder.constant(key, int(self.step.params[key]))
        for key, values in self.step.arrays.items():
            if key in ("scale", "slope"):
                values = self.factors(key, values)
            self.builder.look_up(key, values)
            if key == "slope":
                self.builder.constant("slope_count", int(values.size))

    def factors(self, key: str, values: np.ndarray) -> np.ndarray:
        """Scales or slopes as they are stored, and how they multiply."""
        constant = not self.dataflow
        if not self.khot or (self.compiled and constant and self.khot <= COMPILER_KHOT):
            self.builder.named("product", "MULTIPLY")
            return values
        uses = self.builder.y.size // values.size
        self.shift_adds = uses * shift_adds(values, self.khot, constant)
        return self.digits(key, values, True)

    def unroll(self) -> int:
        """Elements per cycle of an element-wise operator on arrays."""
        y = self.step.outputs[0]
        if not self.dataflow:
            return y.size
        if len(y.shape) > 1:
            return y.shape[-1]
        reuse = self.choice.reuse or 1
        return common_lanes([y.size], 1, y.size, max(1, y.size // reuse))

    def array_process(
        self,
        sources: Sequence[Channel | None],
        constants: dict[int, ConstantArray],
        result: Channel,
    ) -> Process:
        operands = [
            f"parameters::{constants[i].name}" if source is None else source.name for i, source in enumerate(sources)
        ]
        if self.step.stem in (*UNARY, *BINARY):
            self.builder.constant("unroll", self.unroll())
        arguments: list[str] = [*operands, result.name]
        if self.step.stem == "concat":
            arguments = [result.name, *operands]
        if self.step.stem in DOTS:
            arguments += self.weights()
        present = [c for c in sources if c is not None]
        pixels = self.pixels()
        cycles = pixels * self.fold
        if self.step.stem in (*UNARY, *BINARY):
            cycles = self.builder.y.size // self.unroll()
        elif self.step.stem in (*HELD, "concat"):
            cycles = self.builder.y.size
        pattern = Blocks((0,) * len(present), 0, 1, cycles)
        return self.process(self.function, arguments, present, result, pattern)

    @property
    def function(self) -> str:
        """The template that carries out the step on arrays."""
        return self.step.stem if self.unit is None else f"{self.step.stem}_ternary"

    def stream_process(
        self,
        sources: Sequence[Channel | None],
        constants: dict[int, ConstantArray],
        result: Channel,
    ) -> Process:
        stem, p = self.step.stem, self.step.params
        present = [c for c in sources if c is not None]
        for i, source in enumerate(sources):
            if source is not None:
                self.builder.constant(f"x{i}_lanes", source.lanes)
        self.builder.constant("y_lanes", result.lanes)
        arguments = [*(c.name for c in present), result.name]
        function = f"{self.function}_stream"
        pattern: Pattern
        if stem == "linear":
            arguments += self.weights()
            reads, writes = p["in_features"] // present[0].lanes, p["out_features"] // result.lanes
            pattern = Blocks((reads,), writes, p["rows"], self.fold)
        elif stem == "conv" or stem in POOLS:
            if stem == "conv":
                arguments += self.weights()
            pattern = self.window(present[0], result)
        elif stem in UNARY:
            pattern = Lockstep(result.beats)
        elif stem in BINARY:
            if len(present) == 1:
                position = next(i for i, c in enumerate(sources) if c is not None)
                constant = constants[1 - position]
                function = f"{stem}_constant_stream"
                arguments = [present[0].name, f"parameters::{constant.name}", result.name]
                pattern = Lockstep(result.beats)
                return self.process(function, arguments, present, result, pattern, template=f", {position}")
            if p["broadcast"]:
                function = f"{stem}_held_stream"
                self.builder.constant("unroll", result.lanes)
                pattern = Blocks((present[0].beats, present[1].beats), result.beats, 1, result.beats)
            else:
                pattern = Lockstep(result.beats, 2)
        elif stem == "concat":
            arguments = [result.name, *(c.name for c in present)]
            inner = tuple(n // c.lanes for n, c in zip(p["inner"], present, strict=True))
            if all(c.lanes == result.lanes for c in present):
                function = "concat_beats_stream"
                pattern = BeatConcat(inner, p["outer"])
            else:
                pattern = Blocks(inner, sum(p["inner"]) // result.lanes, p["outer"], 1)
        elif stem == "upsample":
            pattern = Repeat(p["in_h"], p["in_w"], p["in_c"] // result.lanes, p["scale_h"], p["scale_w"])
        else:
            if stem == "conv_transpose":
                arguments += self.weights()
            compute = self.pixels() * self.fold if stem in ("conv_transpose", "matmul") else result.size
            pattern = Blocks(tuple(c.beats for c in present), result.beats, 1, compute)
        return self.process(function, arguments, present, result, pattern)

    def process(
        self,
        function: str,
        arguments: Sequence[str],
        sources: Sequence[Channel],
        result: Channel,
        pattern: Pattern,
        template: str = "",
    ) -> Process:
        config = self.builder.build()
        macs = self.pixels() * self.fold * self.multipliers if self.step.stem in (*DOTS, "matmul") else 0
        multipliers = self.multipliers if self.step.stem in (*DOTS, "matmul") else 0
        if self.step.stem in ("mul", "affine", "prelu"):
            multipliers = 0 if self.khot else result.lanes if self.stream else self.unroll()
            macs = 0 if self.khot else self.builder.y.size
        held = self.buffer_bits(pattern) if self.stream else 0
        ternary: dict[str, Any] = {}
        if self.unit is not None:
            template = f", edgemat::{self.unit.name}"
            memory = self.unit.memory
            adders, luts = self.unit.adders(self.builder.acc_width)
            ternary = {"memory": memory, "adders": adders, "adder_luts": luts}
            if memory is not None and self.unit.storage == "uram":
                held += 8 * memory.contents.size
            elif memory is not None:
                ternary["memory_bytes"] = self.pixels() * memory.contents.size
        return Process(
            self.builder.name,
            f"edgemat::{function}<parameters::{config.name}{template}>",
            tuple(arguments),
            self.function if self.step.stem in DOTS else self.step.stem,
            tuple(sources),
            (result,),
            pattern,
            self.step,
            config,
            tuple(self.builder.arrays.values()),
            multipliers,
            macs,
            held,
            shift_adds=self.shift_adds,
            **ternary,
        )

    def weights(self) -> list[str]:
        arrays = self.builder.arrays
        found = [f"parameters::{arrays[key].name}" for key in ("weight", "bias") if key in arrays]
        return found if self.unit is None or self.unit.memory is None else [self.unit.memory.name, *found]

    def window(self, source: Channel, result: Channel) -> Window | Blocks:
        p = self.step.params
        dilation_h, dilation_w = p.get("dilation_h", 1), p.get("dilation_w", 1)
        reads, writes = p["in_c"] // source.lanes, self.y_channels() // result.lanes
        covers = p["kernel_h"] >= p["pad_top"] + p["in_h"] and p["kernel_w"] >= p["pad_left"] + p["in_w"]
        if self.step.stem in POOLS and p["out_h"] * p["out_w"] == 1 and dilation_h == dilation_w == 1 and covers:
            return Blocks((reads * p["in_h"] * p["in_w"],), writes, 1, 1)
        return Window(
            p["in_h"],
            p["in_w"],
            p["out_h"],
            p["out_w"],
            (p["kernel_h"] - 1) * dilation_h + 1,
            (p["kernel_w"] - 1) * dilation_w + 1,
            p["stride_h"],
            p["stride_w"],
            p["pad_top"],
            p["pad_left"],
            reads,
            writes,
            self.fold,
        )

    def y_channels(self) -> int:
        return self.step.params["out_c"] if "out_c" in self.step.params else self.step.params["in_c"]

    def pixels(self) -> int:
        """Times the folded sum of a self.step runs per sample."""
        p = self.step.params
        if self.step.stem == "matmul":
            return p["batch"] * p["m"] * p["n"]
        return p["out_h"] * p["out_w"] if "out_h" in p else p.get("rows", 1)

    def buffer_bits(self, pattern: Pattern) -> int:
        """Bits of line buffers, or of the samples a process holds."""
        p = self.step.params
        if isinstance(pattern, Window):
            lines = (pattern.extent_h - 1) * pattern.in_w + pattern.extent_h * pattern.extent_w
            return lines * p["in_c"] * self.step.inputs[0].format.storage_width
        if isinstance(pattern, Repeat):
            return p["in_w"] * p["in_c"] * self.step.inputs[0].format.storage_width
        if isinstance(pattern, Blocks):
            tensors = [*self.step.inputs, *self.step.outputs]
            return sum(t.size * t.format.storage_width for t in tensors) // pattern.repeat
        return 0
