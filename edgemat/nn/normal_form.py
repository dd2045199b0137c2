"""What torch lets a user write in several ways, said in one way, before the conversion reads the traced graph.

1. The first operand stands by position: ``linear(input=x)`` is ``linear(x)``.
2. Dropout is a module: ``F.dropout(x, p, self.training)`` was traced with the mode of that moment, while a module
   follows ``train()`` and ``eval()``.
3. In-place operations return a new value: whoever reads the changed tensor afterwards reads the result. A change that
   would also show through a view of the same memory is refused.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from edgemat.nn.tracing import argument, refuse

_DROPOUTS: dict[Any, type[nn.Module]] = {
    F.dropout: nn.Dropout,
    F.dropout1d: nn.Dropout1d,
    F.dropout2d: nn.Dropout2d,
}
_IN_PLACE = (operator.iadd, operator.isub, operator.imul, operator.itruediv)
_VIEW_NAMES = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "permute",
        "transpose",
        "squeeze",
        "unsqueeze",
        "split",
        "chunk",
        "narrow",
        "contiguous",
        "detach",
        "getitem",
        "getattr",
    ]
)
_VIEW_LAYERS = (nn.Flatten, nn.Unflatten, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)


def normalize(graph: fx.Graph, root: nn.Module) -> fx.Graph:
    """Rewrites `graph` in place into the one form the conversion reads.

    Args:
        graph: A traced graph of `root`.
        root: Its module; dropout layers may be added to it.

    Returns:
        The graph.

    Raises:
        UnsupportedOpError: if an in-place operation changes a tensor that is also read through a view.
    """
    for node in graph.nodes:
        _place_first_operand(node)
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in _DROPOUTS:
            _replace_dropout(node, root)
    for node in list(graph.nodes):
        if _changes_operand(node, root) and not _is_size(node.args[0]):
            _rename_operand(node, root)
    return graph


def _place_first_operand(node: fx.Node) -> None:
    if node.op in ("call_module", "call_function") and not node.args:
        for name in ("input", "tensors", "x"):
            if name in node.kwargs:
                rest = {key: value for key, value in node.kwargs.items() if key != name}
                node.args, node.kwargs = (node.kwargs[name],), rest
                return


def _replace_dropout(node: fx.Node, root: nn.Module) -> None:
    if root.training and not argument(node, 2, "training", True):
        return  # switched off by a constant: nothing to follow
    name, count = node.name, 0
    while hasattr(root, name):
        count += 1
        name = f"{node.name}_{count}"
    layer = _DROPOUTS[node.target](argument(node, 1, "p", 0.5))
    root.add_module(name, layer.train(root.training))
    node.op, node.target, node.args, node.kwargs = "call_module", name, (node.args[0],), {}


def _changes_operand(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call writes its result into its first operand."""
    if not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    named = str(name).endswith("_") and not str(name).endswith("__")
    return node.op in ("call_method", "call_function") and (
        named or node.target in _IN_PLACE or node.kwargs.get("inplace") is True or _inplace_by_position(node)
    )


def _inplace_by_position(node: fx.Node) -> bool:
    """``F.relu(x, True)`` and its like."""
    index = {F.relu: 1, F.relu6: 1, F.silu: 1, F.hardswish: 1, F.hardsigmoid: 1, F.leaky_relu: 2, F.hardtanh: 3}
    position = index.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    return position is not None and len(node.args) > position and node.args[position] is True


def _is_size(value: Any) -> bool:
    """Whether a node is made of sizes alone; Python's numbers never change in place."""
    if not isinstance(value, fx.Node):
        return True
    if value.op == "call_method" and value.target in ("size", "dim"):
        return True
    if value.op == "call_function" and value.target is getattr:
        return value.args[1] in ("shape", "ndim")
    return bool(value.all_input_nodes) and all(_is_size(n) for n in value.all_input_nodes)


def _is_view(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call's result may share the memory of its first operand."""
    if node.op == "call_module":
        return isinstance(root.get_submodule(str(node.target)), _VIEW_LAYERS)
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and str(name) in _VIEW_NAMES and not _is_size(node)


def _family(node: fx.Node, root: nn.Module) -> list[fx.Node]:
    """Every node that may share memory with `node`, itself included."""
    base = node
    while _is_view(base, root):
        base = base.all_input_nodes[0]
    found = [base]
    for member in found:
        found += [user for user in member.users if user not in found and _is_view(user, root)]
    return found


def _rename_operand(node: fx.Node, root: nn.Module) -> None:
    changed = node.args[0]
    assert isinstance(changed, fx.Node)
    order = {each: index for index, each in enumerate(node.graph.nodes)}
    for member in _family(changed, root):
        later = [user for user in member.users if order[user] > order[node]]
        if member is not changed and later:
            raise refuse(
                node,
                root,
                f"changes in place a tensor that {later[0].name!r} reads through a view afterwards",
                "use the form that returns a new tensor",
            )
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node])
