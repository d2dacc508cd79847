"""The stand-in for CuPy: launches, arguments, arrays and streams as the real ones, without their silent mistakes."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.cuda_emulation import build, device, dlpack, streams

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation is compiled with g++")
cupy = device.cupy
ROOT = Path(__file__).parents[1]
SOURCE = """
struct Pair { int first, second; };
__global__ void takes(float* y, int n, float f, long long big, Pair pair, const uint16_t* halves) {
  if (threadIdx.x == 0) y[0] = n + f + big + pair.first * pair.second + (halves ? halves[0] : 0);
}
__global__ void takes_shared(float* y) {
  PYDEFORM_DYNAMIC_SHARED(float, tile);
  y[threadIdx.x] = tile[threadIdx.x] = 1.0f;
}
template <int BYTES> __global__ void takes_static(float* y) {
  PYDEFORM_SHARED(unsigned char, tile, BYTES);
  y[threadIdx.x] = tile[threadIdx.x] = 1;
}
__global__ void order_of_threads(int* y, int* count) { y[atomicAdd(count, 1)] = 32 * blockIdx.x + threadIdx.x; }
__global__ void reverse(const float* x, float* y) {
  PYDEFORM_SHARED(float, tile, 128);
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[127 - threadIdx.x];
}
"""
EXPRESSIONS = ("takes", "takes_shared", "takes_static<49152>", "takes_static<49153>", "order_of_threads", "reverse")


@functools.cache
def module():
    return cupy.RawModule(code=SOURCE, architecture="90", name_expressions=EXPRESSIONS)


def function(expression):
    return module().get_function(expression)


def small(body, *options, **others):
    code = f"__global__ void small(float* y) {{ {body} }}"
    return cupy.RawModule(code=code, options=options, name_expressions=("small",), **others).get_function("small")


PAIR = np.dtype([("first", np.int32), ("second", np.int32)])


def arguments(**changed):
    given = dict(
        y=cupy.zeros(1, np.float32),
        n=np.int32(1),
        f=np.float32(0.5),
        big=np.int64(2),
        pair=np.array([(3, 4)], PAIR),
        halves=cupy.asarray(np.array([9], np.uint16)),
    )
    return tuple({**given, **changed}.values())


def test_arguments_arrive():
    takes = function("takes")
    for changed, want in (({}, 24.5), ({"halves": None}, 15.5), ({"pair": np.array((5, 5), PAIR)[()]}, 37.5)):
        args = arguments(**changed)
        takes((1,), (32,), args)
        assert args[0].get() == want


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"n": 1}, r"takes: argument 1 must be a NumPy scalar, got int"),
        ({"f": 0.5}, r"argument 2 must be a NumPy scalar, got float"),
        ({"n": np.int64(1)}, r"argument 1 has 4 bytes in the kernel, got 8 \(int64\)"),
        ({"big": np.int32(1)}, r"argument 3 has 8 bytes in the kernel, got 4 \(int32\)"),
        ({"f": np.float64(1)}, r"argument 2 has 4 bytes in the kernel, got 8 \(float64\)"),
        ({"f": np.int32(1)}, r"argument 2 is floating point in the kernel, got int32"),
        ({"n": np.float32(1)}, r"argument 1 is integer in the kernel, got float32"),
        ({"pair": np.int64(1)}, r"argument 4 is a structure in the kernel, got int64"),
        ({"pair": np.zeros(2, PAIR)}, r"argument 4 is a host array"),
        ({"n": np.zeros(1, np.int32)}, r"argument 1 is a host array"),
        ({"y": np.zeros(1, np.float32)}, r"argument 0 is a pointer, got ndarray"),
        ({"y": np.uint64(4096)}, r"argument 0 is a pointer, got uint64"),
        ({"y": cupy.zeros(1, np.float16)}, r"argument 0 points to 32-bit floating point, got float16"),
        ({"y": cupy.zeros(1, np.int32)}, r"argument 0 points to 32-bit floating point, got int32"),
        ({"y": cupy.zeros((2, 2), np.float32).T}, r"argument 0 is not contiguous"),
        ({"y": cupy.zeros(4, np.float32)[::2]}, r"argument 0 is not contiguous"),
        ({"extra": np.int32(1)}, r"takes 6 arguments, got 7"),
    ],
)
def test_wrong_argument_is_refused(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        function("takes")((1,), (32,), arguments(**changed))


def test_freed_array_is_refused():
    args = arguments()
    device.free(args[0])
    with pytest.raises(RuntimeError, match="after its memory was freed"):
        function("takes")((1,), (32,), args)
    with pytest.raises(RuntimeError, match="after its memory was freed"):
        args[0].get()


@pytest.mark.parametrize(
    "grid, block", [((0,), (32,)), ((1, 65536), (32,)), ((1,), (0,)), ((1,), (1, 1, 65)), ((1,), (1025,))]
)
def test_impossible_launch_is_refused(grid, block):
    with pytest.raises(ValueError, match="out of range"):
        function("takes")(grid, block, arguments())
    with pytest.raises(RuntimeError, match="more than 1024 threads"):
        function("takes")((1,), (64, 32), arguments())


@pytest.mark.parametrize(
    "capability, most", [("75", 64), ("80", 163), ("86", 99), ("89", 99), ("90", 227), ("120", 99)]
)
def test_limits_of_shared_memory(capability, most):
    y = cupy.zeros(32, np.float32)
    with device.settings(capability=capability):
        kernel = small(
            "PYDEFORM_DYNAMIC_SHARED(float, tile); tile[threadIdx.x] = 1; y[threadIdx.x] = tile[threadIdx.x];"
        )
        kernel((1,), (32,), (y,), shared_mem=48 << 10)
        with pytest.raises(RuntimeError, match=r"49153 bytes of shared memory, max_dynamic_shared_size_bytes is 49152"):
            kernel((1,), (32,), (y,), shared_mem=(48 << 10) + 1)
        with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
            kernel.max_dynamic_shared_size_bytes = (most << 10) + 1
        kernel.max_dynamic_shared_size_bytes = most << 10
        kernel((1,), (32,), (y,), shared_mem=most << 10)
        assert y.get().all()


def test_limits_of_static_shared_memory():
    y = cupy.zeros(32, np.float32)
    function("takes_static<49152>")((1,), (32,), (y,))
    with pytest.raises(device.EmulationError, match="48 KiB is the limit"):
        function("takes_static<49153>")((1,), (32,), (y,))
    with pytest.raises(device.EmulationError, match="the launch gave none"):
        function("takes_shared")((1,), (32,), (y,))


@pytest.mark.parametrize(
    "architecture, capability, runs",
    [("80", "80", 1), ("80", "86", 1), ("86", "80", 0), ("80", "90", 0), ("90a", "90", 1)],
)
def test_code_runs_on_devices_it_is_for(architecture, capability, runs):
    with device.settings(capability=capability):
        kernel = small("y[0] = __CUDA_ARCH__;", architecture=architecture)
        y = cupy.zeros(1, np.float32)
        if runs:
            kernel((1,), (32,), (y,))
            assert y.get() == int(architecture.rstrip("a")) * 10
        else:
            with pytest.raises(RuntimeError, match="no kernel image"):
                kernel((1,), (32,), (y,))


def test_error_of_the_compiler():
    with pytest.raises(build.CompileException, match=r"wrong.cu:3:\d+: error"):
        code = '#line 2 "wrong.cu"\n__global__ void wrong(float* y) {\n y[0] = unknown; }'
        cupy.RawModule(code=code, name_expressions=("wrong",)).get_function("wrong")
    with pytest.raises(build.CompileException, match="unknown option"):
        cupy.RawModule(code="", options=("-funroll-everything",))
    with pytest.raises(KeyError, match="is not among name_expressions"):
        cupy.RawModule(code="", name_expressions=("a",)).get_function("b")


def test_schedules_differ_and_repeat():
    def order(schedule):
        y, count = cupy.zeros(160, np.int32), cupy.zeros(1, np.int32)
        with device.settings(schedule=schedule):
            function("order_of_threads")((5,), (32,), (y, count))
        return tuple(y.get().tolist())

    assert order(0) == tuple(range(160))
    assert order(1) == tuple(range(159, -1, -1))
    orders = {order(schedule) for schedule in range(8)}
    assert len(orders) == 8 and all(sorted(found) == list(range(160)) for found in orders)
    assert order(5) == order(5)


def test_threads_launch_at_once():
    kernels = [function("reverse") for _ in range(4)]
    wrong = []

    def work(kernel, value):
        x, y = cupy.full(128, value, np.float32), cupy.empty(128, np.float32)
        for _ in range(50):
            kernel((1,), (128,), (x, y))
            if not (y.get() == value).all():
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(kernel, i)) for i, kernel in enumerate(kernels)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_two_processes_share_a_new_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PYDEFORM_EMULATION_CACHE", str(tmp_path))
    shutil.copy(build.runtime(), tmp_path)  # which takes seconds to compile
    script = (
        "from tests.cuda_emulation import device as d; c = d.cupy; y = c.zeros(1, 'f')\n"
        "code = '__global__ void one(float* y) { y[0] = 1; }'\n"
        "c.RawModule(code=code, name_expressions=('one',)).get_function('one')((1,), (1,), (y,)); assert y.get() == 1"
    )
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".gch", ".h", ".so", ".so"]


# ---- arrays
def inside_an_operator(expression, **values):
    """Evaluates the expression as code of the package would."""
    return eval(expression, {"__name__": "pydeform.cuda.operator", "cupy": cupy, **values})


@pytest.mark.parametrize(
    "expression",
    [
        *("a.get()", "a[0].item()", "bool(a[0])", "float(a[0])", "int(a[0])", "cupy.asnumpy(a)", "a.tolist()"),
        *("[1, 2][a[0]]", "cupy.cuda.Device().synchronize()", "cupy.cuda.get_current_stream().synchronize()"),
    ],
)
def test_operators_do_not_wait_for_the_device(expression):
    a = cupy.zeros(1, np.int32)
    eval(expression, {"a": a, "cupy": cupy})
    with pytest.raises(RuntimeError, match="waits for the device, inside an operator"):
        inside_an_operator(expression, a=a)


def test_arrays_are_not_numpy_arrays():
    a = cupy.zeros(3)
    assert not isinstance(a, np.ndarray) and type(a).__module__ == "cupy"
    with pytest.raises(TypeError, match="Implicit conversion to a NumPy array is not allowed"):
        np.asarray(a)
    with pytest.raises(TypeError, match="Unsupported type"):
        a[:] = np.ones(3)
    with pytest.raises(TypeError, match="Unsupported type"):
        a + np.ones(3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32", "uint8", "bfloat16"])
def test_arrays_behave_like_numpys(dtype):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    host = np.arange(24).reshape(2, 3, 4).astype(dtype)
    a = cupy.asarray(host)
    for make in (
        lambda a: a,
        lambda a: a[1],
        lambda a: a[:, ::2, 1:],
        lambda a: a[0, 1, 2],
        lambda a: a.T,
        lambda a: a.transpose(2, 0, 1),
        lambda a: a.reshape(6, -1),
        lambda a: a.T.reshape(-1),
        lambda a: a.copy(),
        lambda a: a.astype(np.float64),
        lambda a: a + a,
        lambda a: 2 * a,
    ):
        got, want = make(a), make(host)
        assert isinstance(got, cupy.ndarray)
        np.testing.assert_array_equal(got.get(), want)
        assert (got.shape, got.dtype, got.ndim, got.size, got.nbytes) == (
            *(np.shape(want), want.dtype, np.ndim(want), want.size, want.nbytes),
        )
        assert got.flags.c_contiguous == np.asarray(want).flags.c_contiguous
    assert a.view(np.uint8).get().tobytes() == host.tobytes()
    a[0, 1:] = 5
    host[0, 1:] = 5
    np.testing.assert_array_equal(a.get(), host)
    assert cupy.may_share_memory(a, a[1]) and not cupy.may_share_memory(a[0], a[1])
    assert cupy.may_share_memory(a.reshape(-1), a) and not cupy.may_share_memory(a.copy(), a)
    assert a.astype(dtype, copy=False) is a and a.astype(dtype) is not a
    assert a.data.ptr % 512 == 0 and a[1].data.ptr == a.data.ptr + a[0].nbytes


def test_functions_of_arrays():
    a = cupy.asarray(np.arange(5, dtype=np.int32))
    out = cupy.empty(5, np.int64)
    assert cupy.cumsum(a, dtype=np.int64, out=out) is out
    np.testing.assert_array_equal(out.get(), [0, 1, 3, 6, 10])
    assert cupy.cumsum(a, dtype=np.int32).dtype == np.int32
    assert cupy.empty((2, 3), np.float16).dtype == np.float16
    assert np.isnan(cupy.empty(3, np.float32).get()).all()  # what nobody writes shows
    assert not cupy.zeros_like(a).get().any() and cupy.full(2, 7, np.int8).get().tolist() == [7, 7]
    assert cupy.empty_like(a, np.float32).dtype == np.float32
    turned = cupy.zeros((2, 3)).T
    assert cupy.ascontiguousarray(turned).flags.c_contiguous and cupy.ascontiguousarray(a) is a
    assert cupy.empty_like(turned).strides == turned.strides
    assert cupy.array(a) is not a and cupy.asarray(a) is a
    assert cupy.is_available() and cupy.cuda.runtime.getDeviceCount() == 1


class Producer:
    """Another library's array on the device."""

    def __init__(self, array, kind=2, old=False):
        self.array, self.kind, self.old, self.streams = array, kind, old, []

    def __dlpack_device__(self):
        return self.kind, 0

    def __dlpack__(self, *, stream=None, **newer):
        self.streams.append(stream)
        if newer and self.old:
            raise TypeError("unexpected keyword argument")
        return self.array.__dlpack__(**newer)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dlpack(dtype, old):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    a = cupy.asarray(np.arange(6).reshape(2, 3).astype(dtype))
    producer = Producer(a, old=old)
    same = cupy.from_dlpack(producer)
    assert (same.data.ptr, same.shape, same.dtype) == (a.data.ptr, a.shape, a.dtype)
    same[0, 0] = 7
    assert float(a[0, 0]) == 7
    with cupy.cuda.ExternalStream(0x77):
        cupy.from_dlpack(producer)
    assert dict.fromkeys(producer.streams) == dict.fromkeys([1, 0x77])  # 1 is the default stream
    assert a.__dlpack_device__() == (2, 0)
    with pytest.raises(TypeError, match="CPU arrays cannot be directly imported to CuPy"):
        cupy.from_dlpack(Producer(a, kind=1))
    with pytest.raises(TypeError, match="Unsupported array type: 3"):
        cupy.from_dlpack(Producer(a, kind=3))


