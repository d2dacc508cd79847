"""Results that other systems produced, one archive per operator; README.md says where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Vector(NamedTuple):
    """One case as one system computed it. A gradient is that of sum(outputs * grad_outputs)."""

    name: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    grad_outputs: dict[str, np.ndarray]
    grads: dict[str, np.ndarray]
    args: dict[str, Any]
    meta: dict[str, Any]


def load(archive: str | Path) -> list[Vector]:
    """Every vector of one archive, by the name of an operator or the path of a file."""
    path = archive if isinstance(archive, Path) else Path(__file__).with_name(f"{archive}.npz")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    same = json.loads(str(arrays.pop("same")))
    arrays.update({name: arrays[place] for name, place in same.items()})
    files: dict[str, dict[str, np.ndarray]] = {}
    for key in sorted(arrays):
        stem, _, name = key.rpartition("/")
        files.setdefault(stem, {})[name] = arrays[key]
    return [_vector(stem, entries) for stem, entries in files.items()]


def _vector(stem: str, entries: dict[str, np.ndarray]) -> Vector:
    parts: dict[str, dict[str, np.ndarray]] = {"in": {}, "out": {}, "gout": {}, "gin": {}}
    args, meta = (json.loads(str(entries.pop(name))) for name in ("args", "meta"))
    for key, array in entries.items():
        kind, _, name = key.partition("__")
        array.flags.writeable = False  # arrays are shared between vectors
        parts[kind][name] = array
    return Vector(stem, *parts.values(), args, meta)
