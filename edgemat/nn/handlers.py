"""One handler per kind of operation: each puts the quantised twin of a node into the new graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.nn import activation, arrangement, convolution, join, linear, tables
from edgemat.nn.arrangement_handlers import ArrangementHandlers
from edgemat.nn.batch_norm import BatchNorm, QuantBatchNorm
from edgemat.nn.embedding import QuantEmbedding, embedding_like
from edgemat.nn.kinds import TABLE_NAMES, as_number, module_type
from edgemat.nn.layer import QuantLayer
from edgemat.nn.normalization_conversion import parts_of, quantized_norm
from edgemat.nn.placement import Value
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.token_conversion import token_options
from edgemat.nn.tracing import argument, refuse
from edgemat.nn.weighted_layer import WeightedLayer


class Handlers(ArrangementHandlers):
    """The handlers, ``do_<kind>``; kinds are listed in `kinds`."""

    # -- layers with weights --------------------------------------------------------------------------------------
    def do_linear(self, node: fx.Node) -> None:
        """Linear and convolutions."""
        old = self.old_module(node)
        name = str(node.target)
        x = self.operand(self.enter(node, self.values[node.args[0]]))  # type: ignore[index]
        shared = self.calls[name] > 1
        if shared and name in self.done:
            layer = self.root.get_submodule(name)
            self.finish(node, self.new.call_module(name, (x.node,)), layer, False)  # type: ignore[arg-type]
            return
        norm = self.foldable_norm(node) if not shared else None
        rules = self.layer_recipe(node)
        self.check_weights(node, old)
        options: dict[str, Any] = {
            "weights": rules.weight_spec(),
            "bias_format": rules.bias,
            "input": None,
        }
        if shared:
            # Calls may bring different grids: the layer requantises its input, so that the bias has one grid.
            assert x.source is not None
            options["input"] = rules.input or rules.activation(False)
            options["output"] = self.quantizer(node, rules, rules.activation(False))
        if rules.accumulator is not None and x.source is not None and x.source.per_channel:
            raise FormatError(
                f"layer {name!r} has accumulator={rules.accumulator} and an input with a format per channel "
                "(activation_groups='channel'), expected one format of the input; leave one of the two out in a rule "
                "for this layer"
            )
        options |= token_options(node, old, self.root, rules)
        layer = self.weighted(node, old, options)
        layer.weight, layer.bias = old.weight, old.bias
        layer.path = name
        if shared:
            assert layer.input_quantizer is not None
            layer.input_quantizer.role = "requantize"
        else:
            layer.link(x.source)
        if norm is not None:
            folded = BatchNorm(self.old_module(norm))
            layer.fold(folded)
            self.folded[norm] = node
            _set(self.root, str(norm.target), folded)
        if not shared:
            last = node if norm is None else norm
            # The quantiser's rules see the batch norm, too.
            self.values[node] = Value(node, None, False)
            later = self.relu_behind_pool(last)
            if later is not None:
                self.commuted.add(later)
                behind = self.layer_recipe(*self.chain(last), later)
                layer.output_quantizer = self.quantizer(last, behind, behind.activation(True), relu=True)
            else:
                layer.output_quantizer = self.accumulator_quantizer(node, layer) or self.output_quantizer(last, False)
        self.finish(node, self.call(name, layer, x.node), layer, False)

    do_conv = do_linear

    def weighted(self, node: fx.Node, old: Any, options: dict[str, Any]) -> WeightedLayer:
        """The quantised twin of a float layer."""
        kind = module_type(old)
        if kind is nn.Linear:
            return linear.QuantLinear(old.in_features, old.out_features, old.bias is not None, **options)
        if old.padding_mode != "zeros":
            raise refuse(
                node, self.root, f"pads with {old.padding_mode!r}, expected 'zeros'", "pad in a layer of its own"
            )
        shape = (old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding)
        if kind is nn.ConvTranspose2d:
            return convolution.QuantConvTranspose2d(
                *shape, old.output_padding, old.groups, old.bias is not None, old.dilation, **options
            )
        made = convolution.QuantConv1d if kind is nn.Conv1d else convolution.QuantConv2d
        return made(*shape, old.dilation, old.groups, old.bias is not None, **options)

    def foldable_norm(self, node: fx.Node) -> fx.Node | None:
        """The batch norm behind a layer that folds into it."""
        follower = self.follower(node)
        if follower is None or self.kinds[follower] != "batch_norm" or self.calls[str(follower.target)] > 1:
            return None
        old = self.old_module(node)
        if module_type(old) is nn.ConvTranspose2d and old.groups > 1:
            return None
        if not self.layer_recipe(node).folds:
            return None  # signs cannot take a scale in: the batch norm becomes a fixed-point affine
        return follower if self.layer_recipe(follower).batch_norm == "fold" else None

    def do_batch_norm(self, node: fx.Node) -> None:
        """A folded batch norm stays as the identity; any other becomes a fixed-point affine."""
        x = self.values[node.args[0]]  # type: ignore[index]
        if node in self.folded:
            call = self.new.call_module(str(node.target), (x.node,))
            self.done.add(str(node.target))
            self.values[node] = Value(call, x.source, x.non_negative, maker=x.maker)
            return
        rules = self.layer_recipe(node)
        self.check_weights(node, self.old_module(node))
        x = self.operand(self.enter(node, x))
        layer = QuantBatchNorm(
            self.old_module(node),
            weights=rules.parameter_spec(),
            bias_format=rules.bias,
            input=None,
            output=self.output_quantizer(node, False),
        )
        layer.link(x.source)
        if isinstance(x.maker, WeightedLayer) and self.hands_on(node, x):
            layer.take_over(x.maker)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, False)

    def indexes(self, node: fx.Node) -> bool:
        """Whether an input is an index of embeddings, and of nothing else."""
        ready = [isinstance(self.old_module(user), QuantEmbedding) for user in node.users]
        takers = [self.kinds[user] == "embedding" or own for user, own in zip(node.users, ready, strict=True)]
        if any(takers) and not all(takers):
            raise refuse(
                node, self.root, "is an index of an Embedding and a number", "give the number an input of its own"
            )
        return all(takers)

    def do_embedding(self, node: fx.Node) -> None:
        """Embedding: its rows leave in the format of the layer's activations."""
        index = self.values[node.args[0]]  # type: ignore[index]
        if index.tensor:
            raise refuse(node, self.root, "is indexed by a computed value", "index it by an input of the network")
        layer = embedding_like(self.old_module(node), self.layer_recipe(node).activations)
        name = self.module_name(node)
        layer.path = name
        self.values[node] = Value(self.call(name, layer, index.node), layer.output, False)

    # -- activations ----------------------------------------------------------------------------------------------
    def do_relu(self, node: fx.Node) -> None:
        """ReLU with its quantiser."""
        x = self.values[node.args[0]]  # type: ignore[index]
        if node in self.commuted:
            # Done before the pooling between the accumulator and here: max(pool(x), 0) is pool(max(x, 0)).
            self.values[node] = x
            return
        layer = activation.QuantReLU(self.output_quantizer(node, True, relu=True))
        layer.link(x.source)
        before = x.maker if x.source is None else None
        if isinstance(before, WeightedLayer | QuantBatchNorm) and layer.output_quantizer is not None:
            before.precede(layer.output_quantizer)
            layer.follow(before)
        elif isinstance(x.maker, QuantBatchNorm | join.QuantAdd | join.QuantSub) and self.hands_on(node, x):
            x.maker.reach(layer)
            layer.follow(x.maker)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, True)

    def do_clip(self, node: fx.Node) -> None:
        """ReLU6, Hardtanh, clamp."""
        x = self.values[node.args[0]]  # type: ignore[index]
        low, high = self.clip_bounds(node)
        positive = x.non_negative or (low is not None and low >= 0)
        layer = activation.QuantClip(low, high, self.output_quantizer(node, positive))
        layer.link(x.source)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, positive)

    def clip_bounds(self, node: fx.Node) -> tuple[float | None, float | None]:
        """The constants a clip clips to."""
        old = self.old_module(node)
        if old is not None:
            return float(old.min_val), float(old.max_val)
        name = getattr(node.target, "__name__", str(node.target))
        if name == "relu6":
            return 0.0, 6.0
        names = ("min_val", "max_val") if name.startswith("hardtanh") else ("min", "max")
        defaults = (-1.0, 1.0) if name.startswith("hardtanh") else (None, None)
        found = [argument(node, i + 1, n, d) for i, (n, d) in enumerate(zip(names, defaults, strict=True))]
        if any(v is not None and as_number(v) is None for v in found):
            raise refuse(node, self.root, "clips to tensors, expected constants")
        low, high = (None if v is None else as_number(v) for v in found)
        return low, high

    def do_prelu(self, node: fx.Node) -> None:
        """PReLU and LeakyReLU."""
        x = self.operand(self.values[node.args[0]])  # type: ignore[index]
        old = self.old_module(node)
        rules = self.layer_recipe(node)
        self.check_weights(node, old)
        quantizer = self.output_quantizer(node, False)
        if old is not None and module_type(old) is nn.PReLU:
            layer = activation.QuantPReLU(
                old.num_parameters, weights=rules.parameter_spec(), output=quantizer, input=None
            )
            layer.weight = old.weight
        else:
            slope = as_number(old.negative_slope if old is not None else argument(node, 1, "negative_slope", 0.01))
            if slope is None:
                raise refuse(node, self.root, "takes a slope that is no number", "use torch.nn.PReLU")
            layer = activation.QuantPReLU(1, slope, False, weights=rules.parameter_spec(), output=quantizer, input=None)
            layer.weight_quantizer.fit(layer.weight)
        layer.link(x.source)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, x.non_negative)

    def do_table(self, node: fx.Node) -> None:
        """Functions of one variable."""
        x = self.operand(self.values[node.args[0]])  # type: ignore[index]
        old = self.old_module(node)
        function = TABLE_NAMES[module_type(old) if old is not None else node.target]
        approximate = old.approximate if isinstance(old, nn.GELU) else argument(node, 1, "approximate", "none")
        if function == "gelu" and approximate != "none":
            raise refuse(
                node, self.root, f"approximates by {approximate!r}, expected the erf form", "use approximate='none'"
            )
        x = self.narrowed(node, x)
        positive = function in tables.NON_NEGATIVE
        quantizer = self.output_quantizer(node, positive, required=True)
        assert quantizer is not None
        layer = tables.QuantTable(function, quantizer, input=None)
        layer.link(x.source)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, positive)

    # -- joins ----------------------------------------------------------------------------------------------------
    def do_add(self, node: fx.Node) -> None:
        """Add, Sub, Mul, MatMul of two values, or of a value and a constant."""
        kind = str(self.kinds[node])
        if node.kwargs.get("alpha", 1) != 1:
            raise refuse(node, self.root, "scales its second operand by alpha, expected alpha=1", "multiply first")
        a, b = argument(node, 0, "input"), argument(node, 1, "other")
        if kind == "matmul":
            self.check_factors(node, a, b)
        left, right = self.join_operand(node, a), self.join_operand(node, b)
        positive = left.non_negative and right.non_negative and kind != "sub"
        made = {"add": join.QuantAdd, "sub": join.QuantSub, "mul": join.QuantMul, "matmul": join.QuantMatMul}[kind]
        layer = made(self.output_quantizer(node, positive))
        layer.link(left.source, right.source)
        self.finish(node, self.call(self.module_name(node), layer, left.node, right.node), layer, positive)

    do_sub = do_mul = do_matmul = do_add

    def check_factors(self, node: fx.Node, *factors: Any) -> None:
        """Refuses a matrix product with a parameter or constant: that is a layer with weights."""
        for given in factors:
            if isinstance(given, fx.Node) and self.values[given].tensor:
                continue
            found = f"the parameter {given.target!r}" if getattr(given, "op", "") == "get_attr" else "a constant"
            raise refuse(
                node,
                self.root,
                f"multiplies by {found}, expected two tensors that depend on the input",
                "use torch.nn.Linear, or edgemat.nn.QuantLinear in a module of your own, for weights",
            )

    def join_operand(self, node: fx.Node, given: Any) -> Value:
        """An operand of a join: a value, a parameter or buffer, or a number."""
        rules = self.layer_recipe(node)
        number = as_number(given)
        if number is not None or (isinstance(given, fx.Node) and given.op == "get_attr"):
            self.check_weights(node, None)
        if number is not None:
            layer = activation.QuantConstant(rules.parameters, torch.tensor(number))
            call = self.call(self.unused(f"{node.name}_constant"), layer)
            return Value(call, layer.weight_quantizer, number >= 0)
        if not isinstance(given, fx.Node):
            raise refuse(node, self.root, f"has the operand {given!r}, expected a tensor or a number")
        value = self.values[given]
        if value.tensor:
            return self.operand(value)
        if given.op != "get_attr":
            raise refuse(node, self.root, "joins a tensor and a size, expected two tensors or a constant")
        layer = activation.QuantConstant(rules.parameters, target=str(given.target))
        call = self.call(self.unused(f"{node.name}_constant"), layer, value.node)
        return Value(call, layer.weight_quantizer, False)

    def do_div(self, node: fx.Node) -> None:
        """Division by a number: multiplication by its reciprocal in the weights' format."""
        x, divisor = node.args[0], as_number(argument(node, 1, "other"))
        if not divisor or not isinstance(x, fx.Node):
            raise refuse(
                node, self.root, "divides by a tensor, expected a number that is not 0", "multiply by a constant"
            )
        self._times(node, x, 1.0 / divisor)

    def do_neg(self, node: fx.Node) -> None:
        """Negation: multiplication by -1."""
        self._times(node, node.args[0], -1.0)

    def _times(self, node: fx.Node, x: Any, factor: float) -> None:
        left, right = self.operand(self.values[x]), self.join_operand(node, factor)
        layer = join.QuantMul(self.output_quantizer(node, left.non_negative and factor >= 0))
        layer.link(left.source, right.source)
        call = self.call(self.module_name(node), layer, left.node, right.node)
        self.finish(node, call, layer, left.non_negative and factor >= 0)

    def do_cat(self, node: fx.Node) -> None:
        """Concatenation, aligned exactly, then quantised."""
        parts = argument(node, 0, "tensors")
        values = [self.operand(self.values[n]) for n in parts]
        positive = all(v.non_negative for v in values)
        sources = {id(v.source) for v in values}
        quantizer = self.output_quantizer(node, positive)
        if self.kinds[node] == "stack":
            stack = arrangement.Stack(argument(node, 1, "dim", 0))
            joined = self.call(self.unused(node.name), stack, [v.node for v in values])
        else:
            joined = self.copy(node)
        if len(sources) == 1:
            self.values[node] = Value(joined, values[0].source, positive)
        elif quantizer is None:
            self.values[node] = Value(joined, None, positive)
        else:
            call = self.call(self.unused(f"{node.name}_output"), quantizer, joined)
            self.values[node] = Value(call, quantizer, positive)

    do_stack = do_cat

    # -- layers of edgemat, softmax and norms -----------------------------------------------------------------------
    def do_edgemat(self, node: fx.Node) -> None:
        """A layer of edgemat in the user's own module stays as it is."""
        layer = self.old_module(node)
        call = self.copy(node)
        self.done.add(str(node.target))
        source = layer if isinstance(layer, FixedQuantizer) else layer.result_quantizer()
        positive = source is not None and not source.signed
        if isinstance(layer, QuantLayer) and layer.input_quantizer is None:
            layer.link(*(self.values[n].source for n in node.all_input_nodes))
        self.values[node] = Value(call, source, positive, maker=layer)

    def narrowed(self, node: fx.Node, x: Value) -> Value:
        """The input of a table, requantised where it has more bits than a table may index."""
        assert x.source is not None
        if x.source.width <= tables.TABLE_BITS:
            return x
        narrow = FixedQuantizer(Fixed(tables.TABLE_BITS, None, not x.non_negative), role="requantize")
        return Value(self.call(self.unused(f"{node.name}_input"), narrow, x.node), narrow, x.non_negative)

    def do_softmax(self, node: fx.Node) -> None:
        """Softmax along a stated axis."""
        old = self.old_module(node)
        dim = old.dim if old is not None else argument(node, 1, "dim")
        if dim is None or dim == 0:
            raise refuse(node, self.root, f"normalises dim={dim}, expected an axis behind the batch", "state dim=")
        x = self.narrowed(node, self.operand(self.enter(node, self.values[node.args[0]])))  # type: ignore[index]
        quantizer = self.output_quantizer(node, True, required=True)
        assert quantizer is not None
        layer = tables.QuantSoftmax(dim, quantizer, input=None)
        layer.link(x.source)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, True)

    def do_row_norm(self, node: fx.Node) -> None:
        """RMSNorm and LayerNorm over the last axis, as a module or as a function."""
        old = self.old_module(node)
        x = self.operand(self.enter(node, self.values[node.args[0]]))  # type: ignore[index]
        rules = self.layer_recipe(node)
        self.check_weights(node, old)
        parts = parts_of(node, old, self.root)
        quantizer = self.output_quantizer(node, False)
        layer = quantized_norm(*parts, weights=rules.parameter_spec(), output=quantizer)
        layer.link(x.source)
        self.finish(node, self.call(self.module_name(node), layer, x.node), layer, False)


def _set(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)
