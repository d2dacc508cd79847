"""A family's kernels with their headers put in: one string, on which CuPy keys its cache of compiled kernels."""

from __future__ import annotations

import functools
import itertools
import re
import typing
from pathlib import Path
from typing import Any

from pydeform._gather_geometry import GatherGeometry
from pydeform._geometry import ConvGeometry
from pydeform._grid_geometry import GridGeometry
from pydeform._roi_geometry import RoiGeometry

FOLDER = Path(__file__).parents[1]  # of all kernels: headers are named from here
INCLUDE = re.compile(r'^#include "(\w+/\w+\.cuh)"$', re.MULTILINE)
# A header that only the emulation of the tests has; it is found there through an include path.
EMULATED = "primitives_emulated.h"


class Code(typing.NamedTuple):
    """A family, whose .cu has its name, and what is constant there."""

    file: str
    axes: int = 2
    active: bool = False  # active convolution: one offset for each tap, that of all images and pixels
    surface: bool = False  # RoI pooling whose rules say `surface`


@functools.cache
def source(code: Code) -> str:
    """CUDA C++; compilers report errors under the names and lines of our files."""
    if code.file == "roi":
        text = f"[[maybe_unused]] constexpr bool SURFACE = {str(code.surface).lower()};\n" + struct(
            "RoiGeometry", RoiGeometry
        )
    elif code.file == "gather":
        text = f"constexpr int AXES = {code.axes};\n" + struct("GatherGeometry", GatherGeometry)
    elif code.file == "grid":
        text = f"constexpr int AXES = {code.axes};\n" + struct("GridGeometry", GridGeometry, code.axes)
    else:
        text = f"constexpr int AXES = {code.axes};\nconstexpr bool ACTIVE = {str(code.active).lower()};\n"
        text += struct("Geometry", ConvGeometry, code.axes)
    return text + _inlined(f"{code.file}/{code.file}.cu", set())


class Field(typing.NamedTuple):
    kind: str  # in C
    is_array: bool
    length: int  # of an array; 0: a number for each axis


def c_fields(geometry: Any) -> dict[str, Field]:
    """Of a NamedTuple, in their order: its floats are double."""
    hints = typing.get_type_hints(geometry)
    return {field: _field(hints[field]) for field in geometry._fields}


def _field(hint: Any) -> Field:
    is_array = typing.get_origin(hint) is tuple
    numbers = typing.get_args(hint) if is_array else (hint,)
    return Field("double" if numbers[0] is float else "int", is_array, is_array * (len(numbers) - (... in numbers) * 2))


def struct(name: str, geometry: Any, axes: int = 0) -> str:
    """A NamedTuple as a C struct, its fields in their order."""
    fields = c_fields(geometry)
    lines = [
        f"  {kind} {', '.join(field + is_array * f'[{length or axes}]' for field in names)};\n"
        for (kind, is_array, length), names in itertools.groupby(fields, fields.__getitem__)
    ]
    return f"struct {name} {{\n{''.join(lines)}}};\n"


def _inlined(name: str, seen: set[str]) -> str:
    """The file with each of our headers in the place of its first #include."""
    seen.add(name)
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate((FOLDER / name).read_text().splitlines(), start=1):
        include = INCLUDE.match(line)
        if include is None:
            lines.append("" if line == "#pragma once" else line)
            continue
        if include[1] not in seen:
            lines.append(_inlined(include[1], seen))
        lines.append(f'#line {number + 1} "{name}"')
    return "\n".join(lines) + "\n"
