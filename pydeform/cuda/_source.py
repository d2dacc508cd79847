"""An operator's kernels with their headers put in: one string, on which CuPy keys its cache of compiled kernels."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from pydeform._geometry import Conv2dGeometry

FOLDER = Path(__file__).parent
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
# A header that only the emulation of the tests has; it is found there through an include path.
EMULATED = "primitives_emulated.h"


@functools.cache
def source(operator: str) -> str:
    """CUDA C++ of `operator`; compilers report errors under the names and lines of our files."""
    fields = ", ".join(Conv2dGeometry._fields)
    geometry = f"struct Geometry {{\n  int {fields};\n}};\n"
    return geometry + _inlined(f"{operator}.cu", set())


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
