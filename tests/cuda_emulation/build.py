"""Compiles the runtime of the emulation, and kernels against it, with g++; results are kept between runs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
RUNTIME_SOURCES = ("runtime.cpp", "fibers.cpp", "checker.cpp", "counters.cpp", "tensor_cores.cpp")
HEADERS = ("emulation.h", "primitives_emulated.h", "runtime.h")
COMMON = (
    "-fPIC",
    "-w",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",
    "-fno-exceptions",
)
# A kernel runs for a moment, and compiling it takes longer: of the levels that leave out dead reads the quickest.
KERNELS = ("-Og", "-fno-semantic-interposition")
# With the lines that messages name. In DWARF 5, g++ 12 mixes up the file of #line with the file that it reads.
CHECKED = (
    "-g1",
    "-gdwarf-4",
    "-fsanitize=thread,float-cast-overflow",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fno-tree-sra",
)
PRIMITIVES = "core/primitives.cuh"
FEATURES = ("avx2", "f16c", "fma")
UNUSED = 3600  # seconds
# Ends every translation unit: the kernels that Python may launch, and where the library lies in memory.
ENTRIES = """
#line 1 "entries"
extern "C" {{ extern __attribute__((visibility("hidden"))) char __ehdr_start, _end; }}
namespace emulation {{
Entry entries[] = {{{entries}}};
struct {{ Entry* entries; int count; char *begin, *end; }} description = {{entries, {count}, &__ehdr_start, &_end}};
}}
extern "C" void* emulation_module() {{ return &emulation::description; }}
"""


class CompileException(Exception):
    """What g++ says about a kernel's source; named like CuPy's."""


def inlined(name: str) -> str:
    """A .cu of this folder with the primitives in the place of their #include, so that it needs no include path."""
    primitives = (HERE.parents[1] / "pydeform" / "cuda" / PRIMITIVES).read_text(encoding="utf-8")
    before, found, after = (HERE / name).read_text(encoding="utf-8").partition(f'#include "{PRIMITIVES}"\n')
    if not found:
        raise ValueError(f"{name} does not include {PRIMITIVES}")
    primitives = primitives.replace("#pragma once\n", "\n")
    line = before.count("\n") + 2
    return f'#line 1 "{name}"\n{before}#line 1 "{PRIMITIVES}"\n{primitives}#line {line} "{name}"\n{after}'


def cache_folder() -> Path:
    default = Path(tempfile.gettempdir()) / f"pydeform_emulation_{os.getuid()}"
    folder = Path(os.environ.get("PYDEFORM_EMULATION_CACHE", default))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


@functools.cache
def _machine_flags() -> tuple[str, ...]:
    """Halves convert and products add up much faster where the processor has instructions for it."""
    known = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").split())
    return tuple(f"-m{feature}" for feature in FEATURES if feature in known)


