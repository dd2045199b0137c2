"""The data file beside a lowered file: large weights one after the other, written and read in blocks.

ONNX calls this external data: an initializer states the file's name, an offset and a length. The model states the
size and the SHA-256 of the whole file; a reader checks both before it believes a code. The name holds the beginning of
the digest, so that a model never meets another model's weights: a new export puts a new file beside the old one, then
replaces the model in one step, then removes the old data file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edgemat.codes import Codes
from edgemat.errors import LoweringError
from edgemat.lower.typing import STORED

SIZE_KEY = "edgemat_data_bytes"
DIGEST_KEY = "edgemat_data_sha256"
ALIGNMENT = 4096
"""Tensors begin at multiples of a page, so that onnxruntime can map them."""

SMALLEST = 1024
"""Initializers of fewer bytes stay in the model."""

STORABLE = ("int8", "uint8", "int32", "int64")
_CHUNK = 1 << 18


class DataFile:
    """An open file of codes. It is opened once: what is read later is of the same file, whatever its name then means.

    Raises:
        LoweringError: if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if not path.is_file():
                raise FileNotFoundError(errno.ENOENT, "there is no such file")
            self._file = path.open("rb")
            self.size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise LoweringError(
                f"the data file {path} cannot be read ({error.strerror or error}), expected it beside the model"
            ) from error

    def digest(self) -> str:
        """SHA-256 of the whole file, hexadecimal."""
        found = hashlib.sha256()
        for offset in range(0, self.size, _CHUNK):
            found.update(self._bytes(offset, min(_CHUNK, self.size - offset)))
        return found.hexdigest()

    def codes(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> Codes:
        """The codes of a tensor at an offset."""
        width = int(np.prod(shape[1:], dtype=np.int64)) * dtype.itemsize
        stored = dtype.newbyteorder("<")

        def read(first: int, last: int) -> np.ndarray:
            data = self._bytes(offset + first * width, (last - first) * width)
            return np.frombuffer(data, stored).astype(dtype, copy=False).reshape(last - first, *shape[1:])

        return Codes(shape, dtype, read)

    def _bytes(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(length)
        if len(data) != length:
            raise LoweringError(f"the data file {self.path} ended while it was read, expected {self.size} bytes")
        return data

    def close(self) -> None:
        """Closes it; its codes can no longer be read."""
        self._file.close()


class DataWriter:
    """Writes a data file under a temporary name in the model's folder; `committed` gives it its own.

    Args:
        model: The model's path; its folder is made.

    Raises:
        LoweringError: if the file cannot be made.
    """

    def __init__(self, model: Path) -> None:
        self.model = model
        try:
            model.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=f".{model.name}.", suffix=".data", dir=model.parent)
        except OSError as error:
            raise unwritable(model, error) from error
        self.path: Path | None = Path(name)
        self._file = os.fdopen(handle, "wb")
        self._digest = hashlib.sha256()
        self._size = 0
        self._data = DataFile(self.path)
        self._kept: dict[bytes, tuple[int, int, Codes]] = {}

    def tensor(self, codes: Codes, dtype: np.dtype, name: str) -> tuple[ir.ExternalTensor, Codes]:
        """Appends codes block by block; equal ones are stored once, at one offset.

        Args:
            codes: What to store.
            dtype: Type to store them in.
            name: Of the initializer.

        Returns:
            The tensor for the model, and its codes as the file now holds them.

        Raises:
            LoweringError: if a code does not fit the type, or the disk is full.
        """
        limits, begin = np.iinfo(dtype), self._size
        before, own = self._digest.copy(), hashlib.sha256(repr((codes.shape, dtype.str)).encode())
        try:
            for block in codes.blocks():
                if block.min() < limits.min or block.max() > limits.max:
                    raise LoweringError(f"constant {name!r} holds {block.dtype} that do not fit {dtype} codes")
                data = block.astype(dtype.newbyteorder("<"), copy=False).tobytes()
                own.update(data)
                self._append(data)
            kept = self._kept.get(own.digest())
            length = self._size - begin
            if kept is not None:
                self._file.truncate(begin)
                self._file.seek(begin)
                self._digest, self._size = before, begin
            else:
                self._append(bytes(-self._size % ALIGNMENT))
                kept = begin, length, self._data.codes(begin, codes.shape, dtype)
                self._kept[own.digest()] = kept
            self._file.flush()
        except OSError as error:
            raise unwritable(self.model, error) from error
        return external(self.model.parent, "data", kept[0], kept[1], kept[2], name), kept[2]

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def close(self, model: ir.Model) -> None:
        """Finishes the file; states its name, size and digest in the model."""
        digest = self._digest.hexdigest()
        model.metadata_props[SIZE_KEY] = str(self._size)
        model.metadata_props[DIGEST_KEY] = digest
        self.name = f"{self.model.name}.{digest[:16]}.data"
        for value in model.graph.initializers.values():
            codes, tensor = value.meta.get(STORED), value.const_value
            if codes is not None:
                assert isinstance(tensor, ir.ExternalTensor) and tensor.offset is not None
                value.const_value = external(
                    self.model.parent, self.name, tensor.offset, tensor.length or 0, codes, value.name or ""
                )
        os.fsync(self._file.fileno())
        self._file.close()

    @contextlib.contextmanager
    def committed(self) -> Iterator[None]:
        """Gives the file its name while the model is replaced; takes it away again where that fails.

        An earlier model and its data are as they were until the model is replaced; then the earlier data go.
        """
        assert self.path is not None
        final = self.model.parent / self.name
        known = final.exists()
        os.chmod(self.path, 0o644)
        os.replace(self.path, final)
        self.path = None
        try:
            yield
        except BaseException:
            if not known:
                final.unlink(missing_ok=True)
            raise
        remove_others(self.model, self.name)

    def discard(self) -> None:
        """Ends the work: closes what is open, removes what was not committed."""
        self._file.close()
        self._data.close()
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def external(folder: Path, name: str, offset: int, length: int, codes: Codes, tensor: str) -> ir.ExternalTensor:
    """A tensor of the model whose data lie in the data file."""
    kind = ir.DataType.from_numpy(codes.dtype)
    return ir.ExternalTensor(name, offset, length, kind, shape=ir.Shape(codes.shape), name=tensor, base_dir=str(folder))


def unwritable(target: Path, error: OSError) -> LoweringError:
    """The refusal of a place that cannot be written."""
    return LoweringError(f"{target} cannot be written ({error.strerror or error}); make room or choose another place")


def remove_others(model: Path, kept: str | None = None) -> None:
    """Removes the data files of earlier exports under the model's name."""
    pattern = re.compile(re.escape(model.name) + r"\.[0-9a-f]{16}\.data")
    for path in model.parent.iterdir():
        if path.name != kept and pattern.fullmatch(path.name):
            with contextlib.suppress(OSError):
                path.unlink()


def attach(model: ir.Model, path: Path, values: Iterable[ir.Value]) -> None:
    """Opens and checks the data file of a model that was read, and gives its initializers their codes.

    Raises:
        LoweringError: if the file is missing, has another size or digest, or a tensor does not lie in it as stated.
    """
    tensors = [(v, v.const_value) for v in values if isinstance(v.const_value, ir.ExternalTensor)]
    stated, digest = model.metadata_props.get(SIZE_KEY), model.metadata_props.get(DIGEST_KEY)
    if not tensors:
        if stated is not None or digest is not None:
            raise LoweringError(
                f"{path} states a data file that no initializer lies in, expected none; export it again"
            )
        return
    names = sorted({str(tensor.location) for _, tensor in tensors})
    name = names[0]
    if len(names) != 1 or name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise LoweringError(f"{path} keeps weights in {names}, expected one file name, of a file beside the model")
    data = DataFile(path.parent / name)
    if str(data.size) != stated:
        raise LoweringError(
            f"the data file {data.path} has {data.size} bytes, expected {str(stated)[:20]}: it is damaged or another "
            "model's; copy it once more with its model, or export the model again"
        )
    places = []
    for value, tensor in tensors:
        kind, shape = tensor.dtype.numpy(), tuple(int(d) for d in tensor.shape.numpy())
        begin, length = tensor.offset or 0, int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if kind.name not in STORABLE or tensor.length != length or begin < 0 or begin + length > data.size:
            raise LoweringError(
                f"initializer {value.name!r} ({kind.name}, {length} bytes) lies at {begin} for {tensor.length} bytes, "
                f"expected integer codes within the {data.size} bytes of {name}"
            )
        places.append((begin, begin + length, value.name))
        value.meta[STORED] = codes = data.codes(begin, shape, kind)
        value.const_value = external(path.parent, name, begin, length, codes, value.name or "")
    ends = sorted(places, key=lambda place: place[:2])
    for (_, end, first), (begin, _, second) in itertools.pairwise(ends):
        if begin < end:
            raise LoweringError(f"initializers {first!r} and {second!r} overlap in {name}, expected one place for each")
    if data.size > sum(end - begin + ALIGNMENT for begin, end, _ in places):
        raise LoweringError(f"the data file {data.path} has {data.size} bytes, expected only what its tensors take")
    if data.digest() != digest:
        raise LoweringError(
            f"the data file {data.path} does not hold the weights that the model was exported with (its SHA-256 "
            "differs); copy it once more with its model, or export the model again"
        )
