"""The quantised network inside a LightningModule, and the arguments it is called with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgemat.errors import LoweringError
from edgemat.nn.conversion import is_quantized
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer

_COMPILED = "_orig_mod"  # torch.compile's name for the module it wraps


@dataclass(frozen=True)
class Found:
    """A quantised network as its LightningModule holds it.

    Attributes:
        name: Its name in the LightningModule, without torch.compile's wrapper; "" for the LightningModule itself.
        network: The network, never a wrapper of torch.compile.
        called: What the LightningModule calls: the network, or torch.compile's wrapper of it.
    """

    name: str
    network: nn.Module
    called: nn.Module

    @property
    def quantizers(self) -> dict[str, FixedQuantizer]:
        """Every quantiser of the network by its name there."""
        return quantizers(self.network)


def quantizers(network: nn.Module) -> dict[str, FixedQuantizer]:
    """Every quantiser of a network by its name there."""
    return {name: part for name, part in network.named_modules() if isinstance(part, FixedQuantizer)}


def find_network(module: nn.Module, name: str | None = None) -> Found:
    """The quantised network of a LightningModule.

    Args:
        module: The LightningModule.
        name: Name of the network in it; None takes the only one there is.

    Raises:
        LoweringError: if there is none, or more than one and no name says which.
    """
    if name is not None:
        return _named(module, name)
    made = [part for part_name, part in module.named_modules() if is_quantized(part) and not _inside(module, part_name)]
    if len(made) > 1:
        names = ", ".join(repr(_plain(n)) for n, part in module.named_modules() if part in made)
        raise LoweringError(
            f"{type(module).__name__} holds {len(made)} quantised networks ({names}), expected one; say which with "
            "network='...'"
        )
    if made:
        return next(_found(module, n, part) for n, part in module.named_modules() if part is made[0])
    if not _quantized(module):
        raise LoweringError(
            f"{type(module).__name__} holds no quantised network, expected the result of edgemat.quantize or layers of "
            "edgemat.nn; call self.net = edgemat.quantize(net, recipe) in its __init__"
        )
    holders = [(n, child) for n, child in module.named_children() if _quantized(child)]
    if len(holders) == 1 and not isinstance(_unwrap(holders[0][1]), QuantLayer | FixedQuantizer):
        return Found(holders[0][0], _unwrap(holders[0][1]), holders[0][1])
    return Found("", module, module)


def _named(module: nn.Module, name: str) -> Found:
    try:
        called = module.get_submodule(name)
    except AttributeError:
        called = None
    if called is None or not _quantized(called):
        kept = [_plain(n) for n, part in module.named_modules() if is_quantized(part)]
        known = f"one of {', '.join(map(repr, kept))}" if kept else "the name of a result of edgemat.quantize"
        raise LoweringError(f"network={name!r} names no quantised network of {type(module).__name__}, expected {known}")
    return Found(name, _unwrap(called), called)


def _found(module: nn.Module, name: str, network: nn.Module) -> Found:
    """A network by the name under which `named_modules` lists it, which may end in torch.compile's wrapper."""
    holder = name.removesuffix(_COMPILED).removesuffix(".") if name.split(".")[-1] == _COMPILED else name
    return Found(_plain(holder), network, module.get_submodule(holder))


def _inside(module: nn.Module, name: str) -> bool:
    """Whether a module is part of a network that `quantize` made."""
    parts = name.split(".") if name else []
    return any(is_quantized(module.get_submodule(".".join(parts[:end]))) for end in range(len(parts)))


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def _unwrap(module: nn.Module) -> nn.Module:
    wrapped = getattr(module, _COMPILED, None)
    return wrapped if isinstance(wrapped, nn.Module) else module


def _quantized(module: nn.Module) -> bool:
    return any(isinstance(part, FixedQuantizer) for part in module.modules())


@dataclass(frozen=True)
class Arguments:
    """What a network was called with: tensors, detached."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        """Every tensor, in order."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]

    def first(self, count: int) -> Arguments:
        """The first samples of every tensor, on the CPU, copied."""

        def cut(value: Any) -> Any:
            return value[:count].detach().to("cpu", torch.float32, copy=True) if isinstance(value, Tensor) else value

        return Arguments(tuple(map(cut, self.args)), {key: cut(value) for key, value in self.kwargs.items()})


class Capture:
    """Keeps the arguments of the network's next call with a forward pre-hook, which removes itself.

    Networks compiled together with their LightningModule are not hooked, because the hook would be compiled in.
    """

    def __init__(self) -> None:
        self.arguments: Arguments | None = None
        self._handle: Any = None

    def arm(self, found: Found, compiled: bool) -> None:
        """Waits for the next call."""
        self.disarm()
        self.arguments = None
        if compiled or found.name == "" or getattr(found.called, "_compiled_call_impl", None) is not None:
            return

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.arguments = Arguments(tuple(map(_detached, args)), {k: _detached(v) for k, v in kwargs.items()})
            self.disarm()

        self._handle = found.called.register_forward_pre_hook(keep, with_kwargs=True)

    def disarm(self) -> None:
        """Takes the hook away."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def is_compiled(module: nn.Module) -> bool:
    """Whether Lightning was given ``torch.compile(module)``."""
    return getattr(module, "_compiler_ctx", None) is not None


def arguments_of(network: nn.Module, batch: Any) -> Arguments | None:
    """What a network is called with for a batch, by `edgemat.calibrate`'s rule, or None where the batch does not fit.

    A tensor is the input, a mapping gives inputs by name, of a sequence the surplus items (labels) are left out.
    """
    names = input_names(network)
    if not names:
        return None
    if isinstance(batch, Tensor):
        return Arguments((batch.detach(),)) if batch.is_floating_point() else None
    if isinstance(batch, Mapping):
        taken = {name: batch[name].detach() for name in names if isinstance(batch.get(name), Tensor)}
        return Arguments((), taken) if len(taken) == len(names) else None
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) >= len(names):
        items = tuple(batch[: len(names)])
        if all(isinstance(item, Tensor) and item.is_floating_point() for item in items):
            return Arguments(tuple(item.detach() for item in items))
    return None


def input_names(network: nn.Module) -> list[str]:
    """The names of a network's inputs, in order."""
    if isinstance(network, fx.GraphModule):
        return [str(node.target) for node in network.graph.nodes if node.op == "placeholder"]
    found = inspect.signature(network.forward).parameters.values()
    return [p.name for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