@functools.cache
def _compiler() -> str:
    """Its version, as part of the keys of the cache."""
    return subprocess.run(["g++", "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


@functools.cache
def _runtime_key() -> str:
    texts = [(HERE / name).read_text(encoding="utf-8") for name in (*RUNTIME_SOURCES, *HEADERS)]
    return _key(texts, COMMON, KERNELS, CHECKED, ENTRIES, _machine_flags(), _compiler())


def _compile(arguments: Sequence[str], target: Path) -> None:
    """Under another name first: a process that looks meanwhile finds all of it or nothing."""
    unfinished = target.with_suffix(f".{os.getpid()}.{hashlib.sha256(os.urandom(8)).hexdigest()[:8]}")
    done = subprocess.run(["g++", *arguments, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode:
        raise CompileException(done.stderr or done.stdout)
    os.replace(unfinished, target)


@functools.cache
def runtime() -> Path:
    """The library that runs kernels; -O3, as its matrix products need their loops unrolled."""
    library = cache_folder() / f"runtime_{_runtime_key()}.so"
    if not library.exists():
        flags = ["-std=c++20", "-O3", *COMMON, *_machine_flags(), "-D__CUDA_ARCH__=900", "-I", str(HERE)]
        _compile([*flags, "-shared", *(str(HERE / name) for name in RUNTIME_SOURCES)], library)
    return library


def _parsed(source: str, flags: Sequence[str]) -> Path:
    """A header that g++ has read already, with all that one source's kernels have in common: half of what each takes.

    It is larger than a hundred kernels. So those that nobody has used for an hour are removed.
    """
    header = cache_folder() / f"{_key(_runtime_key(), source, flags)}.h"
    read = header.with_suffix(".h.gch")
    with contextlib.suppress(FileNotFoundError):
        os.utime(read)
        return header
    for other in cache_folder().glob("*.gch"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - other.stat().st_mtime > UNUSED:
                other.unlink()
    aside = header.with_suffix(f".{os.getpid()}")
    aside.write_text(f'#include "primitives_emulated.h"\n#line 1 "source.cu"\n{source}\n', encoding="utf-8")
    os.replace(aside, header)
    _compile([*flags, "-x", "c++-header", str(header)], read)
    return header


def kernels(source: str, expressions: Sequence[str], options: Sequence[str], architecture: str, checked: bool) -> Path:
    """A library with the kernels of `source` that the C++ expressions name, for an architecture such as "90a"."""
    folder = cache_folder()
    library = folder / f"{_key(_runtime_key(), source, expressions, options, architecture, checked)}.so"
    if library.exists():
        return library
    entries = ", ".join(f'entry("{expression}", &::{expression})' for expression in expressions)
    unit = folder / f"{library.stem}.{os.getpid()}.cpp"
    # Names that #line gives begin with ".", the compiler's folder: all others are paths, those of our headers too.
    flags = [f"-fdebug-prefix-map={os.getcwd()}=.", f"-fdebug-prefix-map={HERE}=/emulation"]
    flags += [*COMMON, *KERNELS, *_machine_flags(), *(CHECKED if checked else ())]
    flags += [f"-D__CUDA_ARCH__={architecture.rstrip('af')}0", "-I", str(HERE)]
    if architecture == "90a":
        flags.append("-D__CUDA_ARCH_FEAT_SM90_ALL")
    flags += options
    text = f'#include "{_parsed(source, flags).name}"' + ENTRIES.format(entries=entries, count=len(expressions))
    unit.write_text(text, encoding="utf-8")
    try:
        # The sanitizer's option is for the compiler alone: the runtime has the functions that the code calls.
        compiled = unit.with_suffix(".o")
        _compile([*flags, "-c", str(unit)], compiled)
        # Without the libraries that the runtime brings anyway: reading them takes most of the time of a link.
        _compile(["-shared", "-nostdlib", str(compiled), str(runtime()), "-lgcc"], library)
        compiled.unlink()
    finally:
        unit.unlink(missing_ok=True)
    return library


@functools.cache
def load(library: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library))


def _own_name(place: str) -> str:
    """A name that #line gave, or the last part of a path."""
    return place.removeprefix("./") if place.startswith("./") else os.path.basename(place)


def source_lines(library: Path, offsets: Sequence[int]) -> list[str]:
    """file:line of each code address, given relative to the start of the library."""
    asked = [hex(offset - 1) for offset in offsets]  # the address after a call may belong to the next line
    answer = subprocess.run(["addr2line", "-a", "-i", "-e", str(library), *asked], capture_output=True, text=True)
    blocks: list[list[str]] = []
    for line in answer.stdout.splitlines():
        if line.startswith("0x"):
            blocks.append([])
        else:
            blocks[-1].append(_own_name(line.split(" ")[0]))
    hidden = ("emulation.h", "primitives_emulated.h", PRIMITIVES, "entries")
    lines = []
    for block in blocks:  # innermost function first
        kernel = [line for line in block if not line.startswith((*hidden, "?"))]
        lines.append((kernel or block)[0])
    return lines
