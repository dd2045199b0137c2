"""From native steps to a design: processes, channels and config structs, everything decided.

The top function is a chain of calls. With io=stream every call is a process of a dataflow region and tensors travel in
FIFOs; with io=parallel they lie in arrays. A tensor with several readers is copied by a clone process, because a
channel of a dataflow region has one writer and one reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from edgemat.op import Bounds, Epilogue
from edgemat.targets.hls.calls import CallMaker
from edgemat.targets.hls.config import BINARY, UNARY, ConstantArray, code_type, common_lanes, constant_array
from edgemat.targets.hls.depths import fifo_depths
from edgemat.targets.hls.plan import Plan
from edgemat.targets.hls.process import Channel, Lockstep, Process
from edgemat.targets.hls.ternary import Memory
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
        states: for each recurrent state the array a step reads and the one it writes.
        processes: calls in order.
        channels: channels inside the region.
        dataflow: whether the calls run at the same time.
    """

    name: str
    plan: Plan
    network: Network
    inputs: list[Channel] = field(default_factory=list)
    outputs: list[Channel] = field(default_factory=list)
    states: list[tuple[Channel, Channel]] = field(default_factory=list)
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

    @property
    def memories(self) -> list[Memory]:
        """External memories, in the order of the calls that read them."""
        return [process.memory for process in self.processes if process.memory is not None]


def make_design(network: Network, plan: Plan) -> Design:
    """Decide everything an HLS project of the network says.

    Raises:
        UnsupportedOpError: an operator has no template.
        PlanError: the plan names an unknown node or a factor that does not divide.
    """
    return _Builder(network, plan).build()


class Taken(Epilogue):
    """An epilogue that takes the bits of each channel's width as they are: codes that fit already."""

    __slots__ = ()

    @property
    def overflow(self) -> str:
        """No saturation."""
        return "WRAP"


