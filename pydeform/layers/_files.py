"""Parameters, running statistics and the state of an optimiser, to and from files."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Protocol

import numpy as np

from pydeform import _arrays
from pydeform.layers import _layer

PREFIX = "optimiser/"  # of the names of its arrays in a file


class Stateful(Protocol):
    """An optimiser of `pydeform.optim`."""

    layer: _layer.Layer

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


def save(layer: _layer.Layer, path: str | os.PathLike[str], optimiser: Stateful | None = None) -> None:
    """Write the parameters and running statistics of `layer` to a `.npz` or `.safetensors` file.

    With its `optimiser`, the state of that too: training that loads both goes on as if it had not been interrupted,
    with the same bits. The file is complete or not there: a file that was there before is replaced at the end.

    Examples
    --------
    >>> import os, tempfile
    >>> from pydeform.layers import Linear, load, save
    >>> a, b = Linear(3, 2, rng=0), Linear(3, 2, rng=1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(a, os.path.join(folder, "a.npz"))
    ...     load(b, os.path.join(folder, "a.npz"))
    >>> bool((a.params["weight"] == b.params["weight"]).all())
    True
    """
    _check_layer("save", layer)
    suffix = _suffix("save", path, READERS)
    held: dict[str, Any] = {**layer.params, **layer.state}
    if optimiser is not None:
        _check_optimiser("save", layer, optimiser)
        held |= {PREFIX + name: array for name, array in optimiser.state().items()}
    arrays: dict[str, Any] = {
        name: np.array(_arrays.to_device("save", array, "cpu"), order="C") for name, array in held.items()
    }
    if suffix == ".npz":
        with _replacing(path) as file:
            np.savez(file, **arrays)
    else:
        content = _safetensors("save").save(arrays)
        with _replacing(path) as file:
            file.write(content)


def load(layer: _layer.Layer, path: str | os.PathLike[str], optimiser: Stateful | None = None) -> None:
    """Read into `layer`, and its `optimiser`, in place, what `save` wrote for a layer of the same structure.

    Values are converted to the layer's dtype and device. A file that cannot be read, a missing or unknown name, another
    shape or a value that does not fit is a ValueError, and then nothing has been changed. Without `optimiser` its state
    in the file is left there.
    """
    _check_layer("load", layer)
    if optimiser is not None:
        _check_optimiser("load", layer, optimiser)
    arrays = read("load", path, READERS)
    state = {name.removeprefix(PREFIX): arrays.pop(name) for name in list(arrays) if name.startswith(PREFIX)}
    targets = {**layer.params, **layer.state}
    found = _layer.fitting("load", os.fspath(path), layer.name, targets, arrays)
    if optimiser is not None:
        if not state:
            raise ValueError(f"load: {os.fspath(path)} must hold the state of an optimiser, got only that of a layer")
        optimiser.load_state(state)
    for name, array in found.items():
        targets[name][...] = array


def _check_layer(op: str, layer: Any) -> None:
    if not isinstance(layer, _layer.Layer):
        raise TypeError(f"{op}: layer must be a pydeform.layers.Layer, got {type(layer).__qualname__}")


def read(
    op: str, path: str | os.PathLike[str], readers: Mapping[str, Callable[[str], dict[str, Any]]]
) -> dict[str, Any]:
    """The arrays in a file, with the reader of its suffix. Whatever is wrong with its content is a ValueError."""
    suffix = _suffix(op, path, readers)
    try:
        return readers[suffix](os.fspath(path))
    except (OSError, ImportError):
        raise  # no such file, no permission, no package: it says so itself
    except Exception as error:  # each library and each kind of damage has its own
        raise ValueError(f"{op}: {os.fspath(path)} cannot be read as a {suffix} file: {error}") from error


def _read_npz(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    # .npz keeps the bytes of bfloat16 but not its name
    return {name: array.view(_bfloat16()) if array.dtype == "V2" else array for name, array in arrays.items()}


def _read_safetensors(path: str) -> dict[str, Any]:
    arrays: dict[str, Any] = _safetensors("load").load_file(path)
    return arrays


READERS: dict[str, Callable[[str], dict[str, Any]]] = {".npz": _read_npz, ".safetensors": _read_safetensors}


def _bfloat16() -> Any:
    import ml_dtypes  # not needed by who never sees one

    return ml_dtypes.bfloat16


@contextlib.contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once all has been written; a writer that dies leaves what was there."""
    target = os.path.realpath(path)
    part = f"{target}.{os.getpid()}-{secrets.token_hex(4)}.part"
    try:
        with open(part, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)
        raise


def _check_optimiser(op: str, layer: _layer.Layer, optimiser: Any) -> None:
    if not (hasattr(optimiser, "state") and hasattr(optimiser, "load_state")):
        raise TypeError(f"{op}: optimiser must be one of pydeform.optim, got {type(optimiser).__qualname__}")
    if optimiser.layer is not layer:
        raise ValueError(f"{op}: optimiser must be that of the layer, got that of another {optimiser.layer.name}")


def _suffix(op: str, path: str | os.PathLike[str], known: Iterable[str]) -> str:
    suffix = os.path.splitext(os.fspath(path))[1]
    if suffix not in known:
        *others, last = known
        raise ValueError(f"{op}: path must end in {', '.join(others)} or {last}, got {os.fspath(path)!r}")
    return suffix


def _safetensors(op: str) -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise ImportError(f"{op}: .safetensors files need the package safetensors (pip install safetensors)") from None
    return safetensors.numpy
