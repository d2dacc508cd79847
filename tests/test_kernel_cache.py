"""Kernels on disk: what makes them out of date, damage of every kind, killed writers, several processes at once."""

from __future__ import annotations

import ast
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import llvmlite.binding
import numba
import numpy as np
import pytest

from pydeform.cpu.core import jit, kernel_cache
from pydeform.cpu.core.kernel_cache import KernelCache
from tests.test_cpu_kernels import TINY, run_python

PACKAGE = Path(kernel_cache.__file__).parents[2]
SAID = "are damaged: they are compiled again"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")


# What is compiled in.


def imports_of(path: Path) -> set[Path]:
    """All files of the package that a source imports, by Python's own parser."""
    names = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["pydeform", *path.relative_to(PACKAGE).parts[:-1]]
            base = ".".join([*(package[: len(package) - node.level + 1] if node.level else []), node.module or ""])
            names |= {f"{base.strip('.')}.{alias.name}" for alias in node.names} | {base.strip(".")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):  # importlib.import_module
            names.add(node.value)
    found = set()
    for name in names:
        top, *parts = name.split(".")
        place = PACKAGE.joinpath(*parts)
        found |= {p for p in (place.with_suffix(".py"), place / "__init__.py") if top == "pydeform" and p.is_file()}
    return found - {PACKAGE / "__init__.py"}


def test_all_that_is_compiled_in_counts():
    found = set((PACKAGE / "cpu").rglob("*.py"))
    while more := set().union(*map(imports_of, found)) - found:
        found |= more
    got = set(kernel_cache.compiled_sources())
    assert got == found
    assert {PACKAGE / "_geometry.py", PACKAGE / "_roi_geometry.py"} <= got
    assert PACKAGE / "cli.py" not in got and PACKAGE / "ops" / "conv2d.py" not in got


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """A copy of the package, for `_kernel_cache` to read the sources of."""
    copy = tmp_path / "pydeform"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(kernel_cache, "_PACKAGE", copy)
    return copy


def test_an_edit_in_any_compiled_source_makes_the_cache_stale(copied):
    before = kernel_cache.source_digest()
    for path in kernel_cache.compiled_sources():
        text = path.read_text("utf-8")
        path.write_text(text + "# edited\n", "utf-8")
        assert kernel_cache.source_digest() != before, path
        path.write_text(text, "utf-8")
        assert kernel_cache.source_digest() == before


def test_files_that_come_go_and_move_make_the_cache_stale(copied):
    before = kernel_cache.source_digest()
    new = copied / "cpu" / "below" / "further"
    new.mkdir(parents=True)
    (new / "more.py").write_text("")
    assert kernel_cache.source_digest() != before
    (new / "more.py").unlink()
    assert kernel_cache.source_digest() == before
    (copied / "cpu" / "roi" / "planes.py").rename(copied / "cpu" / "roi" / "plane.py")
    assert kernel_cache.source_digest() != before


@pytest.mark.parametrize(
    "line",
    [
        "from pydeform import _new",
        "from pydeform._new import (\n    a,\n    b,\n)",
        "from pydeform import (\n    _geometry,\n    _new,\n)",
        "import pydeform._new",
        "import os, pydeform._new as new",
        "def f():\n    from pydeform._new import x",
    ],
)
def test_a_new_import_is_followed(copied, line):
    (copied / "_new.py").write_text("from pydeform import _further\n")
    (copied / "_further.py").write_text("")
    assert copied / "_new.py" not in kernel_cache.compiled_sources()
    with (copied / "cpu" / "core" / "simd.py").open("a") as file:
        file.write(line + "\n")
    assert {copied / "_new.py", copied / "_further.py"} <= set(kernel_cache.compiled_sources())


def test_an_edit_elsewhere_compiles_nothing_again(copied):
    before = kernel_cache.source_digest()
    for name in ("cli.py", "__init__.py", "ops/conv2d.py", "layers/__init__.py"):
        with (copied / name).open("a") as file:
            file.write("# edited\n")
    assert kernel_cache.source_digest() == before


SWAPPED = """
import numpy as np, pydeform
rng = np.random.default_rng(0)
x, w = rng.standard_normal((1, 2, 5, 9)), rng.standard_normal((3, 2, 2, 3))
want = np.array([[(x[0, :, i:i + 2, j:j + 3] * k).sum() for i in range(4) for j in range(7)] for k in w])
print(pydeform.__file__, abs(pydeform.conv2d(x, w).reshape(want.shape) - want).max() < 1e-13)
"""


