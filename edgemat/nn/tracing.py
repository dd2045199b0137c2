"""Tracing a module with torch.fx, and refusing what cannot be traced with its file and line."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from edgemat.errors import LoweringError, UnsupportedOpError
from edgemat.nn.layer import QuantLayer
from edgemat.nn.quantizer import FixedQuantizer

REMEDY = (
    "move it out of the traced part, or build that part from edgemat.nn layers (QuantLinear, QuantConv2d, QuantReLU, "
    "QuantAdd, FixedQuantizer) in a module of your own, which needs no tracing"
)
_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)


class LayerTracer(fx.Tracer):
    """Traces down to torch's own layers and edgemat's."""

    def __init__(self) -> None:
        super().__init__()
        self.record_stack_traces = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is one node of the graph."""
        if isinstance(m, FixedQuantizer | QuantLayer):
            return True
        # A subclass that keeps torch's forward is that torch layer.
        home = type(m).forward.__module__ or ""  # a GraphModule's has none
        return home.startswith("torch.nn.modules") and not home.endswith((".container", ".module"))


def trace(model: nn.Module) -> fx.Graph:
    """The fx graph of `model`.

    Raises:
        LoweringError: naming file and line of what cannot be traced, and the remedy.
    """
    if LayerTracer().is_leaf_module(model, "") and any(True for _ in model.parameters()):
        raise LoweringError(
            f"quantize got a single {type(model).__name__}, expected a module that calls its layers; "
            f"wrap it: torch.nn.Sequential({type(model).__name__}(...))"
        )
    try:
        return LayerTracer().trace(model)
    except Exception as error:
        where = _user_frame(traceback.extract_tb(error.__traceback__))
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoweringError(
            f"{where}: the forward of {type(model).__name__} cannot be traced ({reason}), expected a fixed sequence of "
            f"operations that does not depend on data; {REMEDY}"
        ) from error


def _user_frame(frames: traceback.StackSummary) -> str:
    own = [f for f in frames if not f.filename.startswith((_TORCH, _HERE))]
    found = own[-1] if own else (frames[-1] if len(frames) else None)
    return f"{found.filename}:{found.lineno}" if found is not None else "unknown place"


def place(node: fx.Node) -> str:
    """``file:line`` of the user's code that made `node`, or its name."""
    trace_text = node.stack_trace or ""
    lines = [line.strip() for line in trace_text.splitlines() if line.strip().startswith("File ")]
    own = [line for line in lines if _TORCH not in line and _HERE not in line]
    if not own:
        return f"node {node.name!r}"
    pieces = own[-1].split(", ")
    file = pieces[0].removeprefix("File ").strip('"')
    number = pieces[1].removeprefix("line ") if len(pieces) > 1 else "?"
    return f"{file}:{number}"


def label(node: fx.Node, root: nn.Module) -> str:
    """What a node calls, for messages."""
    if node.op == "call_module":
        return f"module {node.target} ({type(root.get_submodule(str(node.target))).__name__})"
    if node.op == "call_method":
        return f"method .{node.target}()"
    name = getattr(node.target, "__name__", str(node.target))
    return f"function {name}"


def refuse(node: fx.Node, root: nn.Module, found: str, remedy: str = "") -> UnsupportedOpError:
    """The error for an operation that has no counterpart."""
    return UnsupportedOpError(f"{place(node)}: {label(node, root)} {found}; {remedy or REMEDY}")


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call by position or keyword."""
    if name in node.kwargs:
        return node.kwargs[name]
    return node.args[index] if index < len(node.args) else default