class _Builder:
    def __init__(self, network: Network, plan: Plan) -> None:
        self.network = network
        self.plan = plan
        self.steps = [step for step in network.steps if step.stem != "reshape"]
        plan.check_nodes(step.name for step in self.steps)
        plan.check_ternary(network.name or "the model", any(step.params.get("ternary") for step in self.steps))
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
        leaving = [*network.outputs, *(state.written for state in network.states)]
        for y in leaving:
            self.readers[self.root(y.name)] = self.readers.get(self.root(y.name), 0) + 1
        self.waiting: dict[str, list[Channel]] = {}
        self.outputs_of: dict[str, list[int]] = {}
        for index, y in enumerate(leaving):
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
        for state in self.network.states:
            read = self.port(state.read, f"state {state.name}", "input")
            design.states.append((read, self.port(state.written, f"next {state.name}", "output")))
        # What the region writes: the port itself, or a channel that a last process hands on.
        self.results = list(design.outputs)
        self.leaving: list[tuple[Channel, Channel]] = []
        if self.adapted:
            self.results = [self.channel(channel.tensor, channel.tensor.name) for channel in design.outputs]
            self.leaving = list(zip(self.results, design.outputs, strict=True))
        for _, written in design.states:
            inner = self.channel(written.tensor, f"{written.name} beats") if self.stream else written
            self.results.append(inner)
        for tensor, channel in zip(self.network.inputs, design.inputs, strict=True):
            narrow = not design.dataflow and tensor.format.widths is not None
            self.provide(self.root(tensor.name), self.narrow(channel) if narrow else self.enter(channel))
        for state, (channel, _) in zip(self.network.states, design.states, strict=True):
            narrow = not design.dataflow and state.read.format.widths is not None
            entered = self.enter_memory(channel) if self.stream else self.narrow(channel) if narrow else channel
            self.provide(self.root(state.read.name), entered)
        for step in self.steps:
            self.step(step)
        for inner, channel in self.leaving:
            self.leave(inner, channel)
        for (_, written), inner in zip(design.states, self.results[len(design.outputs) :], strict=True):
            if self.stream:
                self.leave_memory(inner, written)
        if self.stream:
            depths = fifo_depths(design.processes)
            for channel in design.channels:
                channel.depth = depths[channel.name]
            for process in design.processes:
                if len(process.outputs) > 1:
                    deepest_first(process)
        return design

    def fully_unrolled(self) -> bool:
        """Whether one pipeline at II = 1 does everything: no maps, every multiplication its own multiplier."""
        flat = all(s.stem in (*UNARY, *BINARY, "linear", "concat", "slice") for s in self.steps)
        single = all(s.params.get("rows", 1) == 1 for s in self.steps)
        reuse = all(self.plan.node(s.name).reuse == 1 for s in self.steps)
        folded = any(n.pe or n.simd for n in self.plan.nodes.values())
        packed = any(s.params.get("ternary") and self.plan.storage(s.name)[0] != "auto" for s in self.steps)
        return flat and single and reuse and not folded and not packed

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
                operands = constant_partner(step)
            for x in operands:
                parent[find(x.name)] = find(step.outputs[0].name)
        extents: dict[str, list[int]] = {}
        widths: dict[str, int] = {}
        wanted: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            key = find(name)
            extents.setdefault(key, []).append(tensor.shape[-1] if tensor.shape else 1)
            widths[key] = max(widths.get(key, 1), tensor.format.storage_width)
        for step in self.steps:
            lanes = self.plan.node(step.name).lanes
            if lanes is not None:
                wanted[find(step.outputs[0].name)] = lanes
        self.lanes = {
            name: common_lanes(extents[find(name)], widths[find(name)], self.plan.beat_bits, wanted.get(find(name)))
            for name in self.tensors
        }

    # -- channels ----------------------------------------------------------------------------------------------
    def port(self, tensor: NativeTensor, name: str, kind: str) -> Channel:
        return Channel(self.names(name), tensor, code_type(tensor.format), self.lanes[tensor.name], kind)

    def channel(self, tensor: NativeTensor, name: str) -> Channel:
        made = Channel(self.names(name), tensor, code_type(tensor.format), self.lanes[tensor.name])
        self.design.channels.append(made)
        return made

    @property
    def adapted(self) -> bool:
        """Whether ports are no plain streams, so that a process stands between each port and the region."""
        return self.stream and self.plan.port_kind != "axis"

    def enter(self, port: Channel) -> Channel:
        """The channel behind an input port."""
        if not self.adapted:
            return port
        return self.enter_memory(port, self.plan.port_kind == "memory")

    def enter_memory(self, port: Channel, memory: bool = True) -> Channel:
        """The channel behind an array, or behind a port of words that a process takes apart."""
        inner = self.channel(port.tensor, port.tensor.name)
        function = "load" if memory else "unpack"
        self.design.processes.append(
            Process(
                f"{function}_{port.name}",
                f"edgemat::{function}<{port.size}>",
                (port.name, inner.name),
                "stream" if memory else "axis",
                (port,),
                (inner,),
                Lockstep(port.beats),
            )
        )
        return inner

    def leave(self, inner: Channel, port: Channel) -> None:
        """The last process in front of an output port."""
        self.leave_memory(inner, port, self.plan.port_kind == "memory")

    def leave_memory(self, inner: Channel, port: Channel, memory: bool = True) -> None:
        """The last process in front of an array, or of a port of words that it puts together."""
        function = "store" if memory else "pack"
        self.design.processes.append(
            Process(
                f"{function}_{port.name}",
                f"edgemat::{function}<{port.size}>",
                (inner.name, port.name),
                "stream" if memory else "axis",
                (inner,),
                (port,),
                Lockstep(port.beats),
            )
        )

    def narrow(self, port: Channel) -> Channel:
        """An input port whose channels are narrower than its elements, told to the synthesiser: wires only."""
        tensor = port.tensor
        inner = self.channel(tensor, f"{tensor.name} narrow")
        ends = (tensor.lo, tensor.hi)
        step = Step(
            "requantize", f"{tensor.name} narrow", (tensor,), (tensor,), {"size": tensor.size}, {},
            Taken((0,), tensor.format), Bounds(ends, ends), tensor.name,
        )  # fmt: skip
        process = CallMaker(self.plan, step, self.node_names(step.name), False).make([port], {}, inner)
        process.traced = ()
        self.design.processes.append(process)
        return inner

    def produced(self, tensor: NativeTensor) -> Channel:
        """The channel a process writes: an output port where that is the tensor's only reader."""
        root = self.root(tensor.name)
        if self.readers.get(root, 0) == 1 and root in self.outputs_of:
            return self.results[self.outputs_of[root][0]]
        made = self.channel(tensor, tensor.name)
        return made

    def provide(self, root: str, channel: Channel) -> None:
        """Make a written channel available to the readers of its tensor."""
        count = self.readers.get(root, 0)
        ports = [self.results[i] for i in self.outputs_of.get(root, [])]
        if channel in ports:
            self.waiting[root] = []
            return
        if count == 1 and not ports:
            self.waiting[root] = [channel]
            return
        if count == 0:
            if self.stream:
                self.design.processes.append(
                    Process(
                        f"drain_{channel.name}",
                        f"edgemat::drain<{channel.size}>",
                        (channel.name,),
                        "stream",
                        (channel,),
                        (),
                        Lockstep(channel.beats, 1, 0),
                    )
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
                f"clone_{channel.name}",
                f"edgemat::{function}<{channel.size}>",
                (channel.name, *(c.name for c in targets)),
                "stream",
                (channel,),
                targets,
                Lockstep(channel.beats, 1, len(targets)),
            )
        )
        self.waiting[root] = copies

    def take(self, tensor: NativeTensor) -> Channel:
        return self.waiting[self.root(tensor.name)].pop(0)

    # -- steps -------------------------------------------------------------------------------------------------
    def step(self, step: Step) -> None:
        name = self.node_names(step.name)
        maker = CallMaker(self.plan, step, name, self.design.dataflow)
        if maker.unit is not None:
            maker.unit.external(lambda: self.names(f"{name}_weights"))
        constants: dict[int, ConstantArray] = {}
        sources: list[Channel | None] = []
        streamed = self.stream and not (step.stem in BINARY and constant_partner(step))
        for i, x in enumerate(step.inputs):
            if x.values is None:
                sources.append(self.take(x))
            elif streamed:
                array = constant_array(f"{name}_x{i}", x.values)
                sources.append(self.load(x, array, f"{name} x{i}", step))
            else:
                constants[i] = maker.builder.array(f"x{i}", x.values)
                sources.append(None)
        result = self.produced(step.outputs[0])
        self.design.processes.append(maker.make(sources, constants, result))
        self.provide(self.root(step.outputs[0].name), result)

    def load(self, tensor: NativeTensor, array: ConstantArray, name: str, step: Step) -> Channel:
        """A process that streams a constant operand, once per sample."""
        lanes = self.lanes[step.outputs[0].name] if step.stem in BINARY else 1
        extent = tensor.shape[-1] if tensor.shape else 1
        lanes = common_lanes([extent], tensor.format.storage_width, self.plan.beat_bits, lanes)
        channel = Channel(self.names(name), tensor, code_type(tensor.format), lanes)
        self.design.channels.append(channel)
        self.design.processes.append(
            Process(
                f"load_{channel.name}",
                f"edgemat::load<{channel.size}>",
                (f"parameters::{array.name}", channel.name),
                "stream",
                (),
                (channel,),
                Lockstep(channel.beats, 0, 1),
                arrays=(array,),
            )
        )
        return channel


def constant_partner(step: Step) -> list[NativeTensor]:
    """The one variable operand that has the result's shape while the other operand is constant."""
    variable = [x for x in step.inputs if x.values is None]
    if len(variable) == 1 and variable[0].size == step.outputs[0].size:
        return variable
    return []


def deepest_first(fork: Process) -> None:
    """Order the readers of a fork so that none gets a beat before the deeper FIFOs have room for it."""
    inside = sorted((c for c in fork.outputs if not c.port), key=lambda channel: -channel.depth)
    fork.outputs = (*inside, *(c for c in fork.outputs if c.port))
    fork.arguments = (fork.arguments[0], *(channel.name for channel in fork.outputs))


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
