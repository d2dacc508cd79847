"""cupy.RawModule over the emulation: compiles with g++, launches on fibers, refuses what CuPy would get wrong."""

from __future__ import annotations

import ctypes
import functools
import json
import re
import struct
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.cuda_emulation import build, programs, streams
from tests.cuda_emulation.arrays import Memory, ndarray
from tests.cuda_emulation.streams import configuration

# Options of NVRTC that change nothing here.
IGNORED = re.compile(
    r"-{1,2}(lineinfo|generate-line-info|default-device|device-as-default-execution-space|ftz=|fmad=|ptxas-options|maxrregcount)"
)
ARCHITECTURE = ("-arch=sm_", "--gpu-architecture=sm_")
ACCESS = ("read", "write", "atomic")
_lock = threading.Lock()  # the runtime runs one launch at a time
_dynamic_limits: dict[tuple[object, ...], int] = {}  # bytes of shared memory that a function may be launched with


class EmulationError(RuntimeError):
    """What a kernel did wrong, and where."""


class _Parameter(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in ("offset", "size", "kind", "pointee_size", "pointee_kind"))


class _Entry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("run", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("count", ctypes.c_int),
        ("parameters", ctypes.POINTER(_Parameter)),
    )


class _Module(ctypes.Structure):
    _fields_ = (
        ("entries", ctypes.POINTER(_Entry)),
        ("count", ctypes.c_int),
        ("begin", ctypes.c_void_p),
        ("end", ctypes.c_void_p),
    )


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("begin", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
        ("memory", ctypes.c_void_p),
        ("memory_bytes", ctypes.c_size_t),
        ("cells", ctypes.c_void_p),
        ("argument", ctypes.c_int),
        ("guarded", ctypes.c_int),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("shared_limit", ctypes.c_uint64),
        ("buffers", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("buffer_count", ctypes.c_int),
        ("entry", ctypes.c_int),
        ("schedule", ctypes.c_uint),
        ("checked", ctypes.c_int),
        ("profiled", ctypes.c_int),
    )


class _Counts(ctypes.Structure):
    _fields_ = (
        ("site", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("shared", "access", "requests", "sectors", "least_sectors")),
        *((name, ctypes.c_int64) for name in ("wavefronts", "least_wavefronts", "bytes")),
    )


class Counter(NamedTuple):
    """Memory requests of whole warps that one line of a kernel made."""

    requests: int
    sectors: int  # of 32 bytes, for global memory
    least_sectors: int  # that could have held the same bytes
    wavefronts: int  # passes over the banks, for shared memory
    least_wavefronts: int
    bytes: int


class _Library:
    """One compiled module: its functions by name, and its addresses as source lines."""

    def __init__(self, path: Path):
        self.path = path
        library = build.load(path)
        library.emulation_module.restype = ctypes.POINTER(_Module)
        self.module = library.emulation_module()
        described = self.module.contents
        self.begin, self.end = described.begin, described.end
        names = [described.entries[i].name.decode() for i in range(described.count)]
        self.entries = {name: (i, described.entries[i]) for i, name in enumerate(names)}
        self._lines: dict[int, str] = {}

    def line(self, address: int) -> str:
        if address not in self._lines:
            self._lines[address] = build.source_lines(self.path, [address - self.begin])[0]
        return self._lines[address]

    def explain(self, message: str) -> str:
        return re.sub(r"\{(0x[0-9a-f]+)\}", lambda m: self.line(int(m[1], 16)), message.replace("{(nil)}", "?"))


_libraries: dict[Path, _Library] = {}


def _library(path: Path) -> _Library:
    if path not in _libraries:
        _libraries[path] = _Library(path)
    return _libraries[path]


def take_counters() -> dict[tuple[str, str, str], Counter]:
    """By (file:line, "read" | "write" | "atomic", "global" | "shared"), since the last call."""
    counts = (_Counts * 4096)()
    found = build.load(build.runtime()).emulation_take_counts(counts, 4096)
    total: dict[tuple[str, str, str], Counter] = {}
    for one in counts[:found]:
        library = next(library for library in _libraries.values() if library.begin <= one.site < library.end)
        key = (library.line(one.site), ACCESS[one.access], "shared" if one.shared else "global")
        new = Counter(*(getattr(one, name) for name in Counter._fields))
        total[key] = Counter(*map(sum, zip(new, total[key], strict=True))) if key in total else new
    return total


class RawModule:
    """Compiled like CuPy's when a function is first asked for. `path`: of a file of machine code, from programs.py."""

    def __init__(
        self,
        *,
        code: str | None = None,
        path: str | None = None,
        options: Sequence[str] = (),
        name_expressions: Sequence[str] = (),
        backend: str = "nvrtc",
        architecture: str = "",
    ):
        """`architecture`, such as "90a", instead of the device's: CuPy has no such argument."""
        if (code is None) == (path is None):
            raise TypeError("one of code and path")
        if not isinstance(options, tuple):
            raise TypeError("options must be a tuple")
        if path is not None:
            program = json.loads(Path(path).read_text("utf-8"))
            code, options, name_expressions = program["code"], program["options"], (program["expression"],)
        elif any(option.startswith(ARCHITECTURE) for option in options):
            raise build.CompileException("--gpu-architecture (-arch) defined more than once: CuPy gives one of its own")
        self._code, self._expressions = str(code), tuple(name_expressions)
        self._names = {programs.lowered(e) if path else e: e for e in self._expressions}  # of functions
        self._architecture = architecture
        self._options: list[str] = ["-std=c++17"]
        for option in options:
            if option.startswith(ARCHITECTURE):
                self._architecture = option.partition("sm_")[2]
            elif option.startswith(("-D", "-U", "-I", "-std=")):
                self._options.append(option)
            elif not IGNORED.match(option):
                raise build.CompileException(f"unknown option {option}")

    def get_function(self, name: str) -> Function:
        if name not in self._names:
            raise KeyError(f"{name} is not among name_expressions {tuple(self._names)}")
        return Function(self, self._names[name], self._architecture or streams.Device().compute_capability)

    def compiled(self, architecture: str, checked: bool) -> _Library:
        return _library(build.kernels(self._code, self._expressions, self._options, architecture, checked))


class Function:
    def __init__(self, module: RawModule, name: str, architecture: str):
        self._module, self.name, self._architecture = module, name, architecture
        self._prepared: dict[bool, _Prepared] = {}
        self._prepare()

    @property
    def _limit(self) -> tuple[object, ...]:
        """Whose limit it is: the driver has one function for all who ask one module for one name."""
        return self._module._code, tuple(self._module._options), self._architecture, self.name, streams.Device().id

    @property
    def max_dynamic_shared_size_bytes(self) -> int:
        return _dynamic_limits.get(self._limit, 48 * 1024)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, nbytes: int) -> None:
        capability = streams.Device().compute_capability
        if nbytes > streams.SHARED_KIB[capability] * 1024:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {nbytes} bytes of shared memory on sm_{capability}")
        _dynamic_limits[self._limit] = nbytes

    def _prepare(self) -> _Prepared:
        checked = configuration.check or configuration.profile
        if checked not in self._prepared:
            self._prepared[checked] = _Prepared(self._module.compiled(self._architecture, checked), self.name)
        return self._prepared[checked]

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int = 0
    ) -> None:
        capability = streams.Device().compute_capability
        if not _loads(self._architecture, capability):
            raise RuntimeError(f"no kernel image: code for sm_{self._architecture}, on a device of sm_{capability}")
        sizes = [_dimensions("grid", grid, (2**31 - 1, 65535, 65535)), _dimensions("block", block, (1024, 1024, 64))]
        if sizes[1][0] * sizes[1][1] * sizes[1][2] > 1024:
            raise RuntimeError(f"CUDA_ERROR_INVALID_VALUE: {block} is more than 1024 threads")
        if shared_mem > self.max_dynamic_shared_size_bytes:
            raise RuntimeError(
                f"CUDA_ERROR_INVALID_VALUE: {shared_mem} bytes of shared memory, max_dynamic_shared_size_bytes is "
                f"{self.max_dynamic_shared_size_bytes}"
            )
        with _lock:
            self._prepare().launch(sizes[0], sizes[1], args, shared_mem, streams.SHARED_KIB[capability] * 1024)


