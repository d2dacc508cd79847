"""The emulation of CUDA catches planted faults, names their lines, and leaves correct kernels alone."""

from __future__ import annotations

import functools
import itertools
import os
import re
import shutil
import time

import numpy as np
import pytest

from tests.cuda_emulation import build, device

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++")
cupy = device.cupy
SOURCE = (build.HERE / "faults.cu").read_text(encoding="utf-8")
SCHEDULES = (0, 1, 2, 3)
UNINITIALISED, RACE, OUTSIDE = "uninitialised {} memory", "race, no barrier between", "out of bounds"

# kernel -> what its report must say
FAULTS = {
    "missing_barrier": rf"{RACE}: (read|write) of 4 bytes .* shared array tile",
    "overwrites_at_the_end_of_a_loop": rf"{RACE}: (read|write) of 4 bytes .* shared array tile",
    "overwrites_what_other_warps_read": rf"{RACE}: (read|write) of 4 bytes .* shared array tile",
    "overwrites_what_its_warp_reads": rf"{RACE}: (read|write) of 4 bytes .* shared array tile",
    "reads_before_the_copy_landed": "reads what a cp.async still has to write",
    "waits_for_the_copy_of_another_thread": f"reads what a cp.async still has to write|{RACE}.* shared array tile",
    "never_waits_for_the_copy": "returns while 1 cp.async have not been waited for",
    "reads_past_the_end": rf"{OUTSIDE}: read of 4 bytes; byte 512 of argument 0, which has 512 bytes",
    "writes_past_the_end": rf"{OUTSIDE}: write of 4 bytes; byte 512 of argument 1, which has 512 bytes",
    "writes_past_the_end_of_shared_memory": rf"{OUTSIDE}: write of 4 bytes; byte 512 of shared array tile",
    "reads_uninitialised_shared_memory": UNINITIALISED.format("shared"),
    "reads_uninitialised_global_memory": UNINITIALISED.format("global"),
    "adds_without_atomics": rf"{RACE}: .* argument 1, .* of another block",
    "reads_the_other_block": rf"{RACE}: .* of another block|{UNINITIALISED.format('global')}",
    "overwrites_what_the_other_block_reads": rf"{RACE}: .* argument 0, .* of another block",
    "barrier_in_a_branch": r"deadlock: 128 of 128 threads wait .* in __syncthreads at .* in a warp collective at",
    "returns_before_the_barrier": r"only 100 of 128 threads reach __syncthreads at .*: thread 100 has returned",
    "shuffles_from_outside_the_mask": r"lane \d+ shuffles from lane \d+, which the mask leaves out",
    "is_not_in_its_own_mask": r"a warp collective with mask 0000ffff, which leaves its own lane \d+ out",
    "misaligned_vector": "misaligned read of 16 bytes",
    "trusts_the_warp": rf"{RACE}: .* shared array tile",
    "trusts_half_the_warp": rf"{RACE}: .* shared array tile",
    "writes_what_it_reads_as_constant": "read-only load of memory that this launch writes",
    "converts_without_care": "conversion of a float that no int holds",
}
TWO_BLOCKS = ("adds_without_atomics", "reads_the_other_block", "overwrites_what_the_other_block_reads")
ON_ZEROS = ("adds_without_atomics",)
WGMMA = {
    "NO_WAIT": "returns while 1 wgmma have not been waited for",
    "NO_FENCE": "no wgmma_fence since the last wgmma_wait",
    "NO_PROXY_FENCE": r"wgmma, .* reads what thread \d+ wrote at .* with no fence_proxy_async",
    "NO_BARRIER": f"{RACE}|{UNINITIALISED.format('shared')}",
    "REFILL": "race, no barrier between|a tile is written between a wgmma and its wait",
    "TOUCH": "accumulators of a wgmma change before its wait",
}
# Bits of a descriptor that are turned over -> what is said of it
DESCRIPTORS = {
    1 << 62 | 1 << 63: "does not say 128-byte swizzle",
    1 << 62: "does not say 128-byte swizzle",
    1 << 49: "has a base offset",
    1 << 15: "has bits that mean nothing",
    1 << 48: "has bits that mean nothing",
    1 << 61: "has bits that mean nothing",
    3 << 16: "has a leading dimension",
    3 << 37: "strides groups of 8 rows by no multiple of 1024",
    1 << 38: "strides groups of 8 rows by no multiple of 1024",
    1 << 0: "a tile must start on a multiple of 1024 bytes",
    1 << 3: "a tile must start on a multiple of 1024 bytes",
    1 << 13: "out of bounds: read of 16 bytes",
}
# These are caught in the plain build as well.
IN_PLAIN = {
    "never_waits_for_the_copy": FAULTS["never_waits_for_the_copy"],
    "writes_past_the_end": "wrote out of bounds, after the memory of argument 1",
    "writes_past_the_end_of_shared_memory": "wrote 0 bytes past the end of tile, which has 512 bytes",
    "barrier_in_a_branch": FAULTS["barrier_in_a_branch"],
    "returns_before_the_barrier": FAULTS["returns_before_the_barrier"],
    "shuffles_from_outside_the_mask": FAULTS["shuffles_from_outside_the_mask"],
    "is_not_in_its_own_mask": FAULTS["is_not_in_its_own_mask"],
}


