"""What MXNet 1 writes: a list of arrays, then their names, in little endian.

file    u64 0x112, u64 0, u64 count, arrays, u64 count, names
name    u64 length, text
array   u32 version; of 2 and 3 i32 kind of storage, where 0 is dense; shape; i32 device, i32 its number; i32 dtype;
        bytes. An array that has not been filled ends after its shape
shape   i32 axes, i64 each. Before version 1, the version is the number of axes, u32 each
"""

from __future__ import annotations

import math
import struct
from typing import Any

import ml_dtypes
import numpy as np

MAGIC = 0x112
VERSIONS = {0xF993FAC8: 1, 0xF993FAC9: 2, 0xF993FACA: 3}
DTYPES = (
    "float32", "float64", "float16", "uint8", "int32", "int8", "int64", "bool", "int16", "uint16", "uint32", "uint64",
    "bfloat16",
)  # fmt: skip


def read(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        reader = _Reader(file.read())
    if reader.take("QQ") != (MAGIC, 0):
        raise ValueError("it is not a file of MXNet")
    arrays = [reader.array() for _ in range(reader.count())]
    names = [str(reader.bytes(reader.count()), "utf-8") for _ in range(reader.count())]
    if names and len(names) != len(arrays):
        raise ValueError(f"it holds {len(arrays)} arrays and {len(names)} names")
    plain = [name.removeprefix("arg:").removeprefix("aux:") for name in names] or [str(n) for n in range(len(arrays))]
    if len(set(plain)) < len(plain):
        raise ValueError("it holds two arrays of one name")
    return dict(zip(plain, arrays, strict=True))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def bytes(self, count: int) -> memoryview:
        found = memoryview(self._data)[self._at : self._at + count]
        if len(found) < count:
            raise ValueError(f"it ends where {count} bytes should follow")
        self._at += count
        return found

    def take(self, format: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{format}", self.bytes(struct.calcsize(f"<{format}")))

    def count(self) -> int:
        """Of things that have a byte each at least."""
        (count,) = self.take("Q")
        if count > len(self._data):
            raise ValueError(f"it cannot hold {count} of what it says")
        return int(count)

    def array(self) -> Any:
        (magic,) = self.take("I")
        version = VERSIONS.get(magic, 0)
        if version >= 2 and self.take("i") != (0,):
            raise ValueError("it holds a sparse array, which has no place in a layer")
        axes = self.take("i")[0] if version else magic
        if axes > 32:  # as many as NumPy had
            raise ValueError(f"it holds an array with {axes} axes")
        shape = self.take(f"{axes}{'q' if version else 'I'}") if axes > 0 else ()
        if axes < (0 if version == 3 else 1) or min(shape, default=0) < 0:
            raise ValueError("it holds an array that has not been filled")
        *_device, number = self.take("iii")
        if not 0 <= number < len(DTYPES):
            raise ValueError(f"it holds an array whose dtype has the unknown number {number}")
        dtype = np.dtype(getattr(ml_dtypes, DTYPES[number], DTYPES[number]))
        return np.frombuffer(self.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape).copy()
