"""Linear with weights that stay in their file as onnxruntime's ``com.microsoft.MatMulNBits``: four bits a weight.

The kernel computes ``x @ ((q - 8) * scale)`` in float32 for fields ``q = w + 8`` of four bits. Codes of x and w are
integers, a scale is the power of two of the epilogue's shift, and every partial sum stays below 2**24, so the result
is exact in any order by the proof in `epilogue`. ``accuracy_level=1`` forbids the kernels that quantise x.

A trit takes four bits in memory, not eight as in `quantize_linear`, whose kernel is faster: weights that a file keeps
in its model are taken by that one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from edgemat.body import Coded
from edgemat.codes import Codes
from edgemat.op import Call
from edgemat.ops.linear import plain_stored
from edgemat.sim.carriers import SINGLE, SINGLE_LIMIT, Carried, FusedBody
from edgemat.sim.rewrites.epilogue import fold

BITS, ZERO = 4, 8
BLOCK = 256
"""Largest number of weights that share a scale, four bytes; all of a row have the same."""
PART = 1 << 22
"""About as many weights are one node's. onnxruntime copies a node's weights into the kernel's own order while what it
copies is still mapped: a head of many outputs, which may be a fifth of the model, would be in memory twice."""


def nibble_linear(body: FusedBody, call: Call, x: list[Carried]) -> Carried | None:
    """Rewrites a Linear whose weights of at most 4 bits stay in their file."""
    stored = plain_stored(call)
    if stored is None or stored.survey.lo < -ZERO or stored.survey.hi >= ZERO:
        return None
    folded = fold(call, call.bounds.magnitude)
    if folded is None or x[0].tensor.magnitude >= SINGLE_LIMIT:
        return None
    if len(x[0].tensor.shape) > 2 and folded.scale.size > 1:
        return None
    scale = np.broadcast_to(folded.scale, stored.shape[:1]).astype(np.float32)
    values = body.cast(x[0].coded(), SINGLE).value
    parts = [_product(body, values, stored.part(*rows), scale[slice(*rows)]) for rows in parts_of(stored.shape)]
    value = parts[0] if len(parts) == 1 else body.op("Concat", *parts, axis=-1)
    bias = call.constant(2)
    offset = folded.constant if bias is None else bias.astype(np.float64) * folded.scale + folded.constant
    coded = Coded(value, SINGLE)
    if np.any(offset):
        coded = body.binary("Add", coded, body.number(offset, coded))
    return folded.carried(body, call, coded)


def _product(body: FusedBody, x: ir.Value, weights: Codes, scale: np.ndarray) -> ir.Value:
    """Sums of products with rows of weights, each times the scale of its row."""
    outputs, inputs = weights.shape
    block = block_size(inputs)
    blocks = -(-inputs // block)
    return body.microsoft(
        "MatMulNBits",
        x,
        body.large(packed(weights, block), (outputs, blocks, block * BITS // 8), np.dtype(np.uint8)),
        body.const(np.repeat(scale[:, None], blocks, axis=1), SINGLE),
        K=inputs,
        N=outputs,
        bits=BITS,
        block_size=block,
        accuracy_level=1,
    )


def parts_of(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """First row and the row behind the last of each node's weights, as even as possible."""
    count = -(-shape[0] * shape[1] // PART)
    step = max(1, -(-shape[0] // count))
    for first in range(0, shape[0], step):
        yield first, min(first + step, shape[0])


def block_size(inputs: int) -> int:
    """Weights that share a scale: a power of two from 16 to `BLOCK`."""
    size = 16
    while size < min(inputs, BLOCK):
        size *= 2
    return size


def packed(stored: Codes, block: int) -> Iterator[np.ndarray]:
    """Rows of fields ``w + 8``, two to a byte, the first in the lower half; a row is filled up with zeros' fields."""
    width = -(-stored.shape[1] // block) * block
    for rows in stored.blocks():
        fields = np.full((len(rows), width), ZERO, np.uint8)
        fields[:, : rows.shape[1]] = rows.astype(np.int8) + np.int8(ZERO)
        yield fields[:, ::2] | fields[:, 1::2] << BITS
