"""Every kernel through NVRTC, for every architecture it is meant for: it compiles, and nothing leaves the registers.

No GPU is needed. A spill or a stack frame costs more than any other mistake in a kernel, ptxas says so in its log, and
nobody reads that log when CuPy compiles.
"""

import importlib.util
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pydeform.cuda import kernels
from pydeform.cuda.core.source import Code
from pydeform.cuda.core.source import source as source_of
from tests.cuda_emulation import nvrtc, sass

OPTIONS = ("-std=c++17",)
CUDA = Path(importlib.util.find_spec("pydeform.cuda").origin).parent
CONV, ROI, GATHER, GRID = Code("conv"), Code("roi"), Code("gather"), Code("grid")
TOOLKITS = nvrtc.toolkits()
INSTANCES = [instance for code in kernels.CODES for instance in kernels.instances(code)]


def named(code):
    return f"{code.file}{code.axes}{'_active' * code.active}{'_surface' * code.surface}"


def sample():
    """Of each code, template, kind of product, type and list of architectures the first, which has the widest tile.

    With it how many of its code have had the same list before.
    """
    firsts = {(i.code, i.architectures, *re.findall(r"\w+", i.expression)[:3]): i for i in reversed(INSTANCES)}
    lists = [(i.code, i.architectures) for i in firsts.values()]
    return {i: lists[:number].count(lists[number]) for number, i in enumerate(firsts.values())}


SAMPLE = sample()
TURN = {instance: number for number, instance in enumerate(INSTANCES)}
# Templates that carry a family's work, forward and backward: by tiles, or by warps.
MAIN = {CONV: ("forward<", "backward_weight<"), ROI: ("pool_bins<", "input_gradient<")}
MAIN[GATHER], MAIN[GRID] = ("gather_samples<", "number_gradients<"), ("sample_points<", "point_gradients<")
CORES = ThreadPoolExecutor(os.cpu_count())

needs_nvrtc = pytest.mark.skipif(not TOOLKITS, reason=f"none of {', '.join(nvrtc.WHEELS)} is installed")
each_toolkit = pytest.mark.parametrize("toolkit", TOOLKITS, ids=str)


def faults(resources, remarks, budget):
    """What a kernel may not do, in words."""
    found = list(remarks)
    for field in ("stack", "spill_stores", "spill_loads"):
        if getattr(resources, field):
            found.append(f"{field} {getattr(resources, field)} bytes")
    if resources.registers > budget:
        found.append(f"{resources.registers} registers, its budget is {budget}")
    return found


def architectures(toolkit, instance):
    """All that the instance names, and the newest that this toolkit knows, which also runs what is for sm_90.

    Unless PYDEFORM_COMPILE_ALL is set, since the whole takes minutes, the newest toolkit compiles only the first of
    each template, type and kind of product that carry the work for all of them, and others for one; an older toolkit
    compiles those that carry the work, and a third of the others, for one each. These are taken in turns.
    """
    listed = [name for name in instance.architectures if toolkit.supports(name)]
    if "90" in instance.architectures:
        listed.append(str(toolkit.architectures[-1]))
    listed = list(dict.fromkeys(listed))
    if os.environ.get("PYDEFORM_COMPILE_ALL"):
        return listed
    carries = instance in SAMPLE and instance.expression.startswith(MAIN.get(instance.code, ()))
    if toolkit is not TOOLKITS[-1]:
        is_due = carries or (instance in SAMPLE and TURN[instance] % 3 == 0)
        return [listed[SAMPLE[instance] % len(listed)]] if is_due else []
    return listed if carries else [listed[TURN[instance] % len(listed)]]


# The only kernel with a sine, which for large angles has digits of pi in a stack frame; a thread for each box calls it.
TAKES_SINES = "turn_boxes<"


def faults_of(instance, toolkit, architecture):
    resources, remarks = nvrtc.cached(toolkit, source_of(instance.code), instance.expression, architecture, OPTIONS)
    if instance.expression.startswith(TAKES_SINES):
        resources = resources._replace(stack=0)
    return [f"{toolkit}, sm_{architecture}: {fault}" for fault in faults(resources, remarks, instance.registers)]


@needs_nvrtc
@pytest.mark.parametrize("instance", INSTANCES, ids=lambda i: f"{named(i.code)}-{i.expression}")
def test_kernel_compiles_and_stays_in_its_registers(instance):
    jobs = [(instance, toolkit, name) for toolkit in TOOLKITS for name in architectures(toolkit, instance)]
    assert jobs
    found = [fault for faults in CORES.map(lambda job: faults_of(*job), jobs) for fault in faults]
    assert not found, "\n".join(found)