def test_an_upgrade_in_place_gives_right_numbers(tmp_path):
    copy = tmp_path / "pydeform"
    shutil.copytree(PACKAGE, copy)

    def run():
        done = subprocess.run(
            [sys.executable, "-c", SWAPPED],
            env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout == f"{copy / '__init__.py'} True\n", done.stderr

    run()
    source = copy / "_geometry.py"
    swapped = source.read_text().replace(
        "    kernel: tuple[int, ...]\n    stride:", "    stride: tuple[int, ...]\n    kernel:"
    )
    assert swapped != source.read_text()
    source.write_text(swapped)
    kept = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*.nbc")}
    run()
    assert kept and all(path.read_bytes() != content for path, content in kept.items())  # replaced: no folder grows


# One kernel's file, in this process.


def times_three(x):
    return 3 * x


def kept_in(folder: Path, function=times_three, *types) -> object:
    """The function, compiled for the types or loaded from the folder, as a process would that has not seen it yet."""
    dispatcher = numba.njit(_nrt=False)(function)
    dispatcher._cache = KernelCache(function, folder)
    dispatcher.compile(types or (numba.int64,))
    return dispatcher


def loaded(dispatcher) -> bool:
    return sum(dispatcher.stats.cache_hits.values()) == 1


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """Of a kernel that is kept, in a process that has said nothing yet."""
    monkeypatch.setattr(kernel_cache, "_said", set())
    assert not loaded(kept_in(tmp_path))
    assert loaded(kept_in(tmp_path))
    (path,) = tmp_path.iterdir()
    return path


def zero_middle(path):
    content = path.read_bytes()
    third = len(content) // 3
    path.write_bytes(content[:third] + bytes(third) + content[2 * third :])


def put_folder(path):
    path.unlink()
    path.mkdir()
    (path / "file").write_text("in the way")


def put_link(path, target):
    path.unlink()
    path.symlink_to(target)


def put_pipe(path):
    path.unlink()
    os.mkfifo(path)


def other_content(path, content):
    """Sound by its checksum and of the right identity, so written by us, but nothing that Numba can use."""
    start = path.read_bytes()[kernel_cache._DIGEST_BYTES :][: kernel_cache._DIGEST_BYTES]
    path.write_bytes(kernel_cache.hashlib.sha256(start + content).digest() + start + content)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "one byte": lambda path: path.write_bytes(b"\0"),
    "checksum only": lambda path: path.write_bytes(path.read_bytes()[:32]),
    "header only": lambda path: path.write_bytes(path.read_bytes()[:64]),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last byte missing": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "all zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "zeros within": zero_middle,
    "garbage": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "another pickle": lambda path: path.write_bytes(pickle.dumps({"a": [1, 2, 3]})),
    "folder": put_folder,
    "link to nothing": lambda path: put_link(path, path.parent / "nothing"),
    "link to itself": lambda path: put_link(path, path),
    "link to a folder": lambda path: put_link(path, path.parent.parent),
    "sound, no pickle": lambda path: other_content(path, b"no pickle"),
    "sound, another pickle": lambda path: other_content(path, pickle.dumps((1, 2))),
    "sound, empty": lambda path: other_content(path, b""),
}
if hasattr(os, "mkfifo"):
    DAMAGE["pipe"] = put_pipe


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_said_once_compiled_again_and_replaced(file, capsys, kind):
    DAMAGE[kind](file)
    dispatcher = kept_in(file.parent)
    assert not loaded(dispatcher) and dispatcher(14) == 42
    assert capsys.readouterr().err == f"pydeform: some of the compiled kernels in {file.parent} {SAID}\n"
    dispatcher = kept_in(file.parent)
    assert loaded(dispatcher) and dispatcher(14) == 42
    DAMAGE[kind](file)
    assert kept_in(file.parent)(14) == 42
    assert capsys.readouterr().err == ""  # one line is enough
    assert list(file.parent.iterdir()) == [file]


def test_an_unreadable_file(file, capsys, monkeypatch):
    """Root reads anything, so permission is denied by hand."""

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        patch.setattr(kernel_cache, "source_digest", lambda: kernel_cache._loaded_sources)
        assert kept_in(file.parent)(14) == 42
    assert capsys.readouterr().err.count(SAID) == 1
    assert loaded(kept_in(file.parent))


def test_one_wrong_bit_anywhere_is_seen_before_llvm_sees_it(file):
    content = bytearray(file.read_bytes())
    for place in [*range(0, len(content), 211), len(content) - 1]:
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            kernel_cache._read(file, b"")
        content[place] ^= 1 << place % 8


