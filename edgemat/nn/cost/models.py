"""Cost models by name: ``ebops``, ``lut`` and ``mcu``. All are models; nothing here is measured.

``ebops``: effective bit operations (HGQ, arXiv 2405.00645, section III): for each product of a weight and an
activation, the bits of the one times the bits of the other, for one sample. A weight's bits are those between its
highest and lowest one (`edgemat.ops.bit_operations`), an activation's are its format's, sign included. `inspect`
counts the same from the file's codes; it adds element-wise products and sums, and may count fewer bits where it proves
that a channel cannot fill its format. Biases are not counted; the gradient lets each of their bits weigh one operation,
as HGQ2 counts them, so that they learn their widths, too.

``lut``: look-up tables of a design in which each weight is a constant of its own (HLS ``io="parallel"``): every nonzero
signed digit of a weight is an operand of an adder tree, and an adder takes a table for each bit of its operand and one
for the carry (a CLB of UltraScale+ makes one sum bit with one LUT and its carry chain, AMD UG574); every bit of a
rounded activation that some weight uses takes a table to round and one to saturate, every bit of a bias of learned
width one to add it. No DSP block is counted, because constants of a few digits use none; control, registers, routing
and sharing between outputs are not modelled. Error: not calibrated against synthesis. HGQ's authors find LUT + 55 DSP
"roughly" equal to EBOPs after place and route, and distributed arithmetic, which shares sub-sums, up to 30 % fewer
tables (hls4ml's documentation); this model counts no sharing. Use it to compare networks.

``mcu``: bytes of flash that the C library's constants take: for each layer the smallest of 1, 2 and 4 bytes that holds
all its codes, and 4 bytes for each bias; shifts, tables of activation functions and the padding of kernels that take
channels in blocks come on top. The table shows multiplications by kernel class as well, and the bytes of each layer's
input and output, which the arena holds at once inside the network, unless the layer is element-wise. The gradient is
that of an eighth of a byte for each bit. The arena is no model here: its size is that of a plan of all buffers of the
lowered file (`edgemat.targets.mcu.arena`), and widths of at most 8 bits all take a byte, which leaves no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from edgemat.errors import FormatError
from edgemat.nn.convolution import QuantConvTranspose2d
from edgemat.nn.cost.products import Product, products, source_bits, stored_codes
from edgemat.recipe import nearest

if TYPE_CHECKING:
    from rich.table import Table

MODELS = ("ebops", "lut", "mcu")


@dataclass(frozen=True)
class CostTable:
    """Cost by layer.

    Attributes:
        model: ``ebops``, ``lut`` or ``mcu``.
        columns: Names of the columns; the first is the layer's name, the second the cost.
        rows: One tuple per layer.
        total: Sum of the second column.
    """

    model: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    total: float

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers."""
        layers = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"model": self.model, "total": self.total, "layers": layers}

    def render(self) -> Table:
        """A table for the terminal."""
        from rich.table import Table

        made = Table(title=f"{self.model} (modelled): {self.total:,.0f}")
        for i, column in enumerate(self.columns):
            made.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            made.add_row(*(f"{v:,.2f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in row))
        return made


def cost(q: nn.Module, model: str = "ebops") -> Tensor:
    """What `q` costs, as a scalar for a loss.

    Call it after the forward of a training step; there it costs the codes of that forward, in eval mode those of the
    present weights. Its gradient reaches learned binary points and widths; other networks get a constant.

    Args:
        q: The result of `edgemat.quantize`, or a module of edgemat.nn layers; one forward must have told sizes.
        model: ``ebops``, ``lut`` (tables) or ``mcu`` (bytes of flash).

    Returns:
        float32, no dimensions.

    Raises:
        FormatError: for an unknown model, a network that saw no input yet, or one without layers of edgemat.
    """
    counted = _model(model)
    return torch.stack([counted(part)[0] for part in products(q)]).sum()


@torch.no_grad()
def cost_table(q: nn.Module, model: str = "ebops") -> CostTable:
    """The cost of each layer, with what it comes from; arguments and errors as for `cost`."""
    counted = _model(model)
    rows = []
    for part in products(q):
        value, rest = counted(part)
        rows.append((part.name, round(value.item()), *rest))
    return CostTable(model, ("layer", *_COLUMNS[model]), tuple(rows), float(sum(row[1] for row in rows)))


_COLUMNS = {
    "ebops": ("ebops", "weights", "pruned", "weight_bits", "input_bits", "places"),
    "lut": ("luts", "weights", "pruned", "digits", "input_bits", "outputs"),
    "mcu": ("flash_bytes", "weights", "code_bytes", "bias_bytes", "macs", "kernel", "activation_bytes"),
}


def check_model(name: str) -> str:
    """`name`, where it is that of a cost model.

    Raises:
        FormatError: for anything else.
    """
    if name not in MODELS:
        raise FormatError(f"cost model is {name!r}, expected {', '.join(MODELS)}{nearest(str(name), MODELS)}")
    return name


def _model(name: str):  # type: ignore[no-untyped-def]
    check_model(name)
    return {"ebops": _ebops, "lut": _lut, "mcu": _mcu}[name]


def _mean(total: Tensor, count: int) -> float:
    return total.item() / max(count, 1)


def _ebops(part: Product) -> tuple[Tensor, tuple[Any, ...]]:
    bits = part.bits()
    value = part.places * (part.by_input(bits) * part.operand).sum()
    biases = part.places * part.bias_bits()
    value = value + (biases - biases.detach())
    if torch.is_grad_enabled():
        return value, ()
    pruned = int((part.codes == 0).sum().item())
    live = part.codes.numel() - pruned
    return value, (
        part.codes.numel(),
        pruned,
        _mean(bits.sum(), live),
        _mean(part.operand.sum(), part.operand.numel()),
        part.places,
    )


def _lut(part: Product) -> tuple[Tensor, tuple[Any, ...]]:
    digits = part.digits()
    by_input = part.by_input(digits)
    value = (by_input * (part.operand + (part.operand.detach() > 0))).sum() + part.bias_bits()
    if part.layer.aligned_source().role != "input":
        value = value + 2.0 * (part.operand * (by_input.detach() > 0)).sum()
    if torch.is_grad_enabled():
        return value, ()
    pruned = int((part.codes == 0).sum().item())
    mean_operand = _mean(part.operand.sum(), part.operand.numel())
    return value, (part.codes.numel(), pruned, int(digits.sum().item()), mean_operand, _outputs(part))


def _mcu(part: Product) -> tuple[Tensor, tuple[Any, ...]]:
    codes, bias = stored_codes(part.layer)
    code_bytes, bias_bytes = _element(codes), 0 if bias is None else max(4, _element(bias)) * bias.numel()
    size = float(code_bytes * codes.numel() + bias_bytes)
    if torch.is_grad_enabled():
        bits = part.bits().sum()
        return size + (bits - bits.detach()) / 8.0, ()
    shape, behind = part.layer.input_shape, part.layer.next_quantizer
    assert shape is not None
    read = _bytes(int(part.operand.max().item()))
    written = _bytes(32 if behind is None else int(source_bits(behind).max().item()))
    held = math.prod(shape[1:]) * read + _outputs(part) * _places_out(part) * written
    kernel = f"int{8 * max(read, code_bytes)}"
    rest = codes.numel(), code_bytes, bias_bytes, codes.numel() * part.places, kernel, held
    return torch.tensor(size), rest


def _element(codes: Tensor) -> int:
    """Bytes of the smallest integer, signed or not, that holds every code."""
    low, high = (int(v.item()) for v in torch.aminmax(codes)) if codes.numel() else (0, 0)
    sizes = (1, 2, 4)
    signed = next((n for n in sizes if -(1 << (8 * n - 1)) <= low and high < 1 << (8 * n - 1)), 8)
    return min(signed, next((n for n in sizes if low >= 0 and high < 1 << (8 * n)), 8))


def _bytes(width: int) -> int:
    return 1 if width <= 8 else 2 if width <= 16 else 4


def _outputs(part: Product) -> int:
    outputs = getattr(part.layer, "outputs", None)
    return int(outputs) if outputs is not None else part.operand.numel()


def _places_out(part: Product) -> int:
    layer, shape = part.layer, part.layer.input_shape
    if isinstance(layer, QuantConvTranspose2d):
        assert shape is not None
        return math.prod(layer.node(torch.empty(shape, device="meta"))[1][2:])
    return part.places