@functools.cache
def module():
    """All kernels of faults.cu at once: one compilation is faster than many."""
    flags = ("true", "false")
    expressions = [f"{name}<{flag}>" for name in (*FAULTS, "writes_elsewhere", "bank_conflicts") for flag in flags]
    expressions += [f"strided<{stride}>" for stride in (0, 1, 2, 8)] + ["vectors", "writes_an_input<true>"]
    expressions += [f"reads_again<{flag}>" for flag in flags]
    expressions += [*(f"wgmma_with<{fault}>" for fault in (*WGMMA, "NONE")), "wgmma_of"]
    code = build.inlined("faults.cu")
    return cupy.RawModule(code=code, architecture="90a", name_expressions=expressions)


def function(expression):
    return module().get_function(expression)


def lines(mark, kernel):
    """The lines of faults.cu, inside of a kernel, that carry a mark."""
    text = SOURCE.splitlines()
    first = next(number for number, line in enumerate(text) if re.search(rf"\b{kernel}\(", line))
    last = next(number for number in range(first, len(text)) if text[number].startswith("}") or number > first + 40)
    found = [f"faults.cu:{n + 1}" for n in range(first, last + 1) if re.search(rf"// .*{mark}\b", text[n])]
    assert found, f"{kernel} has no line marked {mark}"
    return found


def arrays(kernel, blocks):
    x = cupy.asarray(np.arange(128, dtype=np.float32))
    y = (cupy.zeros if kernel in ON_ZEROS else cupy.empty)(128 * blocks, np.float32)
    return (y, x) if kernel == "writes_what_it_reads_as_constant" else (x, y)


def launch(kernel, fixed):
    blocks = 2 if kernel in TWO_BLOCKS else 1
    function(f"{kernel}<{str(fixed).lower()}>")((blocks,), (128,), arrays(kernel, blocks))


@pytest.mark.parametrize("kernel", FAULTS)
def test_fault_is_caught(kernel):
    """In every schedule, and the report names the line."""
    for schedule in SCHEDULES:
        with device.settings(check=True, schedule=schedule), pytest.raises(device.EmulationError) as caught:
            launch(kernel, fixed=False)
        assert re.search(FAULTS[kernel], str(caught.value)), caught.value
        assert str(caught.value).startswith(f"{kernel}<false> block (")
        assert any(line in str(caught.value) for line in lines("FAULT", kernel)), caught.value


@pytest.mark.parametrize("kernel", [name for name in FAULTS if name not in ("writes_what_it_reads_as_constant",)])
def test_twin_without_fault_passes(kernel):
    results = []
    for schedule, check in itertools.product(SCHEDULES, (False, True)):
        with device.settings(check=check, schedule=schedule):
            blocks = 2 if kernel in TWO_BLOCKS else 1
            x, y = arrays(kernel, blocks)
            function(f"{kernel}<true>")((blocks,), (128,), (x, y))
            results.append(y.get().tobytes())
    assert len(set(results)) == 1


