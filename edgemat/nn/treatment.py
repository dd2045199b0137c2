"""What the conversion did with each node of the float network, and why: `edgemat.summary` shows it."""

from __future__ import annotations

from dataclasses import astuple, dataclass

from torch import fx, nn

from edgemat.nn.activation import QuantConstant
from edgemat.nn.kinds import ABSORBING, MODULES, TABLE_NAMES, module_type
from edgemat.nn.layer import QuantLayer
from edgemat.nn.placement import Placement
from edgemat.nn.quantizer import FixedQuantizer

ACTIONS = ("quantised", "folded", "moved", "kept", "left")
"""`quantised`: took its place; `folded`: into the layer before it; `moved`: before the pooling in front of it; `kept`:
exact as it is, no format of its own; `left`: not touched, because it does not run."""

KEY = "edgemat_treatments"
"""Where a converted GraphModule keeps them, as lists of texts: in its `meta`, which copies keep, and as an attribute,
which files keep."""


@dataclass(frozen=True)
class Treatment:
    """What became of one node.

    Attributes:
        name: Name of the float module, or of the function's node.
        kind: Class of the module, or name of the function.
        action: One of `ACTIONS`.
        module: Name of the module in the converted network that does the work, or "".
        reason: Why, in a few words; "" where the formats say it.
    """

    name: str
    kind: str
    action: str
    module: str = ""
    reason: str = ""


def remember(module: fx.GraphModule, treatments: list[Treatment]) -> None:
    """Keeps the treatments in the converted module."""
    plain = [list(astuple(entry)) for entry in treatments]
    module.meta[KEY] = plain
    setattr(module, KEY, plain)


def remembered(module: nn.Module) -> list[Treatment]:
    """The treatments a module keeps; none where `edgemat.quantize` did not make it."""
    if not isinstance(module, fx.GraphModule):
        return []
    kept = module.meta.get(KEY) or getattr(module, KEY, [])
    return [Treatment(*entry) for entry in kept]


def treatments_of(placement: Placement) -> list[Treatment]:
    """One entry for each node that computes, in order, then the modules that never run.

    Args:
        placement: A conversion that has walked over all nodes.
    """
    found = []
    seen: set[str] = set()
    for node in placement.old.nodes:
        if node.op == "call_module":
            seen.add(str(node.target))
        made = _treatment(placement, node)
        if made is not None:
            found.append(made)
    for name, module in placement.originals().items():
        if name not in seen and module_type(module) in MODULES and not isinstance(module, nn.Identity):
            found.append(Treatment(name, type(module).__name__, "left", "", "forward never calls it"))
    return found


def _treatment(placement: Placement, node: fx.Node) -> Treatment | None:
    kind = placement.kinds[node]
    if kind in ("output", "get_attr"):
        return None
    name, label = _named(placement, node)
    if node.op == "placeholder":
        if not node.users:
            return Treatment(name, "input", "left", "", "nothing reads it")
        return Treatment(name, "input", "quantised", str(placement.values[node].node.target))
    value = placement.values[node]
    if not value.tensor:
        return None
    if kind == "edgemat":
        return Treatment(name, label, "kept", name, "is a quantised layer already")
    if node in placement.folded:
        into = placement.named(placement.folded[node])[0]
        return Treatment(name, label, "folded", into, f"into {into}, before its weights are rounded")
    if node in placement.commuted:
        return Treatment(name, label, "moved", _target(value.node), "before the pooling in front of it, which it may")
    made = value.node
    module = _module(placement, made)
    if isinstance(module, QuantLayer):
        return Treatment(name, label, "quantised", str(made.target), _unrounded(placement, node, module))
    if isinstance(module, FixedQuantizer):
        return Treatment(name, label, "quantised", str(made.target))
    return Treatment(name, label, "kept", "", "moves values only; the format stays")


def _unrounded(placement: Placement, node: fx.Node, layer: QuantLayer) -> str:
    """Why a layer's result is not rounded, or ""."""
    if layer.output_quantizer is not None or isinstance(layer, QuantConstant):
        return ""
    last = next((norm for norm, into in placement.folded.items() if into is node), node)
    if placement.only_output(last):
        return "network output: exact sum (Recipe outputs=None)"
    follower = placement.follower(last)
    if follower is not None and placement.kinds[follower] in ABSORBING:
        return f"exact sum: {placement.named(follower)[0]} behind it rounds"
    return "exact sum"


def _module(placement: Placement, node: fx.Node) -> nn.Module | None:
    return placement.root.get_submodule(str(node.target)) if node.op == "call_module" else None


def _target(node: fx.Node) -> str:
    """The nearest module before a node of the new graph, itself included."""
    while node.op != "call_module" and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return str(node.target) if node.op == "call_module" else ""


def _named(placement: Placement, node: fx.Node) -> tuple[str, str]:
    """Name and kind of a node as its user knows them."""
    if node.op == "call_module":
        return str(node.target), type(placement.old_module(node)).__name__
    return node.name, TABLE_NAMES.get(node.target, getattr(node.target, "__name__", str(node.target)))
