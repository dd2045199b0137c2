"""Where quantisers go, under which names, and by which rules: the state that the conversion's handlers share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from edgemat.errors import FormatError, LoweringError
from edgemat.formats import Fixed
from edgemat.nn.kinds import ABSORBING, ARITHMETIC, TRANSPARENT, WEIGHTED, kind_of
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer, check_points
from edgemat.nn.quantizers import activation_quantizer
from edgemat.nn.tracing import refuse
from edgemat.nn.weighted_layer import WeightedLayer
from edgemat.recipe import LayerRecipe, Recipe, nearest


@dataclass
class Value:
    """What is known of a value of the new graph.

    Attributes:
        node: Its node, or None for a tuple of tensors' meta data.
        source: The quantiser whose grid it lies on, or None for an exact accumulator.
        non_negative: Whether no element can be negative.
        tensor: Whether it is a tensor (or a tuple of them), not a size.
        maker: The layer that computed an accumulator, if it is one.
    """

    node: fx.Node
    source: FixedQuantizer | None
    non_negative: bool
    tensor: bool = True
    maker: nn.Module | None = None


class Placement:
    """The state of one conversion: the old graph, the new one, and the rules of the recipe."""

    def __init__(self, root: nn.Module, graph: fx.Graph, recipe: Recipe):
        self.root, self.old, self.recipe = root, graph, recipe
        self.new = fx.Graph()
        self.values: dict[fx.Node, Value] = {}
        self.kinds = {node: kind_of(node, root) for node in graph.nodes}
        self.taken = {name for name, _ in root.named_modules()} | {name for name, _ in root.named_parameters()}
        self.taken |= {name for name, _ in root.named_buffers()} | set(dir(fx.GraphModule))
        self.calls: dict[str, int] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                self.calls[str(node.target)] = self.calls.get(str(node.target), 0) + 1
        self.folded: dict[fx.Node, fx.Node] = {}
        self.commuted: set[fx.Node] = set()
        self.done: set[str] = set()
        self.positions = self._positions()

    def _positions(self) -> dict[fx.Node, set[str]]:
        """Which layers with weights come first behind an input and last before an output."""
        found: dict[fx.Node, set[str]] = {}
        for position, roots, onward in (
            ("first", [n for n in self.old.nodes if n.op == "placeholder"], lambda n: n.users),
            ("last", [n for n in self.old.nodes if n.op == "output"], lambda n: n.all_input_nodes),
        ):
            seen, waiting = set(roots), list(roots)
            while waiting:
                for near in onward(waiting.pop()):
                    if near in seen:
                        continue
                    seen.add(near)
                    if self.kinds[near] in WEIGHTED:
                        found.setdefault(near, set()).add(position)
                    else:
                        waiting.append(near)
        return found

    def copy(self, node: fx.Node) -> fx.Node:
        """The node with its inputs replaced by the new ones."""
        return self.new.node_copy(node, lambda n: self.values[n].node)

    # -- names and modules ----------------------------------------------------------------------------------------
    def unused(self, name: str) -> str:
        """`name`, or the first free variation of it."""
        candidate, count = name, 0
        while candidate in self.taken:
            count += 1
            candidate = f"{name}_{count}"
        self.taken.add(candidate)
        return candidate

    def call(self, name: str, module: nn.Module, *args: Any) -> fx.Node:
        """Registers a module and calls it."""
        parent_name, _, leaf = name.rpartition(".")
        parent = self.root.get_submodule(parent_name)
        if isinstance(parent, nn.Sequential | nn.ModuleList) and not leaf.isdigit():
            parent.add_module(leaf, module)
        else:
            setattr(parent, leaf, module)
        self.done.add(name)
        return self.new.call_module(name, tuple(args))

    def module_name(self, node: fx.Node) -> str:
        """Where the module of a node goes: its old place at the first call, a new name afterwards."""
        if node.op == "call_module":
            name = str(node.target)
            if name not in self.done:
                return name
            return self.unused(name.replace(".", "_"))
        return self.unused(node.name)

    def old_module(self, node: fx.Node) -> Any:
        """The float module a node calls."""
        return self.originals().get(str(node.target)) if node.op == "call_module" else None

    def originals(self) -> dict[str, nn.Module]:
        """The float modules by name, as they were before the first replacement."""
        if not hasattr(self, "_originals"):
            self._originals = dict(self.root.named_modules(remove_duplicate=False))
        return self._originals

    # -- recipe ---------------------------------------------------------------------------------------------------
    def named(self, node: fx.Node) -> tuple[str, type | None]:
        """What rules match a node by."""
        if node.op == "call_module":
            return str(node.target), type(self.old_module(node))
        return node.name, None

    def _check_rules(self) -> None:
        self.originals()
        wrong = self.recipe.unmatched([self.named(n) for n in self.old.nodes if n.op.startswith("call_")])
        if wrong:
            raise FormatError(wrong[0])
        if isinstance(self.recipe.input, dict):
            names = [n.name for n in self.old.nodes if n.op == "placeholder"]
            for key in self.recipe.input:
                if key not in names:
                    raise FormatError(
                        f"Recipe: input names {key!r}{nearest(key, names)}; the network's inputs are {', '.join(names)}"
                    )

    def layer_recipe(self, *chain: fx.Node) -> LayerRecipe:
        """What holds for a chain of nodes that share one output."""
        named = [self.named(n) for n in chain]
        return self.recipe.layer(named, {p for n in chain for p in self.positions.get(n, ())})

    def check_weights(self, node: fx.Node, old: nn.Module | None) -> None:
        """Refuses stated binary points per channel that are not as many as the layer's output channels.

        Args:
            node: The layer's node.
            old: Its float module; anything but linear layers, convolutions and batch norms has one binary point.
        """
        channels = next(
            (getattr(old, name) for name in ("out_features", "out_channels", "num_features") if hasattr(old, name)),
            None,
        )
        if isinstance(old, nn.ConvTranspose2d) and old.groups > 1:
            channels = None
        check_points(self.layer_recipe(node).weights, channels, f"layer {self.named(node)[0]!r}")

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """The operations directly before `node` whose exact results it takes: ``conv, bn, relu`` for the ReLU."""
        found = [node]
        while True:
            first = found[0]
            before = [n for n in first.all_input_nodes if n in self.values and self.values[n].tensor]
            if len(before) != 1 or self.values[before[0]].source is not None or self.kinds[before[0]] not in ARITHMETIC:
                return found
            found.insert(0, before[0])

    # -- where quantisers go --------------------------------------------------------------------------------------
    def only_output(self, node: fx.Node) -> bool:
        """Whether all users lead to the network's outputs through operations that only rearrange."""
        return bool(node.users) and all(
            user.op == "output" or (self.kinds[user] in TRANSPARENT and self.only_output(user)) for user in node.users
        )

    def follower(self, node: fx.Node) -> fx.Node | None:
        """The only user of `node`, or None."""
        return next(iter(node.users)) if len(node.users) == 1 else None

    def hands_on(self, node: fx.Node, value: Value) -> bool:
        """Whether a value goes from the layer that made it straight to `node`, and nowhere else."""
        made = value.node.op == "call_module" and self.root.get_submodule(str(value.node.target)) is value.maker
        return made and self.follower(node.args[0]) is node  # type: ignore[arg-type]

    def relu_behind_pool(self, node: fx.Node) -> fx.Node | None:
        """The ReLU that follows `node` through max pooling alone, which it may as well precede."""
        follower, pooled = self.follower(node), False
        while follower is not None and self.kinds[follower] in ("max_pool", "adaptive_max_pool"):
            follower, pooled = self.follower(follower), True
        if not pooled or follower is None or self.kinds[follower] != "relu" or self.only_output(follower):
            return None
        if follower.op == "call_module" and self.calls[str(follower.target)] > 1:
            return None
        return None if self.layer_recipe(follower).every_layer else follower

    def output_quantizer(
        self, node: fx.Node, non_negative: bool, relu: bool = False, required: bool = False
    ) -> FixedQuantizer | None:
        """The quantiser of a node's result, or None where the exact result goes on."""
        rules = self.layer_recipe(*self.chain(node))
        fmt: Fixed | None = rules.activation(non_negative)
        follower = self.follower(node)
        if self.only_output(node):
            fmt = rules.outputs if rules.outputs is not None or not required else fmt
        elif (
            follower is not None
            and self.kinds[follower] in ABSORBING
            and not required
            and not rules.every_layer
            and self.kinds[node] not in ("cat", "stack")
        ):
            fmt = None
        if fmt is None:
            return None
        if fmt.bipolar and (non_negative or relu):
            raise refuse(
                node,
                self.root,
                "is never negative, so that every bipolar result would be +1",
                "leave the ReLU out (the sign is the activation function), or state 'activations' in a rule",
            )
        return self.quantizer(node, rules, fmt, relu)

    def accumulator_quantizer(self, node: fx.Node, layer: WeightedLayer) -> FixedQuantizer | None:
        """What stands between a layer of bipolar weights and the batch norm behind it, pooling between them included.

        The accumulator goes on as it is, in the narrowest format that holds every sum of the layer's inputs; where the
        input's binary point is learned, so is its.
        """
        rules, source = self.layer_recipe(node), layer.source()
        follower = self.follower(node)
        while follower is not None and self.kinds[follower] in TRANSPARENT:
            follower = self.follower(follower)
        behind = follower is not None and self.kinds[follower] == "batch_norm"
        if not rules.weights.bipolar or rules.trits is not None or not behind or rules.stated or source is None:
            return None
        fan_in = layer.weight.numel() // layer.outputs
        width = min((fan_in * source.grid.magnitude).bit_length() + 1 + (layer.bias is not None), 32)
        return FixedQuantizer(Fixed(width, width - source.exponent() if source.stated else None), role="requantize")

    def quantizer(self, node: fx.Node, rules: LayerRecipe, fmt: Fixed, relu: bool = False) -> FixedQuantizer:
        """The quantiser of a node's result in the format `fmt`."""
        return activation_quantizer(rules.activation_spec(fmt), self.channels(node), relu)

    def channels(self, node: fx.Node) -> int | None:
        """Length of axis 1 of a node's result, where layers tell and all that take it align channels; else None."""
        takers = self._takers(node)
        if self.kinds[node] == "clip" or not takers or not all(self.kinds[taker] in WEIGHTED for taker in takers):
            return None
        if node.op == "placeholder":
            first = [self.old_module(taker) for taker in takers]
            if any(self.kinds[near] in TRANSPARENT for near in node.users):
                return None  # channels may move
            counts = {getattr(m, "in_features", None) or getattr(m, "in_channels", None) for m in first}
            return counts.pop() if len(counts) == 1 else None
        for near in self.chain(node):
            for name in ("out_features", "out_channels", "num_features"):
                if hasattr(self.old_module(near), name):
                    return int(getattr(self.old_module(near), name))
        return None

    def _takers(self, node: fx.Node) -> list[fx.Node]:
        """The operations that a node's result reaches through those that only move values and absorb a quantiser."""
        found: list[fx.Node] = []
        for user in node.users:
            kind = self.kinds[user]
            through = kind in TRANSPARENT or (kind in ABSORBING and node.op != "placeholder")
            found += self._takers(user) if through else [user]
        return found

    def operand(self, value: Value, name: str = "operand") -> Value:
        """A value on a known grid; an accumulator that was left exact gets no second chance."""
        made = value.maker
        if value.source is None and made is not None and self.originals().get(str(value.node.target)) is made:
            raise LoweringError(
                f"layer {str(value.node.target)!r}, a ready {type(made).__name__} in the network, is used as {name} "
                f"although it hands on exact sums, expected a format; build it with one: {type(made).__name__}(..., "
                "output='fixed<8>')"
            )
        if value.source is None:
            raise LoweringError(
                f"node {value.node.name!r} is used as {name} although it has no format, expected a quantised value; "
                "state 'activations' for it in a rule of the recipe"
            )
        return value

    def enter(self, node: fx.Node, value: Value) -> Value:
        """Requantises the input first where a rule states `input`."""
        rules = self.layer_recipe(node)
        if rules.input is None:
            return value
        quantizer = self.quantizer(node.all_input_nodes[0], rules, rules.input)
        call = self.call(self.unused(f"{node.name}_input"), quantizer, value.node)
        return Value(call, quantizer, value.non_negative and not rules.input.signed)

    def finish(self, node: fx.Node, call: fx.Node, layer: QuantLayer, non_negative: bool) -> None:
        """Records the result of a layer."""
        source = layer.output_quantizer
        positive = non_negative or (source is not None and not source.signed)
        self.values[node] = Value(call, source, positive, maker=layer)
