"""What to quantise, and how: the one argument of :func:`edgemat.quantize`.

A recipe states formats for whole classes of tensors and, by rules, for single layers. It needs no torch.
"""

from edgemat.recipe.layer import ActivationSpec, LayerRecipe, WeightSpec
from edgemat.recipe.recipe import Recipe
from edgemat.recipe.settings import (
    RULE_KEYS,
    TERNARY,
    TOKEN_SCALES,
    checked_scale,
    checked_ternary,
    checked_tokens,
    named_weights,
    nearest,
)

__all__ = [
    "RULE_KEYS",
    "TERNARY",
    "TOKEN_SCALES",
    "ActivationSpec",
    "LayerRecipe",
    "Recipe",
    "WeightSpec",
    "checked_scale",
    "checked_ternary",
    "checked_tokens",
    "named_weights",
    "nearest",
]
