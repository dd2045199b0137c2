"""The parts of a network in the order in which a forward pass reaches them."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from edgemat.errors import FormatError
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.weighted_layer import WeightedLayer


def parts_in_order(q: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its name, once: in the order of the graph where `q` has one, then as registered."""
    seen: set[int] = set()
    names = {id(part): name for name, part in q.named_modules()}
    roots: list[nn.Module] = []
    if isinstance(q, fx.GraphModule):
        roots = [q.get_submodule(str(node.target)) for node in q.graph.nodes if node.op == "call_module"]
    for root in [*roots, q]:
        # Inside a layer the input comes first and the output last; the weights lie between them.
        for part in sorted(root.modules(), key=_rank(root)):
            if id(part) not in seen:
                seen.add(id(part))
                yield names[id(part)], part


def _rank(root: nn.Module):  # type: ignore[no-untyped-def]
    ranks = {id(getattr(root, name, None)): rank for name, rank in (("input_quantizer", 0), ("output_quantizer", 2))}
    return lambda part: ranks.get(id(part), 1)


def quantizers_in_order(q: nn.Module) -> list[tuple[str, FixedQuantizer]]:
    """Every quantiser with its name.

    Raises:
        FormatError: if there is none.
    """
    found = [(name, part) for name, part in parts_in_order(q) if isinstance(part, FixedQuantizer)]
    if not found:
        raise FormatError(
            f"{type(q).__name__} holds no quantiser of edgemat.nn, expected a quantised module; call edgemat.quantize "
            "first"
        )
    return found


def weighted_layers(q: nn.Module) -> list[tuple[str, WeightedLayer]]:
    """Every layer with quantised weights (linear, convolutions) with its name."""
    return [(name, part) for name, part in parts_in_order(q) if isinstance(part, WeightedLayer)]
