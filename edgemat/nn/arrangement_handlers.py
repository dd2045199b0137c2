"""Handlers of operations without weights of their own: poolings, and those that only move values."""

from __future__ import annotations

from typing import Any

from torch import fx

from edgemat.nn import arrangement, pooling
from edgemat.nn.placement import Placement, Value
from edgemat.nn.tracing import argument, refuse


class ArrangementHandlers(Placement):
    """The handlers of poolings and of rearrangements, ``do_<kind>``."""

    # -- pooling --------------------------------------------------------------------------------------------------
    def _pool(self, node: fx.Node, make: Any, *args: Any) -> None:
        x = self.operand(self.values[node.args[0]])  # type: ignore[index]
        layer = make(*args, output=self.output_quantizer(node, x.non_negative, required=True))
        layer.link(x.source)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, x.non_negative)

    def do_avg_pool(self, node: fx.Node) -> None:
        """Average pooling with a given window."""
        old = self.old_module(node)
        names = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
        if old is not None:
            found = [getattr(old, name) for name in names]
            divisor = getattr(old, "divisor_override", None)
        else:
            defaults = (None, None, 0, False, True)
            found = [argument(node, i + 1, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))]
            divisor = argument(node, 6, "divisor_override")
        if divisor is not None:
            raise refuse(
                node, self.root, "overrides the divisor, expected the number of elements", "multiply afterwards"
            )
        self._pool(node, pooling.QuantAvgPool, *found)

    def do_adaptive_avg_pool(self, node: fx.Node) -> None:
        """Average pooling to a given size."""
        old = self.old_module(node)
        size = old.output_size if old is not None else argument(node, 1, "output_size")
        self._pool(node, pooling.QuantAdaptiveAvgPool, size)

    def do_mean(self, node: fx.Node) -> None:
        """Mean over spatial axes."""
        dim = argument(node, 1, "dim")
        if dim is None:
            raise refuse(node, self.root, "averages everything, the batch included, expected axes", "state dim=")
        self._pool(node, pooling.QuantMean, dim, bool(argument(node, 2, "keepdim", False)))

    # -- operations that only move values -------------------------------------------------------------------------
    def do_keep(self, node: fx.Node) -> None:
        """Copied as it is; the format stays."""
        name = getattr(node.target, "__name__", str(node.target))
        x = self.values[node.all_input_nodes[0]]
        if name in ("getattr", "size", "dim") and not (name == "getattr" and node.args[1] == "T"):
            self.values[node] = Value(self.copy(node), None, False, tensor=False)
            return
        if node.op == "call_module":
            self.done.add(str(node.target))
        self.values[node] = Value(self.copy(node), x.source, x.non_negative, maker=x.maker)

    def do_max_pool(self, node: fx.Node) -> None:
        """Max pooling: exact, no quantiser."""
        old = self.old_module(node)
        indices = old.return_indices if old is not None else argument(node, 6, "return_indices", False)
        if indices:
            raise refuse(node, self.root, "returns indices, expected values only", "use return_indices=False")
        self.do_keep(node)

    def do_adaptive_max_pool(self, node: fx.Node) -> None:
        """Max pooling to one element."""
        old = self.old_module(node)
        size = old.output_size if old is not None else argument(node, 1, "output_size")
        if set(size if isinstance(size, tuple | list) else [size]) != {1}:
            raise refuse(node, self.root, f"pools to {size}, expected 1", "use MaxPool with a stated window")
        x = self.values[node.all_input_nodes[0]]
        call = self.call(self.module_name(node), arrangement.GlobalMaxPool(), x.node)
        self.values[node] = Value(call, x.source, x.non_negative, maker=x.maker)

    def do_split(self, node: fx.Node) -> None:
        """Split and chunk along one axis."""
        x = self.values[node.all_input_nodes[0]]
        name = getattr(node.target, "__name__", str(node.target))
        dim = argument(node, 2, "dim", 0)
        if name == "chunk":
            layer = arrangement.Split(dim, chunks=argument(node, 1, "chunks"))
        else:
            sizes = argument(node, 1, "split_size_or_sections", argument(node, 1, "split_size"))
            layer = arrangement.Split(dim, sizes)
        self.values[node] = Value(self.call(self.module_name(node), layer, x.node), x.source, x.non_negative)

    def do_pad(self, node: fx.Node) -> None:
        """Padding with a constant zero."""
        old = self.old_module(node)
        mode = "constant" if old is not None else argument(node, 2, "mode", "constant")
        value = old.value if old is not None and hasattr(old, "value") else argument(node, 3, "value", 0)
        if mode != "constant" or (value or 0) != 0:
            raise refuse(node, self.root, f"pads with {mode!r} {value}, expected zeros", "pad with zeros")
        self.do_keep(node)

    def do_upsample(self, node: fx.Node) -> None:
        """Nearest-neighbour upsampling by an integer factor."""
        old = self.old_module(node)
        mode = old.mode if old is not None else argument(node, 3, "mode", "nearest")
        factor = old.scale_factor if old is not None else argument(node, 2, "scale_factor")
        factors = factor if isinstance(factor, tuple | list) else [factor]
        if mode != "nearest" or any(f is None or f != int(f) for f in factors):
            raise refuse(
                node,
                self.root,
                f"interpolates by {mode!r} with factor {factor}, expected 'nearest' with whole factors",
                "state scale_factor=2 or the like",
            )
        self.do_keep(node)

    def do_arg_max(self, node: fx.Node) -> None:
        """ArgMax over a stated axis."""
        if argument(node, 1, "dim") is None:
            raise refuse(node, self.root, "flattens the batch, expected an axis", "state dim=")
        self.do_keep(node)
