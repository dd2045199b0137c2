"""Float norms over rows as `edgemat.quantize` finds them, modules or functions, and their quantised twins."""

from __future__ import annotations

from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn.normalization import QuantLayerNorm, QuantRMSNorm, QuantRowNorm
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import WeightSpec
from edgemat.nn.tracing import argument, refuse


def parts_of(
    node: fx.Node, old: nn.Module | None, root: nn.Module
) -> tuple[bool, Any, float | None, nn.Parameter | None, nn.Parameter | None]:
    """What a float norm is made of: whether it is centred, its normalised shape, eps, gain and bias.

    Raises:
        LoweringError: if gain or bias of the functional form is computed.
    """
    if old is not None:
        centred = isinstance(old, nn.LayerNorm)
        shape = old.normalized_shape
        return centred, shape, old.eps, old.weight, old.bias if centred else None  # type: ignore[return-value]
    centred = node.target is F.layer_norm
    given = [argument(node, position, name) for position, name in ((2, "weight"), (3, "bias"))][: 1 + centred]
    found: list[Any] = []
    for value in given:
        if value is not None and (not isinstance(value, fx.Node) or value.op != "get_attr"):
            raise refuse(node, root, "takes a gain or bias that is computed", "use torch.nn.LayerNorm or RMSNorm")
        found.append(value if value is None else _attribute(root, str(value.target)))
    eps = argument(node, 4 if centred else 3, "eps", 1e-5 if centred else None)
    return centred, argument(node, 1, "normalized_shape"), eps, found[0], found[1] if centred else None


def _attribute(root: nn.Module, target: str) -> Any:
    owner, _, leaf = target.rpartition(".")
    return getattr(root.get_submodule(owner), leaf)


def quantized_norm(
    centred: bool,
    shape: Any,
    eps: float | None,
    weight: nn.Parameter | None,
    bias: nn.Parameter | None,
    *,
    weights: str | Fixed | WeightSpec,
    output: FixedQuantizer | None,
) -> QuantRowNorm:
    """The quantised twin of a float norm, with its parameters.

    Raises:
        FormatError: if more than the last axis is normalised, or there is a bias and no gain.
    """
    sizes = (shape,) if isinstance(shape, int) else tuple(shape)
    if len(sizes) != 1:
        raise FormatError(f"a norm over {len(sizes)} axes {sizes}, expected one over the last axis; flatten before it")
    options: dict[str, Any] = {"weights": weights, "input": None, "output": output}
    made: QuantRowNorm
    if centred:
        made = QuantLayerNorm(sizes[0], 1e-5 if eps is None else eps, weight is not None, bias is not None, **options)
    else:
        made = QuantRMSNorm(sizes[0], eps, weight is not None, **options)
    made.weight, made.bias = weight, bias
    return made
