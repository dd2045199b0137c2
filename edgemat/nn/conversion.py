"""`quantize`: a float module becomes a quantised `torch.fx.GraphModule` with the same parameter names.

Each operation of the traced graph is either *transparent* (it moves values), or *arithmetic*: its exact result lies on
a grid finer or wider than its inputs'. An arithmetic result gets a quantiser, except where the next operation brings
one (a ReLU or a clip directly behind it) and at the network's outputs, which keep the exact accumulator unless the
recipe states a format. Every layer is linked to the quantiser that made its input, so that it knows the grid of its
accumulator.
"""

from __future__ import annotations

import copy

from torch import fx, nn

from edgemat.errors import FormatError, LoweringError
from edgemat.nn.handlers import Handlers
from edgemat.nn.kinds import ARITHMETIC
from edgemat.nn.layer import QuantLayer
from edgemat.nn.normal_form import normalize
from edgemat.nn.placement import Value
from edgemat.nn.quantizer import FixedQuantizer
from edgemat.nn.quantizers import activation_quantizer
from edgemat.nn.summary import show, wanted
from edgemat.nn.tracing import refuse, trace
from edgemat.nn.treatment import remember, treatments_of
from edgemat.recipe import Recipe


def quantize(model: nn.Module, recipe: Recipe | None = None, verbose: bool | None = None) -> fx.GraphModule:
    """A quantised copy of `model`; the module given is left untouched.

    Parameter names stay, so a float `state_dict` loads; quantisers add names of their own. Calibrate the result
    (`edgemat.calibrate`), train it with any loop, and write it with `edgemat.to_onnx`.

    Args:
        model: A float module that torch.fx can trace.
        recipe: Formats; by default 8 bits everywhere with learned binary points.
        verbose: Whether to print to stderr what was done with each layer (`edgemat.summary`); None does where stderr is
            a terminal.

    Returns:
        A GraphModule in the training mode of `model`.

    Raises:
        LoweringError: if the module cannot be traced; names file and line.
        UnsupportedOpError: if an operation has no exact counterpart.
        FormatError: if a rule of the recipe matches nothing.
    """
    if not isinstance(model, nn.Module):
        raise LoweringError(f"quantize got a {type(model).__name__}, expected a torch.nn.Module")
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise LoweringError(f"quantize got a {type(recipe).__name__} as recipe, expected an edgemat.Recipe")
    if is_quantized(model):
        raise LoweringError(
            f"quantize got {type(model).__name__}, which quantize made already, expected a float module; call quantize "
            "on the float module again, with the new recipe"
        )
    root = copy.deepcopy(model)
    module = Conversion(root, normalize(trace(root), root), recipe).run()
    if wanted(verbose):
        show(module)
    return module


class Conversion(Handlers):
    """One conversion of a traced graph; `run` makes the new module."""

    # -- the walk -------------------------------------------------------------------------------------------------
    def run(self) -> fx.GraphModule:
        """Converts every node in order."""
        self._check_rules()
        for node in self.old.nodes:
            self.convert(node)
        for node in self.new.nodes:
            node.type = None  # an annotation that is a text cannot be pickled
        self.new.lint()
        name = f"Quantized{type(self.root).__name__}"
        module = fx.GraphModule(self.root, self.new, name)
        name_modules(module)
        remember(module, treatments_of(self))
        for part in module.modules():
            if isinstance(part, QuantLayer | FixedQuantizer):
                part.network = name
        # Containers come before their parts, so each part ends in the mode its float module was in.
        for name, part in self.originals().items():
            if _has(module, name):
                module.get_submodule(name).train(part.training)
        return module

    def convert(self, node: fx.Node) -> None:
        """Converts one node."""
        kind = self.kinds[node]
        if kind == "placeholder":
            return self.placeholder(node)
        if kind == "get_attr":
            copied = self.new.node_copy(node)
            self.values[node] = Value(copied, None, False, tensor=False)
            return None
        if kind == "output":
            return self.output(node)
        inputs = [self.values[n] for n in node.all_input_nodes]
        if inputs and not any(v.tensor for v in inputs) and kind in (None, *ARITHMETIC, "keep"):
            self.values[node] = Value(self.copy(node), None, False, tensor=False)
            return None
        if kind is None:
            raise refuse(node, self.root, "has no exact fixed-point counterpart")
        handler = getattr(self, f"do_{kind}")
        try:
            handler(node)
        except FormatError as error:
            name = str(node.target) if node.op == "call_module" else node.name
            if repr(name) in str(error):
                raise
            raise FormatError(f"layer {name!r}: {error}") from None
        return None

    def placeholder(self, node: fx.Node) -> None:
        """A network input gets its quantiser, unless nothing uses it."""
        copied = self.new.node_copy(node)
        if not node.users:
            self.values[node] = Value(copied, None, False, tensor=False)
            return
        if self.indexes(node):
            self.values[node] = Value(copied, None, False, tensor=False)
            return
        fmt = self.recipe.input_format(node.name)
        rules = self.recipe.layer([])
        quantizer = activation_quantizer(rules.activation_spec(fmt), self.channels(node), role="input")
        call = self.call(self.unused(f"{node.name}_quantizer"), quantizer, copied)
        self.values[node] = Value(call, quantizer, not fmt.signed)

    def output(self, node: fx.Node) -> None:
        """Network outputs: accumulators stay exact, a loss is served float32 while training."""
        for source in node.all_input_nodes:
            maker = self.values[source].maker
            if maker is not None and hasattr(maker, "final"):
                maker.final = True
        self.new.output(fx.map_arg(node.args[0], lambda n: self.values[n].node))


def name_modules(module: nn.Module) -> None:
    """Tells every layer and quantiser its name, for messages."""
    for name, part in module.named_modules():
        if isinstance(part, QuantLayer | FixedQuantizer):
            part.path = name


def network_name(module: nn.Module) -> str:
    """The class name of a module; of a result of `quantize` the name it had then, which copies and files lose."""
    if isinstance(module, fx.GraphModule):
        for part in module.modules():
            if isinstance(part, QuantLayer | FixedQuantizer) and part.network:
                return part.network
    return type(module).__name__


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` is a result of `quantize`, a copy or a loaded one included."""
    return isinstance(module, fx.GraphModule) and any(
        isinstance(part, QuantLayer | FixedQuantizer) and part.network for part in module.modules()
    )


def _has(root: nn.Module, name: str) -> bool:
    try:
        root.get_submodule(name)
    except AttributeError:
        return False
    return True
