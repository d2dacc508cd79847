"""What torch.save writes, without PyTorch and without trust: of a pickle's imports only those that make tensors exist.

Since PyTorch 1.6 a file is a zip archive: `data.pkl`, and the bytes of each storage in a member of its own. Before, and
on request until now, it was pickles one after the other, then the storages.
"""

from __future__ import annotations

import collections
import functools
import pickle
import struct
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that is no archive
# What torch calls the storages of a dtype; of the dtypes that came later, storages know only bytes.
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}  # fmt: skip
LATER = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")


DTYPES = {*STORAGES.values(), *LATER}


# All that comes out of a pickle, beside numbers, texts and what holds them.
class Storage(NamedTuple):
    key: str
    dtype: str  # "": only its tensors know


class Tensor(NamedTuple):
    storage: Storage
    dtype: str
    offset: int  # in elements, as the strides
    size: tuple[int, ...]
    stride: tuple[int, ...]
    changed: dict[str, bool] | None  # of what the bytes are the negative, or the conjugate


def read(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        value, memory = _read_archive(file) if zipfile.is_zipfile(file) else _read_stream(file)
        found: dict[str, Any] = {}
        for name, tensor in _named(value):
            if name in found:
                raise ValueError(f"it holds two arrays of the name {name}")
            found[name] = _array(tensor, memory(tensor.storage))
    return found


def _named(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _named(item, f"{name}.{key}" if name else str(key))


Memory = Callable[[Storage], Any]  # the bytes of a storage, the same for all its tensors


def _read_archive(file: BinaryIO) -> tuple[Any, Memory]:
    archive = zipfile.ZipFile(file)
    members = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in members if name.endswith("data.pkl")]
    if len(roots) != 1 or f"{roots[0]}constants.pkl" in members:
        raise ValueError("it is no archive of torch.save (one of torch.jit.save holds a program)")
    (root,) = roots
    if f"{root}byteorder" in members:
        _check_order(archive.read(f"{root}byteorder") == b"little")

    @functools.cache
    def memory(key: str) -> Any:
        return np.frombuffer(bytearray(archive.read(f"{root}data/{key}")), np.uint8)

    with archive.open(f"{root}data.pkl") as pickled:
        return _Unpickler(pickled).load(), lambda storage: memory(storage.key)


def _read_stream(file: BinaryIO) -> tuple[Any, Memory]:
    file.seek(0)
    if file.read(2) == b"PK":
        raise ValueError("it is an archive whose end is missing")
    file.seek(0)
    if tarfile.is_tarfile(file):
        raise ValueError("it is a tar archive, of PyTorch before 0.2: save it again with a PyTorch that reads it")
    file.seek(0)
    if _Unpickler(file).load() != MAGIC:
        raise ValueError("it is no file of torch.save")
    _protocol, machine = _Unpickler(file).load(), _Unpickler(file).load()
    _check_order(machine["little_endian"])
    unpickler = _Unpickler(file)
    value, keys = unpickler.load(), _Unpickler(file).load()
    memory = {}
    for key in keys:
        (count,) = struct.unpack("<q", file.read(8))
        storage = unpickler.storages[key]
        expected = count * (_dtype(storage.dtype).itemsize if storage.dtype else 1)
        memory[key] = np.frombuffer(bytearray(file.read(expected)), np.uint8)
        if len(memory[key]) != expected:
            raise ValueError(f"it ends within storage {key}")
    return value, lambda storage: memory[storage.key]


def _check_order(is_little: bool) -> None:
    if not is_little:
        raise ValueError("it was written by a machine whose bytes have another order")


class _Unpickler(pickle.Unpickler):
    """Whatever a pickle imports goes through `find_class`; whatever it calls, it has imported."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, Storage] = {}
        # Made for this pickle alone, which may set their attributes.
        self._known: dict[tuple[str, str], Any] = {
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): tuple,
            ("argparse", "Namespace"): types.SimpleNamespace,  # the options of a training, in many a checkpoint
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, _grad, _hooks, changed=None: (
                Tensor(storage, storage.dtype, offset, size, stride, changed)
            ),
            ("torch._utils", "_rebuild_tensor_v3"): (
                lambda storage, offset, size, stride, _grad, _hooks, dtype, changed=None: Tensor(
                    storage, dtype, offset, size, stride, changed
                )
            ),
            ("torch.storage", "UntypedStorage"): "",
        }
        self._known |= {("torch", f"{name}Storage"): dtype for name, dtype in STORAGES.items()}
        self._known |= {("torch", dtype): dtype for dtype in DTYPES}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise ValueError(
                f"it wants to import {module}.{name}, and only tensors are read; nothing was imported or run. "
                "Who trusts it can save what is needed: torch.save(model.state_dict(), path)"
            )
        return self._known[module, name]

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, _count, *view = pid
        if kind != "storage" or view not in ([], [None]):
            raise ValueError(f"it holds a {kind} of a kind that is not known")
        storage = Storage(key, dtype)
        self.storages.setdefault(key, storage)
        return storage


def _dtype(name: str) -> Any:
    if name not in DTYPES:
        raise ValueError(f"it holds a tensor of the unknown dtype {name!r}")
    return np.dtype(getattr(ml_dtypes, name, name))


def _array(tensor: Tensor, memory: Any) -> Any:
    """A view of the storage's memory, as it is of torch's."""
    _, dtype, offset, size, stride, changed = tensor
    if changed:
        raise ValueError(f"it holds a tensor that is {' and '.join(changed)}: save tensor.resolve_conj().resolve_neg()")
    kind = _dtype(dtype)
    if len(size) != len(stride) or min(offset, *size, *stride, 0) < 0:
        raise ValueError(f"it holds a tensor of size {size} with strides {stride} at {offset}, which none can have")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.empty(size, kind)
    if last >= len(memory) // kind.itemsize:
        raise ValueError(f"it holds a tensor of size {size} with strides {stride} that reaches beyond its storage")
    return np.ndarray(size, kind, memory, offset * kind.itemsize, [step * kind.itemsize for step in stride])
