"""What people pass and what the graph wants: arrays or dicts, values or codes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgemat import formats
from edgemat.errors import FormatError
from edgemat.formats import Fixed
from edgemat.lower.graph import Graph
from edgemat.op import Tensor
from edgemat.ops.boundary import Quantize

Arrays = np.ndarray | Mapping[str, np.ndarray]


def by_name(graph: Graph, x: Arrays) -> dict[str, np.ndarray]:
    """One array, or a dict by input name, as a dict of arrays with equal batches.

    Raises:
        FormatError: for missing or unknown names, wrong shapes, empty or unequal batches.
    """
    names = graph.input_names
    if isinstance(x, Mapping):
        given = {str(k): np.asarray(v) for k, v in x.items()}
    elif len(names) == 1:
        given = {names[0]: np.asarray(x)}
    else:
        raise FormatError(f"one array was given for the inputs {', '.join(names)}, expected a dict by name")
    for name in given:
        if name not in names:
            raise FormatError(f"input {name!r} is unknown, expected {', '.join(names)}")
    batches = set()
    for index, name in enumerate(names):
        if name not in given:
            raise FormatError(f"input {name!r} is missing, expected {', '.join(names)}")
        wanted = graph.input_type(index).sample_shape
        if given[name].ndim == 0 or given[name].shape[1:] != wanted:
            raise FormatError(
                f"input {name!r} has shape {given[name].shape}, expected (N, {', '.join(map(str, wanted))})"
            )
        batches.add(given[name].shape[0])
    if len(batches) != 1 or 0 in batches:
        raise FormatError(f"the inputs hold {sorted(batches)} samples, expected one number of at least 1")
    return {name: given[name] for name in names}


def to_float32(name: str, array: np.ndarray) -> np.ndarray:
    """Real values as float32; NaN is refused."""
    if array.dtype.kind not in "fiub":
        raise FormatError(f"input {name!r} has dtype {array.dtype}, expected real numbers")
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and saturates
        values = array.astype(np.float32, copy=False)
    if array.dtype.kind == "f" and np.isnan(values.min(initial=0)):  # a minimum is NaN if any element is
        raise FormatError(f"input {name!r} holds NaN, expected numbers; clean the data")
    return values


def refuse_infinity(name: str, values: np.ndarray, fmt: Fixed) -> None:
    """Infinities saturate; under WRAP they have no meaning."""
    if np.isinf(values).any():
        raise FormatError(f"input {name!r} holds an infinity, which {fmt} cannot wrap; clean the data or use SAT")


def check_codes(name: str, array: np.ndarray, tensor: Tensor) -> np.ndarray:
    """Integer codes inside the input's format, as int64."""
    if array.dtype.kind not in "iu":
        raise FormatError(f"input {name!r} has dtype {array.dtype}, expected integer codes (codes=True was given)")
    low, high = tensor.lo, tensor.hi
    special = tensor.format.bipolar or tensor.format.widths is not None
    if special and not formats.holds_codes(array.astype(np.int64), tensor.format):
        raise FormatError(f"input {name!r} holds codes that {tensor.format} does not, expected codes of each channel")
    if array.size and (int(array.min()) < low or int(array.max()) > high):
        raise FormatError(
            f"input {name!r} holds codes {int(array.min())} to {int(array.max())}, expected {low} to {high} for "
            f"{tensor.format}"
        )
    return array.astype(np.int64)


def refuse_index(graph: Graph, name: str, values: np.ndarray, tensor: Tensor) -> None:
    """An input whose quantiser states a limit is an index: it is a row or it is refused, never clipped."""
    if graph.quantizers[name].attrs["limit"] is None or not values.size:
        return
    low, high = values.min(), values.max()
    if low < tensor.lo or high > tensor.hi or (values != np.floor(values)).any():
        raise FormatError(
            f"input {name!r} holds indices from {low:g} to {high:g}, expected whole numbers from {tensor.lo} to "
            f"{tensor.hi}"
        )


def input_codes(graph: Graph, index: int, values: np.ndarray) -> np.ndarray:
    """int64 codes of float32 values of input `index`, as the file's own Quantize makes them."""
    call = graph.quantizers[graph.input_names[index]]
    return call.op.compute(call, values)


def input_values(graph: Graph, index: int, codes: np.ndarray) -> np.ndarray:
    """float32 values of input `index` that the file's own Quantize turns into these codes."""
    call = graph.quantizers[graph.input_names[index]]
    assert isinstance(call.op, Quantize)
    return call.op.values(call, codes)


def output_scale(graph: Graph, index: int) -> np.float32 | None:
    """The real scale of output `index`, or None where its format says what a code is worth."""
    return graph.scale(graph.output_names[index])


def output_values(graph: Graph, index: int, codes: np.ndarray) -> np.ndarray:
    """Values of codes of output `index`, in any carrier, as the file's own Dequantize makes them."""
    if output_scale(graph, index) is None:
        return formats.dequantize(codes, graph.output_type(index).format)
    call = graph.dequantizers[graph.output_names[index]]
    return call.op.compute(call, codes)


def to_codes(graph: Graph, x: Arrays, codes: bool) -> dict[str, np.ndarray]:
    """Codes of the inputs by *code tensor* name, quantised as the file's own Quantize does."""
    made = {}
    for index, (name, array) in enumerate(by_name(graph, x).items()):
        tensor = graph.input_type(index)
        if codes:
            made[tensor.name] = check_codes(name, array, tensor)
        else:
            values = to_float32(name, array)
            if tensor.format.overflow == "WRAP":
                refuse_infinity(name, values, tensor.format)
            refuse_index(graph, name, values, tensor)
            made[tensor.name] = input_codes(graph, index, values)
    return made


def single(results: dict[str, np.ndarray]) -> np.ndarray | dict[str, np.ndarray]:
    """One output as an array, several as a dict."""
    return next(iter(results.values())) if len(results) == 1 else results
