"""cupy.cuda.nvrtc over the emulation. What it gives for machine code is what RawModule compiles when it reads it."""

from __future__ import annotations

import hashlib
import itertools
import json
from typing import Any

_numbers = itertools.count(1)
_programs: dict[int, dict[str, Any]] = {}


class NVRTCError(RuntimeError):
    """Raised by no call here: g++ compiles later."""


def getVersion() -> tuple[int, int]:
    """That of no NVRTC: what is kept on disk is nothing for a device."""
    return 0, 0


def createProgram(source: str, name: str, headers: tuple[str, ...], include_names: tuple[str, ...]) -> int:
    if headers or include_names:
        raise TypeError("the emulation has no headers by name")
    number = next(_numbers)
    _programs[number] = {"code": source}
    return number


def addNameExpression(program: int, expression: str) -> None:
    if "expression" in _programs[program]:
        raise TypeError("one kernel in a program")
    _programs[program]["expression"] = expression


def compileProgram(program: int, options: tuple[str, ...]) -> None:
    if not isinstance(options, tuple):
        raise TypeError("options must be a tuple")
    if sum(option.startswith(("-arch=", "--gpu-architecture=")) for option in options) != 1:
        raise RuntimeError("NVRTC_ERROR_INVALID_OPTION: --gpu-architecture (-arch) defined more than once, or never")
    _programs[program]["options"] = options


def getLoweredName(program: int, expression: str) -> str:
    if expression != _programs[program]["expression"]:
        raise RuntimeError(f"NVRTC_ERROR_NAME_EXPRESSION_NOT_VALID: {expression}")
    return lowered(expression)


def lowered(expression: str) -> str:
    return f"_Z{hashlib.sha256(expression.encode()).hexdigest()}"


def getCUBIN(program: int) -> bytes:
    known = _programs[program]
    if "options" not in known:
        raise RuntimeError("the program is not compiled")
    return json.dumps(known).encode()


def getProgramLog(_program: int) -> str:
    return ""


def destroyProgram(program: int) -> None:
    del _programs[program]
