"""NVRTC, called directly: compiles kernels and tells what they need, on a machine with neither GPU nor driver.

The wheels nvidia-cuda-nvrtc-cu12 and nvidia-cuda-nvrtc (CUDA 13) are loaded side by side. Compiling lets go of Python's
lock, so that two threads keep two cores busy.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.cuda_emulation import sass

WHEELS = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc")
CACHE = Path(tempfile.gettempdir()) / "pydeform-nvrtc"
# What CuPy adds to the options of every kernel.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
# All that ptxas says of a kernel in which it found nothing remarkable.
ORDINARY = re.compile(
    r"ptxas info\s*: (\d+ bytes gmem|Compiling entry function|Function properties for|Used \d+ registers|Compile time)"
    r"|ptxas\s+\. +\d+ bytes stack frame|\s+\d+ bytes stack frame|\s*$"
)


class CompileError(RuntimeError):
    """The message is NVRTC's log."""


class Resources(NamedTuple):
    """What ptxas gave one kernel; all but the registers in bytes, and `shared` without the dynamic part."""

    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int


class Compiled(NamedTuple):
    kernels: dict[str, Resources]  # by name expression
    lowered: dict[str, str]  # name expression -> name in the cubin
    log: str
    cubin: bytes

    @property
    def remarks(self) -> list[str]:
        """Warnings, and what ptxas has to say about serialised wgmma and other performance that was lost."""
        return [line for line in self.log.splitlines() if not ORDINARY.match(line)]


class Toolkit:
    """One installed NVRTC."""

    def __init__(self, library: Path):
        # NVRTC opens them by name and does not always look beside itself: loaded already, they are found.
        for builtins in library.parent.glob("libnvrtc-builtins.so.*"):
            ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", numbers)
        self.architectures = tuple(sorted(numbers))

    def __repr__(self) -> str:
        return f"NVRTC {self.version}"

    def supports(self, architecture: str) -> bool:
        """Of "90" and "90a" NVRTC lists only the number."""
        return int(architecture.rstrip("af")) in self.architectures

    def compile(
        self, source: str, expressions: Sequence[str], architecture: str, options: Sequence[str] = ()
    ) -> Compiled:
        """Instances of the templates in `source` as CuPy would have them compiled. `architecture` is like "90a"."""
        flags = (f"-arch=sm_{architecture}", *options, *CUPY_OPTIONS, "--ptxas-options=-v")
        with self._program(source) as program:
            log = self._build(program, expressions, flags)
            lowered = {expression: self._lowered(program, expression) for expression in expressions}
            found = resources(log)
            kernels = {expression: found[name] for expression, name in lowered.items()}
            return Compiled(kernels, lowered, log, self._bytes(program, "CUBIN"))

    def ptx(self, source: str, expressions: Sequence[str], architecture: str, options: Sequence[str]) -> Any:
        """(the text, the kernels' names in it by name expression). `ptxas` is not asked."""
        flags = (f"-arch=compute_{architecture}", *options, *CUPY_OPTIONS)
        with self._program(source) as program:
            self._build(program, expressions, flags)
            names = {expression: self._lowered(program, expression) for expression in expressions}
            return self._bytes(program, "PTX").rstrip(b"\0").decode(), names

    def _build(self, program: ctypes.c_void_p, expressions: Sequence[str], flags: Sequence[str]) -> str:
        """The log."""
        for expression in expressions:
            self._call("AddNameExpression", program, expression.encode())
        encoded = (ctypes.c_char_p * len(flags))(*(flag.encode() for flag in flags))
        status = self._library.nvrtcCompileProgram(program, len(flags), encoded)
        log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode()
        if status:
            raise CompileError(f"{self}, {' '.join(flags)}: {self._error(status)}\n{log}")
        return log

    @contextmanager
    def _program(self, source: str) -> Iterator[ctypes.c_void_p]:
        program = ctypes.c_void_p()
        self._call("CreateProgram", ctypes.byref(program), source.encode(), b"source", 0, None, None)
        try:
            yield program
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _lowered(self, program: ctypes.c_void_p, expression: str) -> str:
        name = ctypes.c_char_p()
        self._call("GetLoweredName", program, expression.encode(), ctypes.byref(name))
        return (name.value or b"").decode()

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: Any) -> None:
        status = getattr(self._library, f"nvrtc{function}")(*arguments)
        if status:
            raise RuntimeError(f"nvrtc{function}: {self._error(status)}")

    def _error(self, status: int) -> str:
        text: bytes = self._library.nvrtcGetErrorString(status)
        return text.decode()


