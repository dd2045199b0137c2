"""One forward pass of a Brevitas model, taking note of what each quantiser hands out.

Brevitas computes scales while the model runs (from statistics of the weights, from the input's scale for a bias), so
the pass is the one place where all of them are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgemat.errors import EdgematError, LoweringError, UnsupportedOpError


@dataclass(frozen=True)
class Meaning:
    """What the numbers of a quantised tensor mean: ``value = (q - zero_point) * scale``.

    Attributes:
        value: The tensor, float32.
        scale: float32, one or one for each channel, in a shape that broadcasts to `value`.
        zero_point: float32.
        bit_width: float32, one number.
        signed: Whether q is two's complement.
    """

    value: Tensor
    scale: Tensor
    zero_point: Tensor
    bit_width: Tensor
    signed: bool


@dataclass(frozen=True)
class Call:
    """One call of a quantiser: what went in (None for a float tensor) and what came out."""

    source: Meaning | None
    result: Meaning


def meaning_of(value: object) -> Meaning | None:
    """A Brevitas tensor of integers as a `Meaning`; None for anything else."""
    from brevitas.quant_tensor import IntQuantTensor

    if not isinstance(value, IntQuantTensor):
        return None
    x, scale, zero, bits = (
        part.detach().float().clone() for part in (value.value, value.scale, value.zero_point, value.bit_width)
    )
    return Meaning(x, scale, zero, bits, bool(value.signed))


def quantisers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The enabled quantisers of a model by the name of the place where each is met first.

    Raises:
        UnsupportedOpError: for a model without any, and for recurrent layers, whose quantisers work inside a loop.
    """
    from brevitas.nn.mixin.base import QuantRecurrentLayerMixin
    from brevitas.proxy.quant_proxy import QuantProxyFromInjector

    found = {}
    for name, part in model.named_modules():
        if isinstance(part, QuantRecurrentLayerMixin):
            raise UnsupportedOpError(
                f"layer {name!r} is a recurrent one of Brevitas, which has no fixed schedule; expected feed-forward "
                "layers: use edgemat.nn.MLGRU, or unroll the loop"
            )
        if isinstance(part, QuantProxyFromInjector) and part.is_quant_enabled:
            found[name] = part
    if not found:
        raise UnsupportedOpError(
            f"{type(model).__name__} has no Brevitas quantiser, expected layers of brevitas.nn; edgemat.quantize "
            "quantises a float model"
        )
    return found


def record(
    model: nn.Module, quantisers: Mapping[str, nn.Module], example: tuple[Tensor, ...] | dict[str, Tensor]
) -> dict[nn.Module, list[Call]]:
    """Runs the model once; the calls of each quantiser in order.

    Raises:
        UnsupportedOpError: for quantisers whose results are no integers with a scale (minifloat, scales by group).
        LoweringError: if the model does not run on the example.
    """
    calls: dict[nn.Module, list[Call]] = {}
    names = {part: name for name, part in quantisers.items()}

    def note(part: nn.Module, given: tuple[Any, ...], result: object) -> None:
        after = meaning_of(result)
        if after is None:
            raise UnsupportedOpError(
                f"quantiser {names[part]!r} gives a {type(result).__name__}, expected integers with one scale for the "
                "tensor or for each channel; use an integer quantiser of Brevitas"
            )
        calls.setdefault(part, []).append(Call(meaning_of(given[0]) if given else None, after))

    hooks = [part.register_forward_hook(note) for part in quantisers.values()]
    try:
        with torch.no_grad():
            model(**example) if isinstance(example, dict) else model(*example)
    except EdgematError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:300]
        raise LoweringError(
            f"the model does not run on the example input ({type(error).__name__}: {first}); give one batch it takes"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls
