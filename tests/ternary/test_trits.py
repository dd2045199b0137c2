"""Packed trits: the documented bytes, there and back, and what is refused."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from edgemat.errors import FormatError
from edgemat.trits import PER_BYTE, pack_trits, packed_size, unpack_trits


def written_out(row: list[int], bits: str) -> list[int]:
    """The bytes of a row as the layout is written down, one trit after the other."""
    per = PER_BYTE[bits]
    row = row + [0] * (-len(row) % per)
    made = []
    for start in range(0, len(row), per):
        part = row[start : start + per]
        if bits == "2":
            made.append(sum(({0: 0b00, 1: 0b01, -1: 0b11}[t]) << (2 * i) for i, t in enumerate(part)))
        else:
            made.append(sum((t + 1) * 3**i for i, t in enumerate(part)))
    return made


def test_the_bytes_of_the_documentation() -> None:
    assert pack_trits(np.array([1, -1, 0, 1])).tolist() == [0b01_00_11_01]
    assert pack_trits(np.array([1, -1, 0, 1, 0]), "1.6").tolist() == [2 + 0 * 3 + 1 * 9 + 2 * 27 + 1 * 81]
    assert pack_trits(np.zeros(7, np.int64), "1.6").tolist() == [121, 121]
    assert pack_trits(np.zeros(7, np.int64), "2").tolist() == [0, 0]


@pytest.mark.parametrize("bits", ["2", "1.6"])
@pytest.mark.parametrize("shape", [(1,), (3, 4), (2, 5), (4, 3, 11), (2, 0), (0, 3), (7, 641)])
def test_packing_is_undone_and_is_what_is_written_down(bits: str, shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(sum(shape)).integers(-1, 2, shape)
    packed = pack_trits(codes, bits)
    assert packed.shape == (*shape[:-1], packed_size(shape[-1], bits)) and packed.dtype == np.uint8
    assert np.array_equal(unpack_trits(packed, shape[-1], bits), codes)
    rows = codes.reshape(-1, shape[-1]).tolist() if codes.size else []
    assert packed.reshape(-1, packed.shape[-1] or 1)[: len(rows)].tolist() == [written_out(r, bits) for r in rows]


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_control_one_changed_bit_is_seen(bits: str) -> None:
    codes = np.random.default_rng(0).integers(-1, 2, (5, 20))
    packed = pack_trits(codes, bits)
    for bit in range(8):
        damaged = packed.copy()
        damaged[2, 1] ^= 1 << bit
        with contextlib.suppress(FormatError):
            assert not np.array_equal(unpack_trits(damaged, 20, bits), codes)


def test_every_byte_of_five_trits_is_another() -> None:
    digits = np.stack(np.meshgrid(*[[-1, 0, 1]] * 5, indexing="ij"), -1).reshape(-1, 5)
    assert sorted(pack_trits(digits, "1.6").reshape(-1).tolist()) == list(range(243))


def test_what_is_no_trit_is_refused() -> None:
    with pytest.raises(FormatError, match="the code 2 is no trit"):
        pack_trits(np.array([[0, 2]]))
    with pytest.raises(FormatError, match="the code -2 is no trit"):
        pack_trits(np.array([[0, -2]]), "1.6")
    with pytest.raises(FormatError, match="rows of integers"):
        pack_trits(np.array([0.0, 1.0]))
    with pytest.raises(FormatError, match=r"'1\.5' bits"):
        pack_trits(np.array([0]), "1.5")
    with pytest.raises(FormatError, match="0b10"):
        unpack_trits(np.array([0b10], np.uint8), 4)
    with pytest.raises(FormatError, match="243"):
        unpack_trits(np.array([243], np.uint8), 5, "1.6")
    with pytest.raises(FormatError, match="behind the last trit"):
        unpack_trits(np.array([0b01000000], np.uint8), 3)
    with pytest.raises(FormatError, match="rows of 2 bytes for 5 trits"):
        unpack_trits(np.array([0], np.uint8), 5)