def test_foreign_memory_is_an_argument():
    host = np.arange(128, dtype=np.float32)
    x, y = cupy.from_dlpack(Producer(cupy.asarray(host))), cupy.empty(128, np.float32)
    with device.settings(check=True):
        function("reverse")((1,), (128,), (x, y))
    np.testing.assert_array_equal(y.get(), host[::-1])


def test_streams_and_devices():
    assert cupy.cuda.get_current_stream().ptr == 0
    with cupy.cuda.Stream() as own, cupy.cuda.Device(0):
        assert cupy.cuda.get_current_stream() is own and own.ptr != 0
        with cupy.cuda.ExternalStream(0x55, 0) as other:
            assert cupy.cuda.get_current_stream().ptr == 0x55
            other.wait_event(own.record())
    assert cupy.cuda.get_current_stream().ptr == 0
    with device.settings(capability="80", processors=3):
        here = cupy.cuda.Device()
        assert (here.id, here.compute_capability, here.attributes["MultiProcessorCount"]) == (0, "80", 3)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        cupy.cuda.Device(1)
    with device.settings(devices=2):
        with cupy.cuda.Device(1):
            far = arguments()
        with pytest.raises(ValueError, match="on another device"):
            function("takes")((1,), (32,), far)


# ---- allocators and captures
@pytest.fixture
def fresh(monkeypatch):
    """No capture under way after a test that failed, and a stream whose arena is empty."""
    monkeypatch.setattr(streams, "_captures", {})
    with cupy.cuda.Stream() as stream:
        yield stream