def test_a_file_of_another_kernel_under_this_name_is_not_run(tmp_path):
    """Sound, but in the wrong place: copied or renamed by somebody."""

    def times_five(x):
        return 5 * x

    kept_in(tmp_path)
    (three,) = tmp_path.iterdir()
    kept_in(tmp_path, times_five)
    (five,) = set(tmp_path.iterdir()) - {three}
    three.write_bytes(five.read_bytes())
    assert kept_in(tmp_path)(14) == 42


def test_what_else_determines_machine_code_makes_a_file_stale(file, monkeypatch):
    """Versions replace the file, for one is in use at a time."""
    for module, name, value in (
        (numba, "__version__", "0.0"),
        (np, "__version__", "0.0"),
        (kernel_cache.llvmlite, "__version__", "0.0"),
        (llvmlite.binding, "llvm_version_info", (0, 0, 0)),
        (kernel_cache, "_loaded_sources", "0"),
    ):
        assert loaded(kept_in(file.parent))
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            patch.setattr(kernel_cache, "source_digest", lambda: kernel_cache._loaded_sources)
            assert not loaded(kept_in(file.parent)), name
            assert loaded(kept_in(file.parent)), name
        assert not loaded(kept_in(file.parent)), name
    assert list(file.parent.iterdir()) == [file]


