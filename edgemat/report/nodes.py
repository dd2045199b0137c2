"""What a report says of one tensor and of one node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Edge:
    """A code tensor: its ONNX value name, shape (None is the batch), format and proved interval of codes."""

    name: str
    shape: tuple[int | None, ...]
    format: str
    range: tuple[int, int]


@dataclass(frozen=True)
class Port(Edge):
    """Codes of an input or an output; `scale` is what one is worth where the file states a float32 for it."""

    scale: float | None = None


@dataclass(frozen=True)
class Ternary:
    """What a ternary layer's sums are made of.

    Attributes:
        nonzeros: largest number of weights of one output that are not 0.
        fan_in: weights of one output.
        input: interval of the input's codes.
        zeros: share of all weights that are 0.
    """

    nonzeros: int
    fan_in: int
    input: tuple[int, int]
    zeros: float


@dataclass(frozen=True)
class NodeReport:
    """One node of the lowered graph.

    Attributes:
        name: node name.
        operator: ONNX op_type.
        inputs: operands, weights and other constants included.
        outputs: results.
        final: interval of the finished accumulator, in codes.
        partial: interval of every partial sum in any order.
        hls_bits: bits of the two's complement accumulator in HLS: the stated one, or what holds `final`.
        c_bits: 16 (where the file states at most 16), 32 or 64, the C accumulator that holds `partial`; 0 if none does.
        carriers: types the ONNX body computes in.
        requantize: format of the fused Requantize, or "".
        multiplies: multiplications of one sample.
        additions: additions of one sample.
        shift_adds: shifted operands among them that take the place of multiplications by K-hot weights.
        weight_bits: bits of its weights.
        proved: whether no accumulator of any backend can overflow.
        accumulator: bits the file states for the sum (P), which native code uses exactly; 0 where it states none.
        needed_bits: bits that hold every partial sum in any order.
        ebops: effective bit operations of one sample (HGQ, arXiv 2405.00645).
        ternary: why a layer of ternary weights needs its accumulator: the largest number of weights of an output that
            are not 0, and the interval of the input's codes; None for other nodes.
    """

    name: str
    operator: str
    inputs: tuple[Edge, ...]
    outputs: tuple[Edge, ...]
    final: tuple[int, int]
    partial: tuple[int, int]
    hls_bits: int
    c_bits: int
    carriers: tuple[str, ...]
    requantize: str
    multiplies: int
    additions: int
    shift_adds: int
    weight_bits: int
    proved: bool
    accumulator: int = 0
    needed_bits: int = 0
    ebops: int = 0
    ternary: Ternary | None = None


@dataclass(frozen=True)
class StateReport:
    """A recurrent state: its name, shape of one sample, format, bits in all, and bytes the C library keeps."""

    name: str
    shape: tuple[int, ...]
    format: str
    bits: int
    c_bytes: int