@needs_nvrtc
@each_toolkit
@pytest.mark.parametrize("code", MAIN, ids=named)
def test_every_dtype_is_compiled_for_every_architecture(code, toolkit):
    """Forward and backward; with an older toolkit each for one architecture, so that all have their turn."""
    newest = str(toolkit.architectures[-1])
    every, of_code = ("75", "80", "90", newest), set()
    for kernel in MAIN[code]:
        found = {
            (dtype, name)
            for instance in INSTANCES
            if instance.code == code and instance.expression.startswith(kernel)
            for dtype in ("double", "float", "f16", "bf16")
            if f"<{dtype}," in instance.expression
            for name in architectures(toolkit, instance)
        }
        of_code |= {name for _, name in found}
        assert {dtype for dtype, _ in found} == {"double", "float", "f16", "bf16"}, kernel
        if toolkit is TOOLKITS[-1]:
            wanted = {(d, a) for d in ("double", "float", "f16", "bf16") for a in every}
            assert not wanted - found, f"{kernel}: {sorted(wanted - found)}"
    assert not set(every) - of_code


def test_every_code_has_kernels():
    assert {code.file for code in kernels.CODES} == {path.stem for path in CUDA.rglob("*.cu")}
    for code in kernels.CODES:
        assert kernels.instances(code), code


def test_every_kernel_is_compiled():
    text = "".join(path.read_text("utf-8") for path in CUDA.rglob("*.cu*"))
    heads = [part.partition("{")[0] for part in text.split("__global__ void")[1:]]
    defined = {
        next(name for name in re.findall(r"(\w+)\(", head) if name not in ("__launch_bounds__", "sizeof"))
        for head in heads
    }
    assert len(defined) > 25
    assert not defined - {instance.expression.partition("<")[0] for instance in INSTANCES}


# What the assembler makes of it ---------------------------------------------------------------------------------------
needs_disassembler = pytest.mark.skipif(
    not TOOLKITS or sass.disassembler() is None, reason="NVRTC or nvidia-cuda-nvdisasm is not installed"
)
ASYNCHRONOUS_COPY = "LDGSTS.E.BYPASS.128"  # past L1
VECTOR_RED = "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU"
# (kernel, architecture) -> products, copies and loads of matrices in its main loop, and no others of these kinds; adds
# to global memory anywhere.
FORMS = {
    ("forward<Wgmma<f16, 128, 256, false>, int, 1>", "90a"): ({"HGMMA.64x256x16.F32": 4, ASYNCHRONOUS_COPY: 8}, {}),
    ("forward<Wgmma<bf16, 128, 128, false>, int, 1>", "90a"): (
        {"HGMMA.64x128x16.F32.BF16": 4, ASYNCHRONOUS_COPY: 4},
        {},
    ),
    ("forward<Wgmma<float, 128, 128, true>, int, 1>", "90a"): (
        {"HGMMA.64x128x8.F32.TF32": 12, ASYNCHRONOUS_COPY: 8},
        {},
    ),
    ("backward_data<Wgmma<f16, 128, 64, false>, int, false>", "90a"): (
        {"HGMMA.64x64x16.F32": 4, ASYNCHRONOUS_COPY: 6},
        {VECTOR_RED: 32},
    ),
    ("backward_weight<TurnedMma<f16, 256, 64, 64, 32>, int, 1>", "90"): (
        {"HMMA.16816.F32": 64, "LDSM.16.MT88.4": 24, ASYNCHRONOUS_COPY: 8},
        {},
    ),
    ("backward_weight<TurnedMma<bf16, 256, 64, 64, 32>, int, 1>", "80"): (
        {"HMMA.16816.F32.BF16": 64, "LDSM.16.MT88.4": 24, ASYNCHRONOUS_COPY: 8},
        {},
    ),
    ("forward<Mma<float, 128, 128, 64, 32, 3>, int, 1>", "80"): (
        {"HMMA.1688.F32.TF32": 48, "LDSM.16.M88.4": 6},
        {},
    ),
    ("forward<Mma<f16, 64, 64, 32, 32>, int, 1>", "75"): ({"HMMA.1688.F32": 32, "LDSM.16.M88.4": 8}, {}),
}


def machine_code(expression, architecture, source=None):
    return nvrtc.cached_code(TOOLKITS[-1], source or source_of(CONV), expression, architecture, OPTIONS)