def test_the_pool_keeps_memory_for_its_stream(fresh):
    cupy.empty(1000, np.uint8)
    fresh.begin_capture(streams.GLOBAL)
    first = cupy.empty(1024, np.uint8)  # pieces are of 512 bytes
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureUnsupported: cudaMalloc"):
        cupy.empty(1, np.uint8)
    del first
    cupy.zeros(3)
    with cupy.cuda.Stream(), pytest.raises(RuntimeError, match="cudaMalloc"):  # in any thread, on any stream
        cupy.empty(1, np.uint8)
    fresh.end_capture()
    with cupy.cuda.Stream():
        cupy.empty(1, np.uint8)


def test_what_only_a_relaxed_capture_permits(fresh):
    before = fresh.record()
    fresh.begin_capture()
    assert fresh.is_capturing() and not cupy.cuda.Stream.null.is_capturing()
    cupy.empty(1, np.uint8)
    assert before.done
    inside = fresh.record()
    with pytest.raises(RuntimeError, match="cudaErrorStreamCaptureIsolation"):
        fresh.wait_event(before)
    fresh.wait_event(inside)
    fresh.end_capture()
    with pytest.raises(RuntimeError, match="cudaErrorCapturedEvent"):
        inside.done  # noqa: B018
    fresh.begin_capture(streams.GLOBAL)
    with pytest.raises(RuntimeError, match="cudaEventQuery is not permitted"):
        before.done  # noqa: B018
    with pytest.raises(RuntimeError, match="default"):
        cupy.cuda.Stream.null.begin_capture()


