"""From native steps to a design: processes, channels and config structs, everything decided.

The top function is a chain of calls. With io=stream every call is a process of a dataflow region and tensors travel in
FIFOs; with io=parallel they lie in arrays. A tensor with several readers is copied by a clone process, because a
channel of a dataflow region has one writer and one reader.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgemat.targets.hls.config import (
    BINARY,
    DOTS,
    HELD,
    POOLS,
    UNARY,
    ConfigBuilder,
    ConstantArray,
    average_divisor,
    code_type,
    common_lanes,
)
from edgemat.targets.hls.depths import fifo_depths
from edgemat.targets.hls.plan import Plan, folding
from edgemat.targets.hls.process import BeatConcat, Blocks, Channel, Lockstep, Process, Repeat, Window
from edgemat.targets.identifiers import identifier
from edgemat.targets.layout import NativeTensor, Network, Step

REGISTER_PORT_BITS = 4096
COMPLETE_ELEMENTS = 4096
_TAKEN = ("edgemat", "hls", "ap_int", "ap_uint", "main", "std", "parameters", "edgemat_region", "unix", "linux", "i386")


@dataclass
class Design:
    """A whole top function.

    Attributes:
        name: identifier of the model; the top function is ``em_<name>``.
        plan: the choices it was made with.
        network: the native steps.
        inputs: channels of the input ports, in the order of the network's inputs.
        outputs: channels of the output ports.
        processes: calls in order.
        channels: channels inside the region.
        dataflow: whether the calls run at the same time.
    """

    name: str
    plan: Plan
    network: Network
    inputs: list[Channel] = field(default_factory=list)
    outputs: list[Channel] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)
    channels: list[Channel] = field(default_factory=list)
    dataflow: bool = True

    @property
    def top(self) -> str:
        """Name of the top function."""
        return f"em_{self.name}"

    @property
    def stream(self) -> bool:
        """Whether tensors travel in FIFOs."""
        return self.plan.io == "stream"


def make_design(network: Network, plan: Plan) -> Design:
    """Decide everything an HLS project of the network says.

    Raises:
        UnsupportedOpError: an operator has no template.
        PlanError: the plan names an unknown node or a factor that does not divide.
    """
    return _Builder(network, plan).build()


class _Builder:
    def __init__(self, network: Network, plan: Plan) -> None:
        self.network = network
        self.plan = plan
        self.steps = [step for step in network.steps if step.stem != "reshape"]
        plan.check_nodes(step.name for step in self.steps)
        self.design = Design(identifier(network.name or "model", "model"), plan, network)
        self.node_names = Fresh(())
        self.names = Fresh((*_TAKEN, self.design.top))
        self.alias: dict[str, str] = {}
        self.group: dict[str, str] = {}
        self.tensors: dict[str, NativeTensor] = network.tensors()
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        for step in network.steps:
            if step.stem == "reshape":
                self.alias[step.outputs[0].name] = self.root(step.inputs[0].name)
        self.readers: dict[str, int] = {}
        for step in self.steps:
            for x in step.inputs:
                if x.values is None:
                    self.readers[self.root(x.name)] = self.readers.get(self.root(x.name), 0) + 1
        for y in network.outputs:
            self.readers[self.root(y.name)] = self.readers.get(self.root(y.name), 0) + 1
        self.waiting: dict[str, list[Channel]] = {}
        self.outputs_of: dict[str, list[int]] = {}
        for index, y in enumerate(network.outputs):
            self.outputs_of.setdefault(self.root(y.name), []).append(index)

    @property
    def stream(self) -> bool:
        return self.plan.io == "stream"

    def root(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def build(self) -> Design:
        design = self.design
        self.choose_lanes()
        design.dataflow = self.stream or not self.fully_unrolled()
        graph = self.network.graph
        input_names = getattr(graph, "input_names", None) or graph.inputs
        output_names = getattr(graph, "output_names", None) or graph.outputs
        for tensor, name in zip(self.network.inputs, input_names, strict=True):
            design.inputs.append(self.port(tensor, name, "input"))
        for tensor, name in zip(self.network.outputs, output_names, strict=True):
            design.outputs.append(self.port(tensor, name, "output"))
        for tensor, channel in zip(self.network.inputs, design.inputs, strict=True):
            self.provide(self.root(tensor.name), channel)
        for step in self.steps:
            self.step(step)
        if self.stream:
            depths = fifo_depths(design.processes)
            for channel in design.channels:
                channel.depth = depths[channel.name]
        return design

    def fully_unrolled(self) -> bool:
        """Whether one pipeline at II = 1 does everything: no maps, every multiplication its own multiplier."""
        flat = all(s.stem in (*UNARY, *BINARY, "linear", "concat", "slice") for s in self.steps)
        single = all(s.params.get("rows", 1) == 1 for s in self.steps)
        reuse = all(self.plan.node(s.name).reuse == 1 for s in self.steps)
        folded = any(n.pe or n.simd for n in self.plan.nodes.values())
        return flat and single and reuse and not folded

    # -- lanes -------------------------------------------------------------------------------------------------
    def choose_lanes(self) -> None:
        """One number of lanes per group of tensors that element-wise operators and reshapes tie together."""
        parent: dict[str, str] = {}

        def find(name: str) -> str:
            while parent.setdefault(name, name) != name:
                name = parent[name]
            return name

        for step in self.network.steps:
            tied = step.stem in ("reshape", "upsample", *UNARY) or (
                step.stem in BINARY and not step.params["broadcast"]
            )
            operands = [x for x in step.inputs if x.values is None] if tied else []
            if step.stem in BINARY and step.params["broadcast"]:
                operands = self.constant_partner(step)
            for x in operands:
                parent[find(x.name)] = find(step.outputs[0].name)
        extents: dict[str, list[int]] = {}
        widths: dict[str, int] = {}
        wanted: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            key = find(name)
            extents.setdefault(key, []).append(tensor.shape[-1] if tensor.shape else 1)
            widths[key] = max(widths.get(key, 1), tensor.format.width)
        for step in self.steps:
            lanes = self.plan.node(step.name).lanes
            if lanes is not None:
                wanted[find(step.outputs[0].name)] = lanes
        self.lanes = {
            name: common_lanes(extents[find(name)], widths[find(name)], self.plan.beat_bits, wanted.get(find(name)))
            for name in self.tensors
        }

    @staticmethod
    def constant_partner(step: Step) -> list[NativeTensor]:
        """The one variable operand that has the result's shape while the other operand is constant."""
        variable = [x for x in step.inputs if x.values is None]
        if len(variable) == 1 and variable[0].size == step.outputs[0].size:
            return variable
        return []

    # -- channels ----------------------------------------------------------------------------------------------
    def port(self, tensor: NativeTensor, name: str, kind: str) -> Channel:
        return Channel(self.names(name), tensor, code_type(tensor.format), self.lanes[tensor.name], kind)

    def channel(self, tensor: NativeTensor, name: str) -> Channel:
        made = Channel(self.names(name), tensor, code_type(tensor.format), self.lanes[tensor.name])
        self.design.channels.append(made)
        return made

    def produced(self, tensor: NativeTensor) -> Channel:
        """The channel a process writes: an output port where that is the tensor's only reader."""
        root = self.root(tensor.name)
        if self.readers.get(root, 0) == 1 and root in self.outputs_of:
            return self.design.outputs[self.outputs_of[root][0]]
        made = self.channel(tensor, tensor.name)
        return made

    def provide(self, root: str, channel: Channel) -> None:
        """Make a written channel available to the readers of its tensor."""
        count = self.readers.get(root, 0)
        ports = [self.design.outputs[i] for i in self.outputs_of.get(root, [])]
        if channel.port == "output":
            self.waiting[root] = []
            return
        if count == 1 and not ports:
            self.waiting[root] = [channel]
            return
        if count == 0:
            if self.stream:
                self.design.processes.append(
                    Process(
                        f"drain_{channel.name}", f"edgemat::drain<{channel.size}>", (channel.name,), "stream",
                        (channel,), (), Lockstep(channel.beats, 1, 0),
                    )  # fmt: skip
                )
            return
        if not self.design.dataflow and not ports:
            self.waiting[root] = [channel] * count
            return
        inner = count - len(ports)
        copies = [self.channel(channel.tensor, f"{channel.name} {k}") for k in range(inner)]
        function = "clone" if self.stream else "clone_array"
        targets = (*copies, *ports)
        self.design.processes.append(
            Process(
                f"clone_{channel.name}", f"edgemat::{function}<{channel.size}>",
                (channel.name, *(c.name for c in targets)), "stream", (channel,), targets,
                Lockstep(channel.beats, 1, len(targets)),
            )  # fmt: skip
        )
        self.waiting[root] = copies

    def take(self, tensor: NativeTensor) -> Channel:
        return self.waiting[self.root(tensor.name)].pop(0)

    # -- steps -------------------------------------------------------------------------------------------------
    def step(self, step: Step) -> None:
        name = self.node_names(step.name)
        builder = ConfigBuilder(step, name)
        constants: dict[int, ConstantArray] = {}
        sources: list[Channel | None] = []
        for i, x in enumerate(step.inputs):
            if x.values is not None:
                constants[i] = builder.array(f"x{i}", x.values)
                sources.append(None)
            else:
                sources.append(self.take(x))
        result = self.produced(step.outputs[0])
        held = self.stream and step.stem not in BINARY
        if self.stream and (held or not self.constant_partner(step)):
            for i, array in constants.items():
                sources[i] = self.load(step.inputs[i], array, f"{name} x{i}", builder)
        self.fill(builder, step)
        if self.stream:
            process = self.stream_process(step, builder, sources, constants, result)
        else:
            process = self.array_process(step, builder, sources, constants, result)
        process.traced = (result,)
        self.design.processes.append(process)
        root = self.root(step.outputs[0].name)
        self.provide(root, result)

    def load(self, tensor: NativeTensor, array: ConstantArray, name: str, builder: ConfigBuilder) -> Channel:
        """A process that streams a constant operand, once per sample."""
        lanes = self.lanes[builder.y.name] if builder.step.stem in BINARY else 1
        extent = tensor.shape[-1] if tensor.shape else 1
        lanes = common_lanes([extent], tensor.format.width, self.plan.beat_bits, lanes)
        channel = Channel(self.names(name), tensor, code_type(tensor.format), lanes)
        self.design.channels.append(channel)
        self.design.processes.append(
            Process(
                f"load_{channel.name}", f"edgemat::load<{channel.size}>", (f"parameters::{array.name}", channel.name), "stream",
                (), (channel,), Lockstep(channel.beats, 0, 1), arrays=(array,),
            )  # fmt: skip
        )
        return channel

    def fill(self, builder: ConfigBuilder, step: Step) -> None:
        """All members of the config struct but the lanes."""
        builder.element_types(step.inputs)
        builder.accumulator()
        builder.epilogue()
        p, stem = step.params, step.stem
        choice = self.plan.node(step.name)
        self.fold, self.multipliers = 1, 0
        if stem in DOTS:
            weight = step.arrays["weight"].reshape(step.arrays["weight"].shape[0], -1)
            bias = step.arrays.get("bias", np.zeros(len(weight), np.int64))
            builder.typedef("weight_t", builder.array("weight", weight).element)
            builder.typedef("bias_t", builder.array("bias", bias.reshape(-1)).element)
            pe, simd = folding(*weight.shape, choice, step.name)
            builder.constant("pe", pe)
            builder.constant("simd", simd)
            self.fold = (weight.shape[0] // pe) * (weight.shape[1] // simd)
            self.multipliers = pe * simd
            builder.parameters(p, ("has_bias", "pad_bottom", "pad_right"))
        elif stem in POOLS:
            builder.parameters(p, () if stem == "average_pool" else ("pad_bottom", "pad_right"))
            if stem == "average_pool":
                builder.constant("dilation_h", 1)
                builder.constant("dilation_w", 1)
                average_divisor(builder)
        elif stem in UNARY:
            self.unary(builder, step)
        elif stem in BINARY:
            builder.parameters(p)
            for i, x in enumerate(step.inputs):
                builder.constant(f"x{i}_size", x.size)
        elif stem == "concat":
            builder.parameters(p)
            builder.constant("total", sum(p["inner"]))
            builder.constant("y_size", builder.y.size)
        else:
            if stem == "softmax":
                builder.softmax()
            else:
                builder.parameters(p)
            for i, x in enumerate(step.inputs):
                builder.constant(f"x{i}_size", x.size)
            builder.constant("y_size", builder.y.size)
            if stem == "matmul":
                _, simd = folding(1, p["k"], choice, step.name)
                builder.constant("simd", simd)
                self.fold = p["k"] // simd
                self.multipliers = simd

    def unary(self, builder: ConfigBuilder, step: Step) -> None:
        builder.parameters(step.params, ("channels", "size", "low", "high", "x_min"))
        builder.constant("size", builder.y.size)
        for key in ("low", "high", "x_min"):
            if key in step.params:
                builder.constant(key, int(step.params[key]))
        for key, values in step.arrays.items():
            builder.look_up(key, values)
            if key == "slope":
                builder.constant("slope_count", int(values.size))

    def unroll(self, step: Step) -> int:
        """Elements per cycle of an element-wise operator on arrays."""
        y = step.outputs[0]
        if not self.design.dataflow:
            return y.size
        if len(y.shape) > 1:
            return y.shape[-1]
        reuse = self.plan.node(step.name).reuse or 1
        return common_lanes([y.size], 1, y.size, max(1, y.size // reuse))

    def array_process(
        self,
        step: Step,
        builder: ConfigBuilder,
        sources: Sequence[Channel | None],
        constants: dict[int, ConstantArray],
        result: Channel,
    ) -> Process:
        operands = [f"parameters::{constants[i].name}" if source is None else source.name for i, source in enumerate(sources)]
        if step.stem in (*UNARY, *BINARY):
            builder.constant("unroll", self.unroll(step))
        arguments: list[str] = [*operands, result.name]
        if step.stem == "concat":
            arguments = [result.name, *operands]
        if step.stem in DOTS:
            arguments += self.weights(builder)
        present = [c for c in sources if c is not None]
        pixels = self.pixels(step)
        cycles = pixels * self.fold
        if step.stem in (*UNARY, *BINARY):
            cycles = builder.y.size // self.unroll(step)
        elif step.stem in (*HELD, "concat"):
            cycles = builder.y.size
        pattern = Blocks((0,) * len(present), 0, 1, cycles)
        return self.process(step, builder, step.stem, arguments, present, result, pattern)

    def stream_process(
        self,
        step: Step,
        builder: ConfigBuilder,
        sources: Sequence[Channel | None],
        constants: dict[int, ConstantArray],
        result: Channel,
    ) -> Process:
        stem, p = step.stem, step.params
        present = [c for c in sources if c is not None]
        for i, source in enumerate(sources):
            if source is not None:
                builder.constant(f"x{i}_lanes", source.lanes)
        builder.constant("y_lanes", result.lanes)
        arguments = [*(c.name for c in present), result.name]
        function = f"{stem}_stream"
        pattern: Blocks | Lockstep | Window | BeatConcat | Repeat
        if stem == "linear":
            arguments += self.weights(builder)
            reads, writes = p["in_features"] // present[0].lanes, p["out_features"] // result.lanes
            pattern = Blocks((reads,), writes, p["rows"], self.fold)
        elif stem == "conv" or stem in POOLS:
            if stem == "conv":
                arguments += self.weights(builder)
            pattern = self.window(step, present[0], result)
        elif stem in UNARY:
            pattern = Lockstep(result.beats)
        elif stem in BINARY:
            if len(present) == 1:
                position = next(i for i, c in enumerate(sources) if c is not None)
                constant = constants[1 - position]
                function = f"{stem}_constant_stream"
                arguments = [present[0].name, f"parameters::{constant.name}", result.name]
                pattern = Lockstep(result.beats)
                return self.process(
                    step, builder, function, arguments, present, result, pattern, template=f", {position}"
                )
            if p["broadcast"]:
                function = f"{stem}_held_stream"
                builder.constant("unroll", result.lanes)
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
                arguments += self.weights(builder)
            compute = self.pixels(step) * self.fold if stem in ("conv_transpose", "matmul") else result.size
            pattern = Blocks(tuple(c.beats for c in present), result.beats, 1, compute)
        return self.process(step, builder, function, arguments, present, result, pattern)

    def process(
        self,
        step: Step,
        builder: ConfigBuilder,
        function: str,
        arguments: Sequence[str],
        sources: Sequence[Channel],
        result: Channel,
        pattern: Blocks | Lockstep | Window | BeatConcat | Repeat,
        template: str = "",
    ) -> Process:
        config = builder.build()
        macs = self.pixels(step) * self.fold * self.multipliers if step.stem in (*DOTS, "matmul") else 0
        multipliers = self.multipliers if step.stem in (*DOTS, "matmul") else 0
        if step.stem in ("mul", "affine", "prelu"):
            multipliers = result.lanes if self.stream else self.unroll(step)
            macs = builder.y.size
        return Process(
            builder.name,
            f"edgemat::{function}<parameters::{config.name}{template}>",
            tuple(arguments),
            step.stem,
            tuple(sources),
            (result,),
            pattern,
            step,
            config,
            tuple(builder.arrays.values()),
            multipliers,
            macs,
            self.buffer_bits(step, pattern) if self.stream else 0,
        )

    @staticmethod
    def weights(builder: ConfigBuilder) -> list[str]:
        return [f"parameters::{builder.arrays[key].name}" for key in ("weight", "bias")]

    def window(self, step: Step, source: Channel, result: Channel) -> Window | Blocks:
        p = step.params
        dilation_h, dilation_w = p.get("dilation_h", 1), p.get("dilation_w", 1)
        reads, writes = p["in_c"] // source.lanes, self.y_channels(step) // result.lanes
        covers = p["kernel_h"] >= p["pad_top"] + p["in_h"] and p["kernel_w"] >= p["pad_left"] + p["in_w"]
        if step.stem in POOLS and p["out_h"] * p["out_w"] == 1 and dilation_h == dilation_w == 1 and covers:
            return Blocks((reads * p["in_h"] * p["in_w"],), writes, 1, 1)
        return Window(
            p["in_h"], p["in_w"], p["out_h"], p["out_w"],
            (p["kernel_h"] - 1) * dilation_h + 1, (p["kernel_w"] - 1) * dilation_w + 1,
            p["stride_h"], p["stride_w"], p["pad_top"], p["pad_left"], reads, writes, self.fold,
        )  # fmt: skip

    @staticmethod
    def y_channels(step: Step) -> int:
        return step.params["out_c"] if "out_c" in step.params else step.params["in_c"]

    @staticmethod
    def pixels(step: Step) -> int:
        """Times the folded sum of a step runs per sample."""
        p = step.params
        if step.stem == "matmul":
            return p["batch"] * p["m"] * p["n"]
        return p["out_h"] * p["out_w"] if "out_h" in p else p.get("rows", 1)

    @staticmethod
    def buffer_bits(step: Step, pattern: Blocks | Lockstep | Window | BeatConcat | Repeat) -> int:
        """Bits of line buffers, or of the samples a process holds."""
        p = step.params
        if isinstance(pattern, Window):
            lines = (pattern.extent_h - 1) * pattern.in_w + pattern.extent_h * pattern.extent_w
            return lines * p["in_c"] * step.inputs[0].format.width
        if isinstance(pattern, Repeat):
            return p["in_w"] * p["in_c"] * step.inputs[0].format.width
        if isinstance(pattern, Blocks):
            tensors = [*step.inputs, *step.outputs]
            return sum(t.size * t.format.width for t in tensors) // pattern.repeat
        return 0


class Fresh:
    """Gives out identifiers that were not given out before.

    Args:
        taken: identifiers that must not be given out.
    """

    def __init__(self, taken: Iterable[str]) -> None:
        self.taken = set(taken)

    def __call__(self, name: str) -> str:
        base = identifier(name)
        text, count = base, 1
        while text in self.taken:
            count += 1
            text = f"{base}_{count}"
        self.taken.add(text)
        return text
