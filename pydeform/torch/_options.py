"""Options as data that a graph can hold: numbers, texts, None and tuples, and the operators' arguments for them.

`options` is the literal of a dict, where `...` stands for every int and `0.0` for every float: these come beside it, in
order, since in a traced graph they may be symbols.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from typing import Any

import torch

from pydeform import _checks

ROWS, WORDS, INTS = (list, tuple), (bool, str, type(None)), (int, torch.SymInt)
PLAIN = (*WORDS, *INTS, float, torch.SymFloat)
ARGUMENTS = "str options, SymInt[] ints, float[] floats"


def plain(op: str, name: str, value: Any) -> Any:
    """An option as numbers, texts, None and tuples of them."""
    if isinstance(value, PLAIN) or _checks.is_plain(value):
        return value
    if isinstance(value, ROWS):
        return tuple([plain(op, name, item) for item in value])
    if hasattr(value, "tolist"):  # a tensor, an array or a number of NumPy
        return plain(op, name, value.tolist())
    raise TypeError(f"{op}: {name} must be of numbers, texts, None and tuples of them, got {_checks.shown(value)}")


def packed(options: dict[str, Any]) -> tuple[str, list[Any], list[Any]]:
    ints: list[Any] = []
    floats: list[Any] = []
    items = [f"{key!r}: {_literal_of(value, ints, floats)}" for key, value in options.items()]
    return "{" + ", ".join(items) + "}", ints, floats


def _literal_of(value: Any, ints: list[Any], floats: list[Any]) -> str:
    """That of a plain option, whose numbers go into the lists."""
    if isinstance(value, tuple):
        return "(" + "".join([_literal_of(item, ints, floats) + "," for item in value]) + ")"
    if isinstance(value, WORDS):
        return repr(value)
    if isinstance(value, INTS):
        ints.append(value)
        return "..."
    floats.append(value)
    return "0.0"


def unpacked(options: str, ints: Sequence[Any], floats: Sequence[Any]) -> dict[str, Any]:
    next_int, next_float = iter(ints), iter(floats)

    def filled(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple([filled(item) for item in value])
        if value is ...:
            return next(next_int)
        return next(next_float) if isinstance(value, float) else value

    return {key: filled(value) for key, value in _literal(options).items()}


_literal = functools.lru_cache(maxsize=1024)(ast.literal_eval)
