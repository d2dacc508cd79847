"""DLPack capsules of emulated device memory: a host's, whose headers say CUDA."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
UNSIGNED, BFLOAT = 1, 4
TENSOR_OFFSET = {b"dltensor": 0, b"dltensor_versioned": 32}


class _Header:
    """The start of a DLTensor: void *data; int32 device_type, device_id, ndim; uint8 type_code, bits."""

    def __init__(self, capsule: Any):
        api = ctypes.pythonapi
        api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, (ctypes.py_object,)
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
        name = api.PyCapsule_GetName(capsule)
        if name not in TENSOR_OFFSET:
            raise ValueError(f"a DLPack capsule that nobody has used yet is needed, got {name!r}")
        start = api.PyCapsule_GetPointer(capsule, name) + TENSOR_OFFSET[name]
        self.device = (ctypes.c_int32 * 2).from_address(start + 8)
        self.code = ctypes.c_uint8.from_address(start + 20)


def to_capsule(host: np.ndarray, device: int, max_version: tuple[int, int] | None) -> Any:
    bfloat = host.dtype.name == "bfloat16"
    if bfloat:
        host = host.view(np.uint16)
    versioned = max_version is not None and max_version >= (1, 0)
    capsule = host.__dlpack__(max_version=(1, 0)) if versioned else host.__dlpack__()
    header = _Header(capsule)
    header.device[:] = [CUDA, device]
    if bfloat:
        header.code.value = BFLOAT
    return capsule


class _OnHost:
    def __init__(self, capsule: Any):
        self.capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self.capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU, 0


def to_host(producer: Any, stream: int) -> np.ndarray:
    """The producer's memory, which is a host's in truth, as a NumPy array."""
    try:
        capsule = producer.__dlpack__(stream=stream, max_version=(1, 0), copy=None)
    except TypeError:  # an older producer
        capsule = producer.__dlpack__(stream=stream)
    header = _Header(capsule)
    header.device[:] = [CPU, 0]
    bfloat = header.code.value == BFLOAT
    if bfloat:
        header.code.value = UNSIGNED
    host = np.from_dlpack(_OnHost(capsule))
    if bfloat:
        import ml_dtypes

        host = host.view(ml_dtypes.bfloat16)
    return _writable(host)


class _Bytes:
    """An array's memory, writable although NumPy takes it from a capsule as read-only."""

    def __init__(self, host: np.ndarray, owner: Any):
        self._owner = owner
        self.__array_interface__ = {
            "data": (host.ctypes.data, False),
            "shape": host.shape,
            "strides": host.strides,
            "typestr": f"|V{host.itemsize}",
            "version": 3,
        }


def owned(host: np.ndarray, owner: Any) -> np.ndarray:
    """The same memory, which keeps `owner` alive."""
    return np.asarray(_Bytes(host, owner)).view(host.dtype)


def _writable(host: np.ndarray) -> np.ndarray:
    return owned(host, host)