def test_a_graph_needs_the_memory_of_its_kernels(fresh):
    x, y = cupy.ones(128, np.float32), cupy.zeros(128, np.float32)
    for kept in (True, False):
        fresh.begin_capture()
        temporary = cupy.empty(128, np.float32)
        function("reverse")((1,), (128,), (x, temporary))
        function("reverse")((1,), (128,), (temporary, y))
        graph = fresh.end_capture()
        graph.launch()
        if kept:
            continue
        place = temporary.data.ptr, temporary.nbytes
        del temporary
        with pytest.raises(RuntimeError, match="memory that was given back: argument 1 of reverse"):
            graph.launch()
        with pytest.raises(RuntimeError, match="given back"):
            graph.launch(kept=[(place[0], place[1] - 1)])
        graph.launch(kept=[place])


def test_exported_memory_is_alive(fresh):
    """Also without the array, as long as whoever imported it has it."""
    a = cupy.ones(128, np.float32)
    fresh.begin_capture(streams.GLOBAL)
    imported = dlpack.to_host(a, 1)
    del a
    with pytest.raises(RuntimeError, match="cudaMalloc"):
        cupy.empty(128, np.float32)
    assert (imported == 1).all()
    del imported
    cupy.empty(128, np.float32)


def test_allocators_of_functions():
    taken, given_back = {}, []

    def malloc(size, number):
        memory = np.zeros(size, np.uint8)
        taken[memory.ctypes.data] = memory, number
        return memory.ctypes.data

    allocator = cupy.cuda.PythonFunctionAllocator(malloc, lambda *place: given_back.append(place))
    with cupy.cuda.using_allocator(allocator.malloc):
        a = cupy.empty(8, np.float32)
        b, nothing = a + 1, cupy.empty(0)
        with cupy.cuda.using_allocator(cupy.cuda.PythonFunctionAllocator(None, None).malloc):
            pass
        assert np.isnan(a._host).all() and nothing.size == 0
    places = [a.data.ptr, b.data.ptr]
    assert list(taken) == places and cupy.empty(1).data.ptr not in taken
    function("reverse")((1,), (128,), (cupy.ones(128, np.float32), cupy.empty(128, np.float32)))
    del a, b
    assert given_back == [(place, 0) for place in places]
    with device.settings(check=True), cupy.cuda.using_allocator(allocator.malloc):
        x, y = cupy.ones(128, np.float32), cupy.empty(127, np.float32)
        with pytest.raises(device.EmulationError, match="out of bounds"):
            function("reverse")((1,), (128,), (x, y))


def test_settings_end_with_their_context():
    with pytest.raises(ZeroDivisionError), device.settings(check=True, schedule=9, capability="75"):
        assert cupy.cuda.Device().compute_capability == "75"
        raise ZeroDivisionError
    assert cupy.cuda.Device().compute_capability == "90"
    with pytest.raises(TypeError, match="no such setting: chek"), device.settings(chek=True):
        pass


def test_install_makes_import_find_it():
    script = (
        "import sys; from tests.cuda_emulation import device; device.install()\n"
        "import cupy, importlib.util, cupy.cuda; from cupy.cuda import runtime\n"
        "assert cupy is device.cupy and importlib.util.find_spec('cupy') is not None\n"
        "assert runtime.getDeviceProperties(0)['name'] and cupy.cuda.compiler.CompileException\n"
        "device.uninstall(); assert 'cupy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