def wrong_forms(code, in_loop, elsewhere):
    """Differences from what FORMS says, and barriers that wgmma may meet without a fence."""
    loop, _ = sass.main_loop(code)
    kinds = re.compile(r"[A-Z]+MMA\.|LDSM|LDGSTS|REDG|ATOM|STL|LDL")
    got = {i.opcode: 0 for i in loop if kinds.match(i.opcode)}
    for name in got:
        got[name] = sum(i.opcode == name for i in loop)
    found = [] if got == in_loop else [f"in the main loop {got}"]
    names = [i.opcode for i in code]
    adds = {name for name in names if name.startswith(("REDG", "ATOM"))}
    found += [f"{names.count(name)} {name}" for name in elsewhere if names.count(name) != elsewhere[name]]
    found += [f"{name} too" for name in adds - set(elsewhere)]
    if any(name.startswith("HGMMA") for name in got):
        fenced = False
        for i in [*loop, *loop]:  # what ends one turn comes before what begins the next
            if i.opcode.startswith("FENCE.VIEW.ASYNC"):
                fenced = True
            elif i.opcode.startswith(("STS", "DEPBAR", "LDGSTS")):
                fenced = False
            elif i.opcode.startswith("BAR") and not fenced:
                found.append("a barrier with no fence since the last store or wait for a copy")
                break
    return found


@needs_disassembler
@pytest.mark.parametrize("expression, architecture", FORMS)
def test_instructions_have_the_form_that_was_meant(expression, architecture):
    assert any(i.expression == expression and architecture in i.architectures for i in INSTANCES)
    assert wrong_forms(machine_code(expression, architecture), *FORMS[expression, architecture]) == []


WGMMA = "forward<Wgmma<f16, 128, 256, false>, int, 1>", "90a"
BACKWARD = "backward_data<Wgmma<f16, 128, 64, false>, int, false>", "90a"
WEIGHT = "backward_weight<TurnedMma<f16, 256, 64, 64, 32>, int, 1>", "90"
SASS_FAULTS = {  # kernel, what is right, what is wrong, what is said of it
    "no fence": (WGMMA, "P::ready();", "", "a barrier with no fence"),
    "fence before the wait": (
        BACKWARD,
        "      cp_async_wait<0>();\n      P::ready();\n      __syncthreads();\n      if (s + 1 < steps)",
        "      P::ready();\n      cp_async_wait<0>();\n      __syncthreads();\n      if (s + 1 < steps)",
        "a barrier with no fence",
    ),
    "through L1": (WGMMA, "cp.async.cg.shared.global", "cp.async.ca.shared.global", "'LDGSTS.E.128': 8"),
    "one by one": (BACKWARD, "#ifdef PYDEFORM_RED_V4\n  ptx::red", "#if 0\n  ptx::red", "0 REDG.E.ADD.F32x4"),
    "not turned": (WEIGHT, "x4.trans.shared", "x4.shared", "'LDSM.16.M88.4': 24"),
    "half of the tile": (WGMMA, "ROW; k += K_BYTES", "ROW / 2; k += K_BYTES", "'HGMMA.64x256x16.F32': 2"),
}


@needs_disassembler
@pytest.mark.parametrize("fault", SASS_FAULTS)
def test_a_wrong_form_is_seen(fault):
    key, right, wrong, said = SASS_FAULTS[fault]
    source = source_of(CONV)
    assert right in source
    found = wrong_forms(machine_code(*key, source.replace(right, wrong)), *FORMS[key])
    assert any(said in text for text in found), found


# The gate itself -----------------------------------------------------------------------------------------------------
SOURCE = """
template <int N> __global__ void __launch_bounds__(1024, 1) crowded(float* p) {
  float a[N];
#pragma unroll
  for (int i = 0; i < N; i++) a[i] = p[7 * i + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i++) p[7 * i + threadIdx.x] = a[i] * a[(3 * i + 1) % N];
}
__global__ void indexed(float* p, int i) {
  float a[512];
  for (int j = 0; j < 512; j++) a[j * i & 511] = p[j];
  p[0] = a[i];
}
template <class T> __global__ void plain(T* p) {
  __shared__ T row[32];
  row[threadIdx.x] = p[threadIdx.x];
  __syncthreads();
  p[threadIdx.x] = row[31 - threadIdx.x];
}
#if __CUDA_ARCH__ == 900
__global__ void serialised(float* p, unsigned long long a, unsigned long long b) {
  float d[4] = {};
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  for (int i = 0; i < 4; i++) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "l"(a), "l"(b));
    d[0] += 1;  // while the product is in flight
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; i++) p[4 * threadIdx.x + i] = d[i];
}
#endif
"""


