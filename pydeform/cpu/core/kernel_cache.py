"""Compiled kernels on disk: where they are kept, when one is out of date, and how damage is told.

One file for each kernel, types and machine: a checksum of all that follows, the kernel's identity, Numba's own form of
it. The checksum is compared before a byte reaches pickle or LLVM, which may end the process over garbage. Files are
written aside and then renamed, so that neither a killed writer nor several at once leave half of one.
See docs/decisions/0006-compiled-kernels.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import re
import shutil
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding
import numba
import numpy as np
from numba.core import caching, config, serialize
from numba.core.compiler import CompileResult
from numba.core.types.containers import BaseNamedTuple, BaseTuple

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PACKAGE = Path(__file__).parents[2]
# An import of this package from outside of cpu/: every file of cpu/ counts anyway.
_IMPORT = re.compile(
    r"^[ \t]*(?:from +(pydeform(?!\.cpu\b)[\w.]*) +import +(\([^)]*\)|.*)|import +(.*\bpydeform\b.*))", re.MULTILINE
)
_DIGEST_BYTES = hashlib.sha256().digest_size
_ABANDONED = 3600  # seconds after which nobody is still writing a file
# Settings of Numba, each an environment variable, that change machine code and are not in its name of the machine.
_SETTINGS = ("OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "USING_SVML", "BOUNDSCHECK", "DEBUGINFO_DEFAULT")
_said: set[str] = set()


def say_once(text: str) -> None:
    """One line on stderr, the first time only."""
    if text in _said or sys.stderr is None:
        return
    _said.add(text)
    with contextlib.suppress(OSError, ValueError):  # closed: no reason for an operator to fail
        print(f"pydeform: {text}", file=sys.stderr, flush=True)


def _imported(text: str) -> Iterator[Path]:
    """Files that a source imports from this package, by a search in its text: parsing all sources takes too long."""
    for module, names, plain in _IMPORT.findall(text):
        for name in re.findall(r"\w+", names) if module else re.findall(r"[\w.]+", plain):
            top, *parts = (f"{module}.{name}" if module else name).split(".")
            if top == _PACKAGE.name:
                yield _file_of(parts)


def _file_of(parts: list[str]) -> Path:
    """Of pydeform.A.B..., where the end may name something in a module."""
    place = _PACKAGE.joinpath(*parts)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if parts and path.is_file():
            return path
    return _file_of(parts[:-1]) if parts else _PACKAGE / "__init__.py"


def compiled_sources() -> Iterable[Path]:
    """All that a kernel's machine code may come from: this folder, and what it imports of the package."""
    found: set[Path] = set()
    more = set((_PACKAGE / "cpu").rglob("*.py"))
    while more:
        found |= more
        more = {path for source in more for path in _imported(source.read_text("utf-8"))} - found
    return sorted(found)


def source_digest() -> str | None:
    """Changes with any source that is compiled in; None where there are no source files to read.

    Numba alone would not see an edit outside the file of the kernel itself.
    """
    try:
        parts = [(path.relative_to(_PACKAGE).as_posix(), path.read_bytes()) for path in compiled_sources()]
    except OSError:
        return None
    return hashlib.sha256(repr(parts).encode()).hexdigest() if parts else None


_loaded_sources = source_digest()  # what this process runs, even if it is upgraded meanwhile


@functools.cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written."""
    if _loaded_sources is None:
        say_once("no compiled kernels are kept, as pydeform's sources are no files: every process compiles them again")
        return None
    folder: Path | None = None
    try:
        folder = _cache_root() / ("kernels_" + hashlib.sha256(str(Path(__file__).parent).encode()).hexdigest()[:16])
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        where = folder or "the home folder"
        say_once(f"no compiled kernels are kept, {where} is not writable: every process compiles them again")
        return None
    return folder


def _cache_root() -> Path:
    """Below it one folder for each installed copy: two versions side by side do not overwrite each other."""
    if config.CACHE_DIR:
        return Path(config.CACHE_DIR)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home()) / "pydeform"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pydeform"


def described(type: Any) -> str:
    """A type in words that tell two tuples of one name apart, which Numba's do not."""
    if not isinstance(type, BaseTuple):
        return str(type)
    items = [described(item) for item in type.types]
    if not isinstance(type, BaseNamedTuple):
        return f"({', '.join(items)})"
    cls = type.instance_class
    fields = ", ".join(f"{name}: {item}" for name, item in zip(type.fields, items, strict=True))
    return f"{cls.__module__}.{cls.__qualname__}({fields})"


