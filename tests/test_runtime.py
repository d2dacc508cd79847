"""How many threads a call may use: who says so, in which order, and for whom."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

import pydeform


@pytest.fixture
def unset(monkeypatch):
    """Nobody has said anything yet."""
    from pydeform import _runtime

    monkeypatch.setattr(_runtime, "_threads", None)
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_environment(unset):
    processors = pydeform.get_num_threads()
    unset.setenv("OMP_NUM_THREADS", "3")
    assert pydeform.get_num_threads() == 3
    unset.setenv("OMP_NUM_THREADS", " 5, 2")  # of each level of nested regions
    assert pydeform.get_num_threads() == 5
    unset.setenv("NUMBA_NUM_THREADS", "7")
    assert pydeform.get_num_threads() == 7
    for nonsense in ("", "0", "-1", "many"):
        unset.setenv("NUMBA_NUM_THREADS", nonsense)
        unset.setenv("OMP_NUM_THREADS", nonsense)
        assert pydeform.get_num_threads() == processors
    unset.setenv("NUMBA_NUM_THREADS", "7")
    pydeform.set_num_threads(2)
    assert pydeform.get_num_threads() == 2


def test_contexts_nest_and_end_with_an_exception():
    before = pydeform.get_num_threads()
    with pydeform.num_threads(5):
        with pytest.raises(RuntimeError), pydeform.num_threads(1):
            assert pydeform.get_num_threads() == 1
            raise RuntimeError
        assert pydeform.get_num_threads() == 5
    assert pydeform.get_num_threads() == before


def test_a_context_is_its_own_threads_and_tasks():
    before, seen = pydeform.get_num_threads(), []
    with pydeform.num_threads(before + 1):
        thread = threading.Thread(target=lambda: seen.append(pydeform.get_num_threads()))
        thread.start()
        thread.join()
    assert seen == [before]

    async def one():
        with pydeform.num_threads(before + 2):
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    async def other():
        await asyncio.sleep(0)
        return pydeform.get_num_threads()

    async def both():
        return (await asyncio.gather(one(), other()))[1]

    assert asyncio.run(both()) == before


@pytest.mark.parametrize("count", [0, -1, True])
def test_refuses_a_wrong_value_at_once(count):
    with pytest.raises(ValueError, match=rf"^num_threads: count must be an int >= 1, got {count}$"):
        pydeform.num_threads(count)


def test_refuses_what_is_no_int():
    with pytest.raises(TypeError, match=r"^num_threads: count must be an int >= 1, got 1\.5$"):
        pydeform.num_threads(1.5)


@pytest.mark.parametrize("first", ["threadpoolctl", "pydeform"])
def test_threadpoolctl_limits_this_too(first):
    """Whichever is imported first; the count from before comes back, and a limit of BLAS is none of ours."""
    pytest.importorskip("threadpoolctl")
    second = {"threadpoolctl": "pydeform", "pydeform": "threadpoolctl"}[first]
    program = f"""
import {first}, {second}
before = pydeform.get_num_threads()
with threadpoolctl.threadpool_limits(before + 1):
    assert pydeform.get_num_threads() == before + 1
assert pydeform.get_num_threads() == before
with threadpoolctl.threadpool_limits(before + 1, user_api="blas"):
    assert pydeform.get_num_threads() == before
with threadpoolctl.threadpool_limits(before + 2, user_api="pydeform"):
    assert pydeform.get_num_threads() == before + 2
assert [i["num_threads"] for i in threadpoolctl.threadpool_info() if i["user_api"] == "pydeform"] == [before]
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("stand_in", ["", "version = 1"])
def test_threadpoolctl_is_not_needed(stand_in, tmp_path):
    """Nor is a new one: those before 3.2 take no controllers of others."""
    (tmp_path / "threadpoolctl.py").write_text(stand_in, encoding="utf-8")
    hide = "" if stand_in else "import importlib.util as u; u.find_spec = lambda name: None; "
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {hide}import pydeform; pydeform.get_num_threads()"
    subprocess.run([sys.executable, "-c", program], check=True)
