"""Kernels with wgmma, which only sm_90a has: the features of sm_90 that no later device has.

CuPy compiles for sm_90, and NVRTC before 12.9 takes no second architecture beside that one. So these are compiled here,
with the options that CuPy gives, and kept on disk where CuPy keeps its own.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import cupy

OPTIONS = ("-std=c++17", "-ftz=true", "-arch=sm_90a", "--device-as-default-execution-space")


def kernel(text: str, expression: str) -> Any:
    """The instance of a template in `text`, compiled or from disk."""
    version = cupy.cuda.nvrtc.getVersion()
    key = hashlib.sha256(repr((version, OPTIONS, expression, text)).encode()).hexdigest()
    cubin = _folder() / f"pydeform_{key}.cubin"
    name = _name_in(cubin)
    if name is None:
        name, code = _compiled(text, expression)
        try:
            _keep(cubin, name, code)
        except OSError:
            cubin = Path(_own_folder().name) / cubin.name
            _keep(cubin, name, code)
    return cupy.RawModule(path=str(cubin)).get_function(name)


def _folder() -> Path:
    """CuPy's, unless nothing shall be on disk for good."""
    if os.environ.get("CUPY_CACHE_IN_MEMORY", "0") == "1":
        return Path(_own_folder().name)
    return Path(os.environ.get("CUPY_CACHE_DIR", "~/.cupy/kernel_cache")).expanduser()


def _compiled(text: str, expression: str) -> tuple[str, bytes]:
    """(the kernel's name in the machine code, machine code)"""
    nvrtc = cupy.cuda.nvrtc
    program = nvrtc.createProgram(text, expression, (), ())
    try:
        nvrtc.addNameExpression(program, expression)
        try:
            nvrtc.compileProgram(program, OPTIONS)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(f"{expression} for sm_90a: {error}\n{nvrtc.getProgramLog(program)}") from error
        return nvrtc.getLoweredName(program, expression), nvrtc.getCUBIN(program)
    finally:
        nvrtc.destroyProgram(program)


def _keep(cubin: Path, name: str, code: bytes) -> None:
    """Each file whole or not at all; the second makes the first count."""
    cubin.parent.mkdir(parents=True, exist_ok=True)
    for path, content in ((cubin, code), (_label(cubin), f"{name} {_digest(code)}".encode())):
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
        Path(file.name).replace(path)


def _name_in(cubin: Path) -> str | None:
    """None: there is no such file, or a damaged one."""
    with suppress(OSError, ValueError):
        name, digest = _label(cubin).read_text("utf-8").split()
        if _digest(cubin.read_bytes()) == digest:
            return name
    return None


def _label(cubin: Path) -> Path:
    return cubin.with_suffix(".txt")


def _digest(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


@functools.cache
def _own_folder() -> Any:
    """Of this process, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="pydeform_")
