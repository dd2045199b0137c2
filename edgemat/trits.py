"""Ternary codes in memory: two bits a trit, four to a byte, or five trits in a byte (1.6 bits a trit).

A row (the last axis) is packed by itself and begins with a byte of its own; places behind its last trit hold the
code 0.

``"2"``: byte ``sum_{i<4} (t_i & 3) << 2*i``: the first trit in the lowest bits, each a two's complement number of two
bits (0b00 is 0, 0b01 is +1, 0b11 is -1). 0b10 never occurs.

``"1.6"``: byte ``sum_{i<5} (t_i + 1) * 3**i``: the first trit is the least significant digit to the base 3. Bytes lie
between 0 and 242; 121 is five zeros.
"""

from __future__ import annotations

import numpy as np

from edgemat.errors import FormatError

PER_BYTE = {"2": 4, "1.6": 5}
"""Trits in a byte, by the number of bits a trit takes."""

_POWERS = 3 ** np.arange(5)
_DIGITS = (np.arange(243)[:, None] // _POWERS % 3 - 1).astype(np.int8)
_AT_ONCE = 1 << 24


def packed_size(count: int, bits: str = "2") -> int:
    """Bytes that a row of `count` trits takes.

    Raises:
        FormatError: for another packing than ``"2"`` or ``"1.6"``.
    """
    per = _per_byte(bits)
    return (count + per - 1) // per


def pack_trits(codes: np.ndarray, bits: str = "2") -> np.ndarray:
    """Packs each row of `codes`.

    Args:
        codes: Integers -1, 0 and +1 of any shape with at least one axis; rows lie on the last.
        bits: ``"2"`` or ``"1.6"``.

    Returns:
        uint8 of shape ``[..., packed_size(n)]`` for rows of n trits.

    Raises:
        FormatError: for another code or packing.
    """
    per = _per_byte(bits)
    codes = np.asarray(codes)
    if codes.ndim == 0 or codes.dtype.kind not in "iu":
        raise FormatError(f"trits of shape {codes.shape} and type {codes.dtype} were given, expected rows of integers")
    rows = codes.reshape(-1, codes.shape[-1]) if codes.size else codes.reshape(0, codes.shape[-1])
    size = packed_size(codes.shape[-1], bits)
    packed = np.empty((len(rows), size), np.uint8)
    step = max(1, _AT_ONCE // max(1, codes.shape[-1]))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        low, high = int(part.min(initial=0)), int(part.max(initial=0))
        if low < -1 or high > 1:
            raise FormatError(f"the code {low if low < -1 else high} is no trit, expected -1, 0 or +1")
        padded = np.zeros((len(part), size * per), np.int8)
        padded[:, : part.shape[1]] = part
        groups = padded.reshape(len(part), size, per)
        if bits == "2":
            fields = (groups & 3).astype(np.uint8)
            packed[start : start + step] = (fields << np.arange(0, 8, 2, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        else:
            packed[start : start + step] = ((groups + 1).astype(np.uint8) * _POWERS.astype(np.uint8)).sum(
                -1, dtype=np.uint8
            )
    return packed.reshape(*codes.shape[:-1], size)


def unpack_trits(packed: np.ndarray, count: int, bits: str = "2") -> np.ndarray:
    """The trits of rows that `pack_trits` packed.

    Args:
        packed: uint8 of shape ``[..., packed_size(count)]``.
        count: Trits of a row.
        bits: ``"2"`` or ``"1.6"``.

    Returns:
        int8 of shape ``[..., count]``.

    Raises:
        FormatError: if rows have another size, a byte is none that packing makes, or a place behind the last trit is
            not 0.
    """
    per = _per_byte(bits)
    packed = np.asarray(packed)
    if packed.dtype != np.uint8 or packed.ndim == 0 or packed.shape[-1] != packed_size(count, bits):
        raise FormatError(
            f"packed trits of shape {packed.shape} and type {packed.dtype} were given, expected uint8 with rows of "
            f"{packed_size(count, bits)} bytes for {count} trits"
        )
    if bits == "2":
        fields = ((packed[..., None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3).astype(np.int8)
        if packed.size and int((fields == 2).max()):
            raise FormatError("a field of packed trits is 0b10, expected 0b00, 0b01 or 0b11; the data are damaged")
        trits = np.where(fields == 3, np.int8(-1), fields)
    else:
        if packed.size and int(packed.max()) > 242:
            raise FormatError(f"a byte of packed trits is {int(packed.max())}, expected 0 to 242; the data are damaged")
        trits = _DIGITS[packed]
    trits = trits.reshape(*packed.shape[:-1], packed.shape[-1] * per)
    if trits[..., count:].any():
        raise FormatError("places behind the last trit are not 0, expected zeros; the data are damaged")
    return np.ascontiguousarray(trits[..., :count])


def _per_byte(bits: str) -> int:
    if bits not in PER_BYTE:
        raise FormatError(f"trits of {bits!r} bits were asked for, expected {' or '.join(map(repr, PER_BYTE))}")
    return PER_BYTE[bits]