@pytest.mark.parametrize("kernel", IN_PLAIN)
def test_fault_is_caught_without_the_check_build(kernel):
    for schedule in SCHEDULES:
        with device.settings(schedule=schedule), pytest.raises(device.EmulationError, match=IN_PLAIN[kernel]):
            launch(kernel, fixed=False)


def test_without_the_check_build_races_show_only_in_results():
    """What the check build is for: here two schedules differ, and that is all one sees."""
    results = []
    for schedule in (0, 1):
        with device.settings(schedule=schedule):
            x, y = arrays("missing_barrier", 1)
            function("missing_barrier<false>")((1,), (128,), (x, y))
            results.append(y.get())
    assert results[0].tobytes() != results[1].tobytes()


def test_writing_between_two_arrays():
    x, y, other = (cupy.zeros(128, np.float32) for _ in range(3))
    away = np.int64((other.data.ptr - y.data.ptr) // 4)
    with device.settings(check=True):
        function("writes_elsewhere<true>")((1,), (128,), (x, y, away))
        with pytest.raises(device.EmulationError, match=f"{OUTSIDE}: write of 4 bytes") as caught:
            function("writes_elsewhere<false>")((1,), (128,), (x, y, away))
    assert lines("FAULT", "writes_elsewhere")[0] in str(caught.value)


def test_part_of_an_array_ends_where_it_ends():
    """An argument's bounds are its own, not those of the allocation that it is cut from."""
    x, y = cupy.zeros(300, np.float32), cupy.zeros(128, np.float32)
    with device.settings(check=True):
        function("reads_past_the_end<true>")((1,), (128,), (x[20:148], y))
        with pytest.raises(device.EmulationError, match=OUTSIDE):
            function("reads_past_the_end<false>")((1,), (128,), (x[20:148], y))


def test_writing_an_input_is_legal():
    for check in (False, True):
        with device.settings(check=check):
            x, y = arrays("writes_an_input", 1)
            function("writes_an_input<true>")((1,), (128,), (x, y))
            assert not x.get().any()


def test_what_counts_as_written():
    """Host writes, earlier launches checked or not, and copies initialise memory; `empty` does not."""
    kernel = function("reads_uninitialised_global_memory<false>")
    x, whole, part = cupy.zeros(128, np.float32), cupy.empty(128, np.float32), cupy.empty(256, np.float32)
    whole.fill(1)
    part[:128] = 1
    with device.settings(check=True):
        kernel((1,), (128,), (x, whole))
        kernel((1,), (128,), (x, part[:128]))
        for untouched in (part[128:], cupy.empty_like(x)):
            with pytest.raises(device.EmulationError, match=UNINITIALISED.format("global")):
                kernel((1,), (128,), (x, untouched))
        function("writes_an_input<true>")((1,), (128,), (whole, part[128:]))
        kernel((1,), (128,), (x, part[128:]))
        new = cupy.empty_like(x)
        with device.settings(check=False):
            function("writes_an_input<true>")((1,), (128,), (x, new))
        kernel((1,), (128,), (x, new))


@pytest.mark.parametrize("fault", WGMMA)
def test_wgmma_fault_is_caught(fault):
    x, y = cupy.asarray(np.arange(128, dtype=np.float32)), cupy.empty(4096, np.float32)
    for schedule in SCHEDULES:
        with device.settings(check=True, schedule=schedule):
            with pytest.raises(device.EmulationError, match=WGMMA[fault]) as caught:
                function(f"wgmma_with<{fault}>")((1,), (128,), (x, y), shared_mem=8192)
            assert any(line in str(caught.value) for line in lines(f"FAULT.* {fault}", "wgmma_with")), caught.value
            function("wgmma_with<NONE>")((1,), (128,), (x, y), shared_mem=8192)


@pytest.mark.parametrize("turned", DESCRIPTORS, ids=hex)
def test_wgmma_descriptor_is_read_bit_by_bit(turned):
    x, y = cupy.asarray(np.arange(128, dtype=np.float32)), cupy.empty(4096, np.float32)
    with device.settings(check=True), pytest.raises(device.EmulationError, match=DESCRIPTORS[turned]) as caught:
        function("wgmma_of")((1,), (128,), (x, y, np.uint64(turned)), shared_mem=16384)
    assert lines("FAULT", "wgmma_of")[0] in str(caught.value) or turned == 1 << 13


def test_wgmma_descriptor_says_where_its_rows_are():
    """Groups of 8 rows may lie 2048 bytes apart: of rows of 32 numbers, those from 64 to 127 have 1 added."""
    x, results = cupy.asarray(np.arange(128, dtype=np.float32)), []
    for turned in (0, 1 << 38 | 1 << 39):
        y = cupy.empty(4096, np.float32)
        with device.settings(check=True):
            function("wgmma_of")((1,), (128,), (x, y, np.uint64(turned)), shared_mem=16384)
        results.append(y.get())
    assert (results[0] != results[1]).any()
    twice, once = (result.reshape(128, 8, 2, 2) for result in reversed(results))
    assert (twice[:, :4] == once[:, :4]).all() and (twice[:, 4:] != once[:, 4:]).any()


def test_wgmma_without_its_wait_gives_nan():
    x, y = cupy.asarray(np.arange(128, dtype=np.float32)), cupy.zeros(4096, np.float32)
    with pytest.raises(device.EmulationError, match=WGMMA["NO_WAIT"]):
        function("wgmma_with<NO_WAIT>")((1,), (128,), (x, y), shared_mem=8192)
    assert np.isnan(y.get()).any()


def counters(expression, x, y, shared_mem=0):
    with device.settings(profile=True) as run:
        function(expression)((1,), (32,), (x, y), shared_mem=shared_mem)
    return run.counters()


@pytest.mark.parametrize("swizzled, wavefronts", [("true", 4), ("false", 32)])
def test_bank_conflicts_are_counted(swizzled, wavefronts):
    """Eight rows of a matrix, 128 bytes apart, lie in the same four banks unless they are swizzled."""
    x, y = cupy.zeros(128, np.float32), cupy.zeros(32, np.float32)
    found = counters(f"bank_conflicts<{swizzled}>", x, y, 4096)
    load = found[lines("COUNTED", "bank_conflicts")[0], "read", "shared"]
    assert (load.requests, load.wavefronts, load.least_wavefronts, load.bytes) == (1, wavefronts, 4, 512)


@pytest.mark.parametrize("stride, sectors", [(1, 4), (2, 8), (8, 32), (0, 1)])
def test_sectors_are_counted(stride, sectors):
    x, y = cupy.zeros(256, np.float32), cupy.zeros(32, np.float32)
    load = counters(f"strided<{stride}>", x, y)[lines("COUNTED", "strided")[0], "read", "global"]
    assert (load.requests, load.sectors, load.least_sectors, load.bytes) == (1, sectors, 4 if stride else 1, 128)


def test_vectors_are_one_request():
    x, y = cupy.zeros(128, np.float32), cupy.zeros(128, np.float32)
    found = counters("vectors", x, y)
    first, second, third = lines("COUNTED", "vectors")
    load, store, again = (
        found[first, "read", "global"],
        found[second, "write", "shared"],
        found[third, "read", "shared"],
    )
    assert (load.requests, load.sectors, load.least_sectors) == (1, 16, 16)
    assert (store.requests, store.wavefronts, store.least_wavefronts) == (1, 4, 4)
    assert (again.requests, again.wavefronts) == (
        1,
        4,
    )  # a quarter of the warp at a time, though all read the same 128 bytes


# What bounds a kernel ------------------------------------------------------------------------------------------------
def traffic(expression, *arguments, threads=32, shared_mem=0):
    with device.settings(profile=True) as run:
        function(expression)((1,), (threads,), arguments, shared_mem=shared_mem)
    (found,) = run.kernels().values()
    assert found.launches == 1
    return found


@pytest.mark.parametrize("stride, lines", [(0, 1), (1, 1), (2, 2), (8, 8)])
def test_a_load_passes_once_for_each_line(stride, lines):
    x, y = cupy.zeros(256, np.float32), cupy.zeros(32, np.float32)
    found = traffic(f"strided<{stride}>", x, y)
    sectors = 32 if stride == 8 else 4 * max(1, stride) if stride else 1
    assert (found.global_passes, found.shared_passes, found.operand_bytes) == (lines + 1, 0, 0)
    assert found.l2_bytes == 32 * sectors + 128


def test_vectors_pass_128_bytes_at_a_time():
    found = traffic("vectors", cupy.zeros(128, np.float32), cupy.zeros(128, np.float32))
    assert (found.global_passes, found.shared_passes, found.l2_bytes) == (8, 8, 1024)
    assert found.data_path_cycles == 16


@pytest.mark.parametrize("shared, kept", [(1024, True), (226 << 10, False)])
def test_l1_is_what_shared_memory_leaves(shared, kept):
    """300 lines are 38 KB: more than is left beside 226 KB of shared memory, and what is needed next is gone."""
    kernel = function("reads_again<false>")
    kernel.max_dynamic_shared_size_bytes = 227 << 10
    x, y = cupy.zeros(9600, np.float32), cupy.zeros(32, np.float32)
    found = traffic("reads_again<false>", x, y, np.int32(300), shared_mem=shared)
    assert found.global_passes == 601
    assert found.l2_bytes == 128 * (1 + 300 * (1 if kept else 2))


def test_copies_pass_by_l1():
    found = traffic(
        "reads_again<true>", cupy.zeros(128, np.float32), cupy.zeros(32, np.float32), np.int32(3), shared_mem=128
    )
    assert (found.global_passes, found.shared_passes) == (1, 6)
    assert found.l2_bytes == 128 * (6 + 1)


def test_wgmma_reads_its_operands_over_the_same_path():
    """One of 64 x 64 x 8: 64 rows of 32 bytes on each side."""
    x, y = cupy.zeros(128, np.float32), cupy.zeros(4096, np.float32)
    found = traffic("wgmma_with<NONE>", x, y, threads=128, shared_mem=8192)
    assert found.operand_bytes == 2 * 64 * 32 and found.tf32_multiply_adds == 64 * 64 * 8
    assert found.multiply_adds == 0 and found.data_path_cycles == found.global_passes + found.shared_passes + 32


def test_mma_is_counted():
    code = build.inlined("conformance.cu")
    kernel = cupy.RawModule(code=code, architecture="80", name_expressions=("products<bf16>",))
    with device.settings(profile=True, capability="80") as run:
        kernel.get_function("products<bf16>")((1,), (32,), (cupy.zeros(320, np.uint32), cupy.zeros(128, np.float32)))
    (found,) = run.kernels().values()
    assert (found.multiply_adds, found.tf32_multiply_adds, found.operand_bytes) == (16 * 8 * 16, 0, 0)


def test_what_has_the_type_and_order_is_not_copied():
    a = cupy.asarray(np.arange(6.0).reshape(2, 3))
    assert a.astype(float, copy=False) is a.astype(float, order="C", copy=False) is a
    turned = a.transpose()
    assert turned.astype(float, copy=False) is turned
    assert turned.astype(float, order="C", copy=False).get().flags.c_contiguous


def test_a_source_is_read_once_for_all_its_kernels(monkeypatch, tmp_path):
    build.runtime()  # stays where it is
    monkeypatch.setenv("PYDEFORM_EMULATION_CACHE", str(tmp_path))
    source = "template <int n> __global__ void adds(float* x) { x[0] += n; }"

    def compiled(source, number):
        return build.kernels(source, (f"adds<{number}>",), ("-std=c++17",), "80", True)

    one = compiled(source, 1)
    (read,) = tmp_path.glob("*.gch")
    first = read.stat().st_ino
    assert compiled(source, 2) != one and [read] == list(tmp_path.glob("*.gch"))
    assert read.stat().st_ino == first  # the same file
    compiled(source.replace("+=", "-="), 1)
    assert len(list(tmp_path.glob("*.gch"))) == 2
    unused = time.time() - build.UNUSED - 1
    os.utime(read, (unused, unused))
    compiled(source.replace("+=", "*="), 1)
    assert len(list(tmp_path.glob("*.gch"))) == 2 and not read.exists()
    assert compiled(source, 3).exists() and read.exists()
