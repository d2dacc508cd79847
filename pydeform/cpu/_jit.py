"""Compile a kernel once per dtype and keep it on disk, wherever the machine lets us."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, config
from numba.core.typing.typeof import typeof

_SOURCES = Path(__file__).parent
_lock = threading.RLock()
_said: set[str] = set()


def say_once(text: str) -> None:
    """One line on stderr, the first time only."""
    if text not in _said:
        _said.add(text)
        print(f"pydeform: {text}", file=sys.stderr, flush=True)


@functools.cache
def source_digest() -> str:
    """Changes with any kernel source: Numba alone would not see an edit in a function that a kernel calls."""
    digest = hashlib.sha256()
    for path in sorted(_SOURCES.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def cache_directory() -> Path | None:
    """Where compiled kernels are kept; None where nothing can be written."""
    if config.CACHE_DIR:
        root = Path(config.CACHE_DIR)
    elif sys.platform == "win32":
        root = Path(os.environ.get("LOCALAPPDATA", Path.home())) / "pydeform"
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pydeform"
    # One folder for each installed copy: two versions side by side do not overwrite each other.
    folder = root / ("kernels_" + hashlib.sha256(str(_SOURCES).encode()).hexdigest()[:16])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        say_once(f"no compiled kernels are kept, {folder} is not writable: every process compiles them again")
        return None
    return folder


class _Locator:
    """Tells Numba's cache the folder and when its content is out of date."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @classmethod
    def from_function(cls, function: Callable[..., Any], _file: str) -> _Locator:
        return cls(function)

    def ensure_cache_path(self) -> None:
        os.makedirs(self.get_cache_path(), exist_ok=True)

    def get_cache_path(self) -> str:
        return str(cache_directory())

    def get_source_stamp(self) -> str:
        return source_digest()

    def get_disambiguator(self) -> str:
        return "kernel"


class _CacheImpl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_Locator,)


class _Cache(caching.FunctionCache):  # type: ignore[misc]
    _impl_class = _CacheImpl

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:  # a full disk is no reason to fail
            say_once(f"a compiled kernel could not be kept: {error}")


# Without Numba's runtime: kernels allocate nothing, and their callers hold all arrays, so nobody needs to count who
# uses them, by atomic additions in the midst of loops.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False}


def inline(function: Callable[..., Any]) -> Any:
    """A function called by kernels; compiled into them."""
    return numba.njit(**_OPTIONS)(function)


def inline_always(function: Callable[..., Any]) -> Any:
    """The same for a small step in a hot loop: where a call would be left, its arrays and records are copied word by
    word, which takes longer than the step."""
    return numba.njit(forceinline=True, **_OPTIONS)(function)


class Kernel:
    """An entry point: a Numba function that runs without the GIL, compiled at its first call for a dtype."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.call = numba.njit(**_OPTIONS)(function)
        self._compiled: set[Any] = set()

    def prepare(self, key: Any, arguments: tuple[Any, ...]) -> None:
        """Compile for the types of `arguments`, or load from disk; `key` stands for those types."""
        if key in self._compiled:
            return
        with _lock:
            if key in self._compiled:
                return
            if not self._compiled and cache_directory() is not None:
                self.call._cache = _Cache(self.call.py_func)
            with _announced():
                self.call.compile(tuple(typeof(argument) for argument in arguments))
            self._compiled.add(key)


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Say what is going on when it takes longer than a second."""
    where = cache_directory()
    kept = f"kept in {where}" if where else "not kept: no writable cache folder"
    timer = threading.Timer(1.0, say_once, [f"compiling kernels for this machine ({kept})"])
    timer.daemon = True
    with contextlib.suppress(RuntimeError, OSError):  # no thread for a message is no reason to fail
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
