"""Files of arrays by name, of every kind."""

from __future__ import annotations

import os
import zipfile
from typing import Any

from pydeform.layers import _files
from pydeform.weights import _mxnet_file, _torch_file


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The arrays in a file, by their names there. Nothing that a file may contain is imported or run.

    Parameters
    ----------
    path : of a file of one of these kinds
        .safetensors        needs the package safetensors
        .npz                of NumPy, and what MXNet 2 writes as .params
        .pth .pt .bin       of torch.save, as it writes since PyTorch 1.6 and as it did before; PyTorch is not needed
        .params             of MXNet 1 (mx.nd.save, save_parameters, save_checkpoint)

    Returns
    -------
    dict of NumPy arrays
        What lies in dicts or lists within a file has names with dots, as "state_dict.conv1.weight". MXNet's "arg:" and
        "aux:" are left out. Tensors that share memory still do.

    Raises
    ------
    ValueError
        Not such a file, a damaged one, or one that holds more than tensors, numbers and texts: the error names the
        first object that would have been imported.
    OSError
        The file cannot be read.
    ImportError
        safetensors, for its files, is not there.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "a.npz")
    ...     np.savez(path, weight=np.ones((2, 3), np.float32))
    ...     read(path)["weight"].shape
    (2, 3)
    """
    return _files.read("read", path, READERS)


def _read_params(path: str) -> dict[str, Any]:
    return _files.READERS[".npz"](path) if zipfile.is_zipfile(path) else _mxnet_file.read(path)


READERS = {**_files.READERS, **dict.fromkeys((".pth", ".pt", ".bin"), _torch_file.read), ".params": _read_params}
