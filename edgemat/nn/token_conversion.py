"""Which layers `edgemat.quantize` may give tokens with scales of their own."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from edgemat.nn.kinds import module_type
from edgemat.nn.tracing import refuse
from edgemat.recipe import LayerRecipe


def token_options(node: fx.Node, old: Any, root: nn.Module, rules: LayerRecipe) -> dict[str, Any]:
    """What the `QuantLinear` of a layer takes for tokens with scales of their own; nothing where none are asked for.

    Raises:
        UnsupportedOpError: for a layer that is no Linear, or has a bias.
    """
    if rules.tokens is None:
        return {}
    if module_type(old) is not nn.Linear or old.bias is not None:
        found = "a Linear with a bias" if module_type(old) is nn.Linear else f"a {type(old).__name__}"
        raise refuse(
            node,
            root,
            f"is {found} and has tokens={str(rules.tokens)!r}, expected a Linear with bias=False",
            "leave this layer out by tokens=None in a rule of the recipe",
        )
    return {"tokens": rules.tokens, "token_scale": rules.token_scale}
