"""Arrays of other frameworks in and out, without a copy. A framework is recognised when it is already imported."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import numpy as np

CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13  # DLPack device types
UNSIGNED, BFLOAT = 1, 4  # DLPack type codes
DEVICE_AT, CODE_AT = 8, 20  # bytes into a DLManagedTensor: device type (int32), type code (uint8)


class Back:
    """Takes a result of ours to the caller's kind. As a context, once: computes on the caller's CUDA stream."""

    __slots__ = ("_convert", "_stream")

    def __init__(self, convert: Callable[[Any], Any] | None, stream: AbstractContextManager[None] | None = None):
        self._convert, self._stream = convert, stream

    def __call__(self, array: Any) -> Any:
        return array if self._convert is None else self._convert(array)

    def __enter__(self) -> None:
        if self._stream is not None:
            self._stream.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._stream is not None:
            self._stream.__exit__(*error)


UNCHANGED = Back(None)


def to_native(op: str, arrays: dict[str, Any]) -> tuple[dict[str, Any], Back]:
    """NumPy or CuPy arrays in place of the caller's (None stays), and the way back to the kind of the first array."""
    for array in arrays.values():
        if array is not None and type(array) is not np.ndarray:
            break
    else:
        return arrays, UNCHANGED  # the usual case pays for this loop and nothing else
    first: Back | None = None
    native: dict[str, Any] = {}
    for name, array in arrays.items():
        if array is None:
            native[name] = None
            continue
        native[name], back = _import(f"{op}: {name} must be", array)
        first = first or back
    return native, first or UNCHANGED


def _import(must_be: str, array: Any) -> tuple[Any, Back]:
    if isinstance(array, np.ndarray):
        if isinstance(array, np.ma.MaskedArray | np.matrix):  # their operators mean something else than an array's
            raise TypeError(f"{must_be} a plain array, got {_type_name(array)}")
        return array.view(np.ndarray), UNCHANGED
    if isinstance(array, _loaded("cupy", "ndarray")):
        return array, UNCHANGED
    if isinstance(array, _loaded("torch", "Tensor")):
        return _import_torch(must_be, array)
    if isinstance(array, _loaded("jax", "Array")):
        return _import_jax(must_be, array)
    return _import_dlpack(must_be, array)


def _loaded(module: str, name: str) -> type | tuple[()]:
    return getattr(sys.modules.get(module), name, ())


def _import_torch(must_be: str, tensor: Any) -> tuple[Any, Back]:
    torch = sys.modules["torch"]
    if tensor.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{must_be} without requires_grad, got a tensor that autograd records: "
            "call the operator of pydeform.torch, or pass tensor.detach()"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_nested:
        raise TypeError(f"{must_be} a dense tensor, got layout {tensor.layout} and dtype {tensor.dtype}")
    device = tensor.device.type
    if device not in ("cpu", "cuda"):
        raise TypeError(f"{must_be} on the CPU or a CUDA device, got device {tensor.device}")
    # DLPack ignores the negative bit, so the sign would be lost in silence.
    plain = tensor.detach().resolve_conj().resolve_neg()
    is_bfloat16 = plain.dtype is torch.bfloat16
    try:
        if is_bfloat16:
            plain = plain.view(torch.int16)
        native = plain.numpy() if device == "cpu" else _cuda(must_be).from_dlpack(plain)
    except (TypeError, RuntimeError) as error:  # float8 and the like; fake tensors, tensors under vmap
        if "CuPy" in str(error):
            raise
        raise TypeError(
            f"{must_be} a tensor with memory that NumPy can read, got {type(tensor).__name__} of {tensor.dtype} "
            f"(inside torch.func or torch.compile call the operator of pydeform.torch): {error}"
        ) from None
    if is_bfloat16:
        native = native.view(_bfloat16())

    def export(result: Any) -> Any:
        if result.dtype == np.float16 or result.dtype.kind == "f":
            return torch.from_numpy(result) if device == "cpu" else torch.from_dlpack(result)
        bits = result.view(np.int16)
        return (torch.from_numpy(bits) if device == "cpu" else torch.from_dlpack(bits)).view(torch.bfloat16)

    if device == "cpu":
        return native, Back(export)
    stream = torch.cuda.current_stream(tensor.device)
    return native, Back(export, _cuda(must_be).on_stream(stream.device_index, stream.cuda_stream))


def _import_jax(must_be: str, array: Any) -> tuple[Any, Back]:
    jax = sys.modules["jax"]
    if isinstance(array, jax.core.Tracer):
        raise TypeError(
            f"{must_be} a concrete array, got a JAX tracer: inside jit, grad or vmap call the operator of pydeform.jax"
        )
    devices = array.devices()
    if len(devices) > 1 or not array.is_fully_addressable:
        raise TypeError(f"{must_be} on one device, got a JAX array sharded over {len(devices)} devices")
    (device,) = devices
    if device.platform != "cpu":
        native, _ = _import_dlpack(must_be, array)
        return native, Back(jax.dlpack.from_dlpack)

    def export(result: Any) -> Any:
        if result.dtype != np.float64:
            return jax.device_put(result, device, may_alias=True)
        # Without x64 JAX would turn it into float32, though the argument that decided the dtype was float64.
        with jax.enable_x64(True):
            return jax.device_put(result, device, may_alias=True)

    return np.asarray(array), Back(export)  # read-only, of the same memory; bfloat16 too, which DLPack would refuse


def _import_dlpack(must_be: str, array: Any) -> tuple[Any, Back]:
    library = sys.modules.get(type(array).__module__.partition(".")[0])
    exporter = getattr(array, "__dlpack__", None)
    if exporter is None or not hasattr(array, "__dlpack_device__"):
        exporter = _capsule_function(library, "to_dlpack", array)
        if exporter is None:
            raise TypeError(f"{must_be} an array (NumPy, CuPy, or with __dlpack__), got {_type_name(array)}")
        capsule = exporter()
        device = ctypes.c_int32.from_address(_address(capsule) + DEVICE_AT).value
        array = Capsule(capsule, device)
    else:
        device = int(array.__dlpack_device__()[0])