class KernelCache(caching.NullCache):  # type: ignore[misc]
    """What Numba asks for a kernel before it compiles, and gives it afterwards."""

    def __init__(self, function: Callable[..., Any], folder: Path) -> None:
        self._folder = folder
        self._name = f"{function.__module__}.{function.__qualname__}"
        self._closure = serialize.dumps([cell.cell_contents for cell in function.__closure__ or ()])

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Numba would set up its tables first, for a third of a second: only who compiles reads them.
        path, identity = self._entry(sig, target_context.codegen())
        try:
            payload = _read(path, identity)
            return None if payload is None else CompileResult._rebuild(target_context, *pickle.loads(payload))
        except Exception:  # whatever a damaged file leads to
            say_once(f"some of the compiled kernels in {self._folder} are damaged: they are compiled again")
            return None

    def save_overload(self, sig: Any, compiled: Any) -> None:
        if source_digest() != _loaded_sources:  # upgraded while this process runs: others would load it as new
            return
        path, identity = self._entry(sig, compiled.codegen)
        payload = serialize.dumps(compiled._replace(type_annotation="")._reduce())  # a long text, for people
        try:
            _write(path, hashlib.sha256(identity + payload).digest() + identity + payload)
        except OSError as error:  # a full disk is no reason to fail
            say_once(f"a compiled kernel could not be kept: {error}")

    def _entry(self, sig: Any, codegen: Any) -> tuple[Path, bytes]:
        """The file, a name for each of what may be in use side by side, and a digest of what decides its content."""
        settings = [(name, str(getattr(config, name, None))) for name in _SETTINGS]
        beside = [self._name, str(sig), codegen.magic_tuple(), settings, sys.version]
        versions = [numba.__version__, llvmlite.__version__, llvmlite.binding.llvm_version_info, np.__version__]
        exact = [[described(type) for type in sig], versions, _loaded_sources]
        place = hashlib.sha256(repr([*beside, self._closure]).encode()).hexdigest()
        identity = hashlib.sha256(repr([place, exact]).encode()).digest()
        return self._folder / f"{self._name.removeprefix('pydeform.cpu.')}-{place[:16]}.nbc", identity


@contextlib.contextmanager
def compiled_once(folder: Path | None, name: str) -> Iterator[None]:
    """Other processes that want what is compiled meanwhile wait, and then find it in the folder. The system gives the
    lock back when a process ends, however it ends; where it has no locks, each process compiles for itself."""
    with contextlib.ExitStack() as stack:
        if folder is not None and fcntl is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context(open(folder / "lock", "ab"))
                # One byte of the file is one kernel's. A process holds one at a time: closing the file frees all.
                fcntl.lockf(file, fcntl.LOCK_EX, 1, zlib.crc32(name.encode()))
        yield


def _read(path: Path, identity: bytes) -> Any:
    """What follows checksum and identity; None where nothing of this identity is kept."""
    if not os.path.lexists(path):
        return None
    if not path.is_file():  # a folder, or a pipe that would be waited for
        raise ValueError(f"{path} is no file")
    content = memoryview(path.read_bytes())
    if hashlib.sha256(content[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        raise ValueError(f"{path} is damaged")
    found, payload = content[_DIGEST_BYTES : 2 * _DIGEST_BYTES], content[2 * _DIGEST_BYTES :]
    return payload if found == identity else None


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, in place of whatever is there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    handle, aside = tempfile.mkstemp(".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise


def _remove_abandoned(folder: Path) -> None:
    """What killed writers left."""
    for path in folder.glob("*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink()