def resources(log: str) -> dict[str, Resources]:
    """By the kernel's name in the cubin. Functions that were not inlined count with the kernel that calls them."""
    found = {}
    _, *sections = re.split(r"Compiling entry function '(\w+)'", log)
    for name, text in zip(sections[::2], sections[1::2], strict=True):

        def largest(pattern: str, text: str = text) -> int:
            return max(map(int, re.findall(pattern, text)), default=0)

        found[name] = Resources(
            registers=largest(r"Used (\d+) registers"),
            stack=largest(r"(\d+) bytes (?:stack frame|cumulative stack size)"),
            spill_stores=largest(r"(\d+) bytes spill stores"),
            spill_loads=largest(r"(\d+) bytes spill loads"),
            shared=largest(r"(\d+) bytes smem"),
        )
    return found


@functools.cache
def toolkits() -> tuple[Toolkit, ...]:
    """Those of the wheels that are installed, in the order of WHEELS."""
    found = []
    for wheel in WHEELS:
        with suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.files(wheel) or []
            found += [Toolkit(Path(file.locate())) for file in files if re.fullmatch(r"libnvrtc\.so\.\d+", file.name)]
    return tuple(found)


def cached(
    toolkit: Toolkit, source: str, expression: str, architecture: str, options: Sequence[str] = ()
) -> tuple[Resources, list[str]]:
    """(resources, remarks) of one kernel, from an earlier run where nothing has changed since."""

    def compile() -> Any:
        compiled = toolkit.compile(source, [expression], architecture, options)
        return [compiled.kernels[expression], compiled.remarks]

    numbers, remarks = _from_cache((toolkit.version, source, expression, architecture, *options), compile)
    return Resources(*numbers), remarks


def cached_ptx(
    toolkit: Toolkit, source: str, expressions: Sequence[str], architecture: str, options: Sequence[str] = ()
) -> tuple[str, dict[str, str]]:
    """(PTX, names in it by expression), likewise."""
    key = (toolkit.version, source, *expressions, "PTX", architecture, *options)
    text, names = _from_cache(key, lambda: toolkit.ptx(source, expressions, architecture, options))
    return text, names


def cached_code(
    toolkit: Toolkit, source: str, expression: str, architecture: str, options: Sequence[str] = ()
) -> list[sass.Instruction]:
    """Machine code, likewise. Needs nvdisasm."""

    def compile() -> Any:
        compiled = toolkit.compile(source, [expression], architecture, options)
        return sass.disassemble(str(sass.disassembler()), compiled.cubin, compiled.lowered[expression])

    key = (toolkit.version, source, expression, "SASS", architecture, *options)
    return [sass.Instruction(*instruction) for instruction in _from_cache(key, compile)]


def _from_cache(key: tuple[str, ...], compute: Callable[[], Any]) -> Any:
    """A cache that cannot be written is none; what another process is writing at the moment is not there yet."""
    own_code = Path(__file__).read_text("utf-8")
    path = CACHE / f"{hashlib.sha256(repr((own_code, *key)).encode()).hexdigest()}.json"
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    value = json.loads(json.dumps(compute()))
    with suppress(OSError):
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False) as file:
            json.dump(value, file)
        Path(file.name).replace(path)
    return value