def _self(memory: Memory) -> Memory:
    return memory


def _loads(architecture: str, capability: str) -> bool:
    """Machine code runs within its major version, on its minor version or a later one; "90a" is for 90 alone."""
    if architecture.endswith("a"):
        return architecture[:-1] == capability
    return architecture[:-1] == capability[:-1] and int(architecture[-1]) <= int(capability[-1])


@functools.lru_cache(1024)
def _dimensions(what: str, sizes: tuple[int, ...], most: tuple[int, ...]) -> tuple[int, ...]:
    if not isinstance(sizes, tuple) or not 1 <= len(sizes) <= 3:
        raise TypeError(f"{what} must be a tuple of up to 3 integers, got {sizes!r}")
    full = (*sizes, 1, 1)[:3]
    if any(not 1 <= size <= limit for size, limit in zip(full, most, strict=True)):
        raise ValueError(f"{what} {sizes} is out of range; of an empty launch CuPy would make one block: skip it")
    return tuple(int(size) for size in full)


class _Prepared:
    """One kernel with the structures of its calls, which are used again each time under the lock."""

    def __init__(self, library: _Library, name: str):
        self.library, self.name = library, name
        number, entry = library.entries[name]
        self._parameters = [entry.parameters[i] for i in range(entry.count)]
        self._described = [
            (p.offset, p.size, chr(p.kind), p.pointee_size, chr(p.pointee_kind)) for p in self._parameters
        ]
        size = self._parameters[-1].offset + self._parameters[-1].size if self._parameters else 0
        self._held = (ctypes.c_char * max(64, size))()  # large enough that ctypes aligns it as malloc does
        self._values = memoryview(self._held).cast("B")
        self._buffers = (_Buffer * max(1, len(self._parameters)))()
        self._launch = _Launch(
            buffers=ctypes.addressof(self._buffers), arguments=ctypes.addressof(self._held), entry=number
        )
        self._run = build.load(build.runtime()).emulation_launch
        self._run.restype = ctypes.c_char_p

    def launch(self, grid: Any, block: Any, args: tuple[Any, ...], shared_mem: int, shared_limit: int) -> None:
        if not isinstance(args, tuple):
            raise TypeError(f"{self.name}: args must be a tuple")
        if len(args) != len(self._described):
            raise TypeError(f"{self.name} takes {len(self._described)} arguments, got {len(args)}")
        launch, memories = self._launch, list[Memory]()
        for number, value in enumerate(args):
            offset, size, kind, pointee_size, pointee_kind = self._described[number]
            if kind == "p":
                self._check_pointer(number, value, pointee_size, pointee_kind)
                pointer = 0
                if value is not None and value.size:
                    pointer = value._host.ctypes.data
                    self._fill_buffer(len(memories), number, value, pointer)
                    memories.append(value._memory)
                struct.pack_into("Q", self._values, offset, pointer)
            else:
                self._values[offset : offset + size] = self._by_value(number, value, size, kind)
        capture = streams.capture_of(streams.get_current_stream())
        if capture is not None:
            for place, memory in enumerate(memories):
                what = f"argument {self._buffers[place].argument} of {self.name}"
                # The caller keeps what is not ours for as long as the graph, as for every graph.
                capture.use(what, memory, functools.partial(_self, memory) if memory.borrowed else weakref.ref(memory))
        launch.grid[:], launch.block[:] = grid, block
        launch.shared_bytes, launch.shared_limit, launch.buffer_count = shared_mem, shared_limit, len(memories)
        launch.schedule, launch.profiled = configuration.schedule, configuration.profile
        launch.checked = checked = configuration.check or configuration.profile
        message = self._run(self.library.module, ctypes.byref(launch))
        if message:
            raise EmulationError(self.library.explain(message.decode()))
        if not checked:
            for memory in memories:  # which bytes an unchecked launch wrote, nobody knows
                memory.mark_written(memory.pointer, memory.nbytes)

    def _fill_buffer(self, place: int, number: int, value: ndarray, pointer: int) -> None:
        buffer, memory = self._buffers[place], value._memory
        buffer.begin, buffer.bytes = pointer, value.nbytes
        buffer.memory, buffer.memory_bytes = memory.pointer, memory.nbytes
        buffer.argument, buffer.guarded = number, memory.guarded
        if configuration.check or configuration.profile:
            buffer.cells = memory.cells()

    def _check_pointer(self, number: int, value: Any, size: int, kind: str) -> None:
        if value is None:
            return
        if not isinstance(value, ndarray):
            raise TypeError(f"{self.name}: argument {number} is a pointer, got {type(value).__name__}: {value!r:.60}")
        value._alive()
        if not value.flags.c_contiguous:
            raise ValueError(f"{self.name}: argument {number} is not contiguous: its strides are {value.strides}")
        if value.device.id != streams.Device().id:
            raise ValueError(f"{self.name}: argument {number} is on another device")
        dtype = value.dtype
        if kind in "iuf" and 1 < size <= 8 and (size != dtype.itemsize or (kind == "f") != (dtype.kind == "f")):
            raise TypeError(f"{self.name}: argument {number} points to {8 * size}-bit {_KINDS[kind]}, got {dtype}")
        if kind == "s" and size == 2 and dtype.itemsize != 2:
            raise TypeError(f"{self.name}: argument {number} points to a 16-bit type, got {dtype}")

    def _by_value(self, number: int, value: Any, size: int, kind: str) -> bytes:
        where = f"{self.name}: argument {number}"
        if isinstance(value, np.ndarray) and (value.dtype.names is None or value.size != 1):
            raise TypeError(f"{where} is a host array; only one structure of one element is passed by value")
        if not isinstance(value, np.ndarray | np.generic):
            raise TypeError(f"{where} must be a NumPy scalar, got {type(value).__name__}")
        if value.nbytes != size:
            raise TypeError(f"{where} has {size} bytes in the kernel, got {value.nbytes} ({value.dtype})")
        given = value.dtype.kind
        if (given == "V") != (kind == "s") or (kind != "s" and (given == "f") != (kind == "f")):
            raise TypeError(f"{where} is {_KINDS[kind]} in the kernel, got {value.dtype}")
        return value.tobytes()


_KINDS = {"i": "integer", "u": "unsigned integer", "f": "floating point", "s": "a structure"}
