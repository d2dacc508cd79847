"""Kernels that are compiled without CuPy: in machine code of the right kind, kept on disk, and never a damaged one."""

import numpy as np
import pytest

from tests.conftest import needs_emulation
from tests.cuda_emulation import nvrtc
from tests.test_cpu_kernels import run_python

SOURCE = """
#ifndef __CUDA_ARCH_FEAT_SM90_ALL
#error not for sm_90a
#endif
template <class T> __global__ void one(T* y) { y[threadIdx.x] = T(1); }
"""
ONE = "one<float>"


@pytest.fixture
def sm_90a(emulated, monkeypatch, tmp_path):
    """The module over the emulated device, with the list `compiled` of the expressions that it has compiled."""
    from pydeform.cuda.core import sm_90a

    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))
    sm_90a._own_folder.cache_clear()
    compile = sm_90a._compiled
    monkeypatch.setattr(sm_90a, "compiled", [], raising=False)
    monkeypatch.setattr(sm_90a, "_compiled", lambda text, e: sm_90a.compiled.append(e) or compile(text, e))
    return sm_90a


def assert_right(kernel):
    import cupy

    y = cupy.zeros(32, np.float32)
    kernel((1,), (32,), (y,))
    assert (y.get() == 1).all()


@needs_emulation
def test_compiled_once_and_kept(sm_90a, tmp_path):
    for _ in range(3):
        assert_right(sm_90a.kernel(SOURCE, ONE))
    assert sm_90a.compiled == [ONE]
    sm_90a.kernel(SOURCE + "\n", ONE)
    sm_90a.kernel(SOURCE, "one<double>")
    assert sm_90a.compiled == [ONE, ONE, "one<double>"]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".cubin"] * 3 + [".txt"] * 3


@needs_emulation
def test_another_version_compiles_anew(sm_90a, monkeypatch):
    import cupy

    sm_90a.kernel(SOURCE, ONE)
    monkeypatch.setattr(cupy.cuda.nvrtc, "getVersion", lambda: (12, 8))
    sm_90a.kernel(SOURCE, ONE)
    assert len(sm_90a.compiled) == 2


@needs_emulation
@pytest.mark.parametrize("suffix", [".cubin", ".txt"])
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:40] + b"\xff" + b[41:], None])
def test_a_damaged_file_is_compiled_again(sm_90a, tmp_path, suffix, damage):
    sm_90a.kernel(SOURCE, ONE)
    (path,) = (tmp_path / "cache").glob(f"*{suffix}")
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:  # else it is missing
        path.write_bytes(damage(whole))
    assert_right(sm_90a.kernel(SOURCE, ONE))
    assert sm_90a.compiled == [ONE] * 2 and path.read_bytes() == whole
    assert_right(sm_90a.kernel(SOURCE, ONE))
    assert len(sm_90a.compiled) == 2


@needs_emulation
def test_a_folder_that_cannot_be_written(sm_90a, tmp_path):
    (tmp_path / "cache").write_text("a file")
    for _ in range(2):
        assert_right(sm_90a.kernel(SOURCE, ONE))
    assert (tmp_path / "cache").read_text() == "a file"


@needs_emulation
def test_nothing_is_kept_for_who_wants_no_files(sm_90a, tmp_path, monkeypatch):
    monkeypatch.setenv("CUPY_CACHE_IN_MEMORY", "1")
    for _ in range(2):
        assert_right(sm_90a.kernel(SOURCE, ONE))
    assert sm_90a.compiled == [ONE] and not (tmp_path / "cache").exists()


@needs_emulation
def test_launches_take_it_where_there_is_wgmma(sm_90a, monkeypatch):
    """And CuPy for all others; nowhere are two architectures given, which NVRTC before 12.9 refuses."""
    from pydeform.cuda.core import launch
    from pydeform.cuda.core.source import Code
    from tests.cuda_emulation import device

    monkeypatch.setattr(launch, "_allowed", {})
    launch._kernel.cache_clear()
    with device.settings(capability="90"):
        launch.kernel(Code("conv"), "forward<Wgmma<f16, 128, 64, false>, int, 1>")
        launch.kernel(Code("conv"), "forward<Mma<f16, 128, 64, 32, 32, false>, int, 1>")
    assert sm_90a.compiled == ["forward<Wgmma<f16, 128, 64, false>, int, 1>"]


REAL = """
import sys
from pydeform.cuda.core import sm_90a
from tests.cuda_emulation import nvrtc
from tests.test_cuda_sm_90a import ONE, SOURCE

assert set(nvrtc.CUPY_OPTIONS) < set(sm_90a.OPTIONS)
name, code = sm_90a._compiled(SOURCE, ONE)
assert name.startswith("_Z") and name.encode() in code and code.startswith(b"\\x7fELF")
for text, expression, said in (
    (SOURCE, "two<float>", "two"),
    (SOURCE + "__global__ void 3();", ONE, "expected an identifier"),
):
    try:
        sm_90a._compiled(text, expression)
    except RuntimeError as error:
        assert f"{expression} for sm_90a" in str(error) and said in str(error), error
    else:
        sys.exit(f"compiles {expression}")
"""


@pytest.mark.skipif(not nvrtc.toolkits(), reason="NVRTC is not installed")
def test_machine_code_is_what_is_said():
    """By CuPy's own NVRTC, which needs no device; the module that other tests use has the emulated one."""
    pytest.importorskip("cupy")
    done = run_python(REAL)
    assert done.returncode == 0, done.stderr