def test_what_may_be_in_use_side_by_side_has_a_file_each(file, monkeypatch):
    count = 1
    for module, name, value in (
        (numba.config, "OPT", 0),
        (numba.config, "BOUNDSCHECK", 1),
        (numba.config, "LOOP_VECTORIZE", 0),
        (sys, "version", "another Python"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert not loaded(kept_in(file.parent)), name
            assert loaded(kept_in(file.parent)), name
        count += 1
        assert len(list(file.parent.iterdir())) == count, name
        assert loaded(kept_in(file.parent)), name
    assert not loaded(kept_in(file.parent, times_three, numba.float64))


def test_another_processor_has_files_of_its_own(tmp_path):
    code = """
import sys; from pathlib import Path
from tests.test_kernel_cache import kept_in, loaded
print(loaded(kept_in(Path(sys.argv[1]))))
"""
    code = code.replace("sys.argv[1]", repr(str(tmp_path)))
    assert not loaded(kept_in(tmp_path)) and loaded(kept_in(tmp_path))
    for want in (False, True):
        done = run_python(code, NUMBA_CPU_NAME="generic")
        assert done.stdout == f"{want}\n", done.stderr
    assert loaded(kept_in(tmp_path)) and len(list(tmp_path.iterdir())) == 2


def tuple_type(*fields):
    return NamedTuple("Sizes", [(name, int) for name in fields])


def first_field(sizes):
    return sizes.first


@pytest.mark.parametrize("nested", [False, True])
def test_two_tuples_of_one_name_are_two_types(tmp_path, monkeypatch, nested):
    """Numba names a type by its class and the types of its fields, not by their order."""

    def first_nested(outer):
        return outer[0].first

    monkeypatch.setattr(sys.modules[__name__], "Sizes", None, raising=False)
    for fields, values in ((("first", "second"), (1, 2)), (("second", "first"), (2, 1)), (("first", "third"), (1, 3))):
        Sizes = tuple_type(*fields)
        monkeypatch.setattr(sys.modules[__name__], "Sizes", Sizes)  # where pickle looks for it
        argument = (Sizes(*values),) if nested else Sizes(*values)
        function = first_nested if nested else first_field
        dispatcher = kept_in(tmp_path, function, numba.typeof(argument))
        assert not loaded(dispatcher) and dispatcher(argument) == 1
        assert loaded(kept_in(tmp_path, function, numba.typeof(argument)))


def test_what_a_kernel_closes_over_counts(tmp_path):
    def times(factor):
        def scaled(x):
            return factor * x

        return scaled

    assert kept_in(tmp_path, times(2))(5) == 10
    assert kept_in(tmp_path, times(3))(5) == 15
    assert loaded(kept_in(tmp_path, times(2)))


def test_an_upgrade_while_a_process_runs_is_not_credited_with_the_old_code(tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_cache, "source_digest", lambda: "of the new sources")
    assert kept_in(tmp_path)(14) == 42
    assert not list(tmp_path.iterdir())


def test_a_folder_that_vanishes_comes_back(file):
    shutil.rmtree(file.parent)
    assert kept_in(file.parent)(14) == 42
    assert list(file.parent.iterdir()) == [file]
    if os.name == "posix":
        assert file.parent.stat().st_mode & 0o77 == 0  # code in it is run: nobody else may write there


def test_a_file_that_cannot_be_written_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernel_cache, "_said", set())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for _ in range(2):
        assert kept_in(tmp_path)(14) == 42
    assert capsys.readouterr().err == (
        "pydeform: a compiled kernel could not be kept: [Errno 28] No space left on device\n"
    )
    assert not list(tmp_path.iterdir())


def test_without_source_files_nothing_is_kept(monkeypatch, capsys, tmp_path):
    """From a zip file or a frozen program: an upgrade could not be seen."""
    monkeypatch.setattr(kernel_cache, "_said", set())
    monkeypatch.setattr(kernel_cache, "_PACKAGE", tmp_path)
    assert kernel_cache.source_digest() is None
    monkeypatch.setattr(kernel_cache, "_loaded_sources", None)
    assert kernel_cache.cache_directory.__wrapped__() is None
    assert capsys.readouterr().err.count("every process compiles them again") == 1


def test_without_a_home_nothing_is_kept(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(kernel_cache, "_said", set())
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(kernel_cache.config, "CACHE_DIR", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert kernel_cache.cache_directory.__wrapped__() is None
    assert capsys.readouterr().err.count("the home folder is not writable") == 1


def test_a_missing_or_closed_stderr_stops_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_cache, "_said", set())
    closed = (tmp_path / "log").open("w")
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stderr", stream)
        kernel_cache.say_once("something")


# Several processes.

KILLED = """
import itertools, os, random, signal, sys, time
from pathlib import Path
from pydeform.cpu.core import kernel_cache
from tests.test_kernel_cache import kept_in, loaded

folder = Path(sys.argv[1])
dispatcher = kept_in(folder)
(file,) = folder.iterdir()
((signature, compiled),) = dispatcher.overloads.items()
ready, tell = os.pipe()

def child(write):
    pid = os.fork()
    if pid == 0:
        try:
            os.write(tell, b"x")
            while True:
                write()
        finally:
            os._exit(1)
    os.read(ready, 1)
    return pid

def kill(pid):
    os.kill(pid, signal.SIGKILL)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])

rng = random.Random(0)
for number in range(60):  # at any moment, two at a time, every other time where there was no file
    if number % 2:
        file.unlink(missing_ok=True)
    pids = [child(lambda: dispatcher._cache.save_overload(signature, compiled)) for _ in range(2)]
    time.sleep(rng.random() * 0.01)
    for pid in pids:
        kill(pid)
    again = kept_in(folder)
    assert again(14) == 42
    assert loaded(again) or number % 2
    assert loaded(kept_in(folder))

def stop_in_the_midst(*_):
    os.write(tell, b"x")
    time.sleep(60)

for name in ("write", "replace"):  # and at the two moments that matter
    pid = os.fork()
    if pid == 0:
        if name == "replace":
            os.replace = stop_in_the_midst
        else:
            real = os.fdopen
            def half(handle, mode):
                file = real(handle, mode)
                write = file.write
                class Half:
                    def __enter__(self): return self
                    def __exit__(self, *_): pass
                    def write(self, content):
                        write(content[: len(content) // 2]); file.flush(); stop_in_the_midst()
                return Half()
            os.fdopen = half
        file.unlink()
        dispatcher._cache.save_overload(signature, compiled)
        os._exit(1)
    os.read(ready, 1)
    assert not file.exists()
    kill(pid)
    assert not loaded(kept_in(folder)) and loaded(kept_in(folder))

left = [path for path in folder.iterdir() if path != file]
assert len(left) >= 2 and all(path.suffix == ".tmp" for path in left)
for path in left[1:]:
    os.utime(path, (0, 0))
dispatcher._cache.save_overload(signature, compiled)
assert sorted(folder.iterdir()) == sorted([file, left[0]])  # a writer may still be at work on that one
print("all right")
"""


@needs_fork
def test_killed_writers_leave_no_half_kernel(tmp_path):
    done = run_python(KILLED.replace("sys.argv[1]", repr(str(tmp_path))))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all right\n" and done.stderr == ""


AT_ONCE = """
import sys; from pathlib import Path
import numba, numpy as np
from tests.test_kernel_cache import kept_in, loaded, times_three
print("ready", flush=True)
sys.stdin.readline()
types = [numba.int32, numba.int64, numba.float32, numba.float64, numba.complex64, numba.complex128]
for type in types[NUMBER % 6 :] + types[: NUMBER % 6]:
    dispatcher = kept_in(Path(FOLDER), times_three, type)
    result = dispatcher(getattr(np, type.name)(14))
    assert result == 42, type
print("right")
"""


def test_processes_that_write_the_same_kernels_at_once(tmp_path):
    """Each compiles for every type and starts with another one; all are right, and nobody meets half a file."""
    pipe = subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    running = []
    for number in range(4):
        code = AT_ONCE.replace("FOLDER", repr(str(tmp_path))).replace("NUMBER", str(number))
        command = [sys.executable, "-c", code]
        running.append(subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
    assert all(process.stdout.readline() == "ready\n" for process in running)
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        out, said = process.communicate(timeout=300)
        assert (process.returncode, out, said) == (0, "right\n", "")
    assert len(list(tmp_path.iterdir())) == 6
    for type in (numba.int32, numba.float32, numba.complex64):
        assert loaded(kept_in(tmp_path, times_three, type))


def test_processes_that_start_at_once_compile_each_kernel_once(tmp_path):
    """Whoever comes second waits, and loads what the first has written."""
    code = f"""{TINY}
from pydeform.cpu.core.jit import Kernel
import gc
kernels = [k for k in gc.get_objects() if isinstance(k, Kernel)]
print(sum(k.count_of_compiled() for k in kernels), sum(len(k._compiled) for k in kernels))
"""
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "NUMBA_CACHE_DIR": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "abc"
    ]
    lines = [process.communicate(timeout=300)[0].splitlines()[-1].split() for process in running]
    assert [process.returncode for process in running] == [0] * 3
    needed = {int(count) for _, count in lines}
    assert needed == {sum(int(compiled) for compiled, _ in lines)} != {0}


def test_a_compile_is_announced_and_later_processes_load_in_silence(tmp_path):
    cold = run_python(TINY, NUMBA_CACHE_DIR=str(tmp_path))
    assert cold.returncode == 0, cold.stderr
    assert cold.stdout.strip() == "9.0"
    assert cold.stderr.count("compiling kernels") == 1 and str(tmp_path) in cold.stderr
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert kept
    warm = run_python(TINY, NUMBA_CACHE_DIR=str(tmp_path))
    assert warm.stdout.strip() == "9.0" and warm.stderr == ""
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == kept
    for path in kept:
        os.truncate(path, 1000)
    again = run_python(TINY, NUMBA_CACHE_DIR=str(tmp_path))
    assert again.stdout.strip() == "9.0"
    assert [SAID in line or "compiling kernels" in line for line in again.stderr.splitlines()] == [True, True]
    assert {path for path in tmp_path.rglob("*.nbc") if path.stat().st_size > 1000} == set(kept)


LOADED = """
import numpy as np, pydeform
from numba.core.cpu import CPUContext
from pydeform.cpu.core import jit

refresh, CPUContext.refresh = CPUContext.refresh, None  # is called by whoever compiles
x = np.ones((1, 1, 3, 3), np.float32)
print(pydeform.conv2d(x, x).item())
CPUContext.refresh = refresh

@jit.Kernel
def sums(thread, values, output):
    for value in values:
        output[0] += value * value

values, output = np.arange(4.0), np.zeros(1)
sums.prepare("test", (0, values, output))(0, values, output)
print(output[0])
"""


def test_to_load_a_kernel_sets_up_nothing_of_numbas_compiler():
    """That takes longer than all the rest of a first call. What compiles afterwards sets it up."""
    done = run_python(TINY)  # compiles, where nobody has
    assert done.returncode == 0, done.stderr
    done = run_python(LOADED)
    assert (done.returncode, done.stdout) == (0, "9.0\n14.0\n"), done.stderr


def test_a_file_has_machine_code_and_names_and_no_text():
    @jit.Kernel
    def add_one(thread, values):
        values[thread] += 1

    values = np.zeros(2)
    add_one.prepare("test", (0, values))(1, values)
    (compiled,) = add_one.call.overloads.values()
    _, kind, (code, names) = compiled.library.serialize_using_object_code()
    module = llvmlite.binding.parse_bitcode(names)
    assert kind == "object" and len(code) > len(names)
    assert not list(module.functions)
    names = {variable.name for variable in module.global_variables}
    assert {compiled.fndesc.llvm_func_name, compiled.fndesc.llvm_cpython_wrapper_name} <= names
    assert values.tolist() == [0, 1]
