"""Parameters and running statistics to and from files."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from pydeform.layers import _layer


def save(layer: _layer.Layer, path: str | os.PathLike[str]) -> None:
    """Write the parameters and running statistics of `layer` to a `.npz` or `.safetensors` file.

    >>> import os, tempfile
    >>> from pydeform.layers import Linear, load, save
    >>> a, b = Linear(3, 2, rng=0), Linear(3, 2, rng=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(a, os.path.join(folder, "a.npz"))
    ...     load(b, os.path.join(folder, "a.npz"))
    >>> bool((a.params["weight"] == b.params["weight"]).all())
    True
    """
    held = {**layer.params, **layer.state}
    arrays: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in held.items()}
    if _suffix("save", path) == ".npz":
        np.savez(os.fspath(path), **arrays)
    else:
        _safetensors("save").save_file(arrays, os.fspath(path))


def load(layer: _layer.Layer, path: str | os.PathLike[str]) -> None:
    """Read into `layer`, in place, what `save` wrote for a layer of the same structure.

    Values are converted to the layer's dtype. A missing or unknown name or another shape is a ValueError, and then
    nothing has been changed.
    """
    if _suffix("load", path) == ".npz":
        with np.load(os.fspath(path), allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    else:
        arrays = _safetensors("load").load_file(os.fspath(path))
    targets = {**layer.params, **layer.state}
    missing, unknown = sorted(targets.keys() - arrays.keys()), sorted(arrays.keys() - targets.keys())
    if missing or unknown:
        raise ValueError(
            f"load: {os.fspath(path)} must hold the arrays of {layer.name}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
        )
    for name, target in targets.items():
        if arrays[name].shape != target.shape:
            raise ValueError(
                f"load: {name} in {os.fspath(path)} must have shape {target.shape}, got {arrays[name].shape}"
            )
    for name, target in targets.items():
        array = arrays[name]
        # .npz keeps the bytes of bfloat16 but not its name
        target[...] = array.view(target.dtype) if array.dtype.kind == "V" else array


def _suffix(op: str, path: str | os.PathLike[str]) -> str:
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{op}: path must end in .npz or .safetensors, got {os.fspath(path)!r}")
    return suffix


def _safetensors(op: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(f"{op}: .safetensors files need the package safetensors (pip install safetensors)") from None
    return safetensors.numpy