def compiled(toolkit, expression, architecture="80", source=SOURCE, options=OPTIONS):
    result = toolkit.compile(source, [expression], architecture, options)
    return result.kernels[expression], result.remarks


@each_toolkit
def test_a_sound_kernel_passes(toolkit):
    resources, remarks = compiled(toolkit, "plain<float>")
    assert faults(resources, remarks, budget=32) == []
    assert resources.shared == 128
    assert compiled(toolkit, "plain<double>")[0].shared == 256


@each_toolkit
def test_faults_are_seen(toolkit):
    spilling = "\n".join(faults(*compiled(toolkit, "crowded<128>"), budget=64))
    assert "spill_stores" in spilling and "spill_loads" in spilling and "stack" in spilling
    assert "registers" not in spilling
    resources, remarks = compiled(toolkit, "plain<float>")
    assert faults(resources, remarks, resources.registers - 1) == [
        f"{resources.registers} registers, its budget is {resources.registers - 1}"
    ]
    assert faults(*compiled(toolkit, "indexed"), budget=255) == ["stack 2048 bytes"]
    serialised = "\n".join(faults(*compiled(toolkit, "serialised", "90a"), budget=255))
    assert "serialized" in serialised


@each_toolkit
def test_warnings_are_seen(toolkit):
    _, remarks = compiled(toolkit, "idle", source='#line 7 "part.cuh"\n__global__ void idle() { int unused; }')
    assert remarks[0].startswith('part.cuh(7): warning #177-D: variable "unused"')


@each_toolkit
def test_an_error_names_our_file_and_line(toolkit):
    where = source_of(CONV) + '\n#line 40 "part.cuh"\n__global__ void broken(int* p) {\n  p[0] = q;\n}\n'
    with pytest.raises(nvrtc.CompileError, match=r'part\.cuh\(41\): error: identifier "q" is undefined'):
        compiled(toolkit, "broken", source=where)
    with pytest.raises(nvrtc.CompileError, match="no_such_kernel"):
        compiled(toolkit, "no_such_kernel<int>")


@each_toolkit
def test_wgmma_is_for_sm_90a_alone(toolkit):
    """And CuPy compiles for sm_90: what has wgmma is compiled without it."""
    assert compiled(toolkit, "serialised", "90a")[0].registers
    with pytest.raises(nvrtc.CompileError, match=r"wgmma.* not supported on \.target 'sm_90'"):
        compiled(toolkit, "serialised", "90")


@each_toolkit
def test_results_are_kept_until_something_changes(toolkit, tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc, "CACHE", tmp_path / "cache")
    calls = []
    compile = toolkit.compile
    monkeypatch.setattr(toolkit, "compile", lambda *arguments: calls.append(arguments) or compile(*arguments))

    def run(*changed):
        found = nvrtc.cached(toolkit, *changed)
        return found, len(calls)

    first, _ = run(SOURCE, "plain<float>", "80", OPTIONS)
    assert run(SOURCE, "plain<float>", "80", OPTIONS) == (first, 1)
    assert run(SOURCE + " ", "plain<float>", "80", OPTIONS) == (first, 2)
    assert run(SOURCE, "plain<double>", "80", OPTIONS)[1] == 3
    assert run(SOURCE, "plain<float>", "86", OPTIONS)[1] == 4
    assert run(SOURCE, "plain<float>", "80", (*OPTIONS, "-DX=1"))[1] == 5
    monkeypatch.setattr(nvrtc, "CACHE", Path(os.devnull))  # cannot be written
    assert run(SOURCE, "plain<float>", "80", OPTIONS) == (first, 6)


def test_the_log_of_functions_that_were_not_inlined():
    log = """
ptxas info    : Compiling entry function 'a' for 'sm_90'
ptxas info    : Function properties for a
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Function properties for called
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function 'b' for 'sm_90'
ptxas info    : Function properties for b
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    assert nvrtc.resources(log) == {
        "a": nvrtc.Resources(registers=40, stack=16, spill_stores=4, spill_loads=8, shared=1024),
        "b": nvrtc.Resources(registers=8, stack=0, spill_stores=0, spill_loads=0, shared=0),
    }
    assert [line for line in log.splitlines() if not nvrtc.ORDINARY.match(line)] == []
