"""Every operator on dask arrays: what comes out is what the operator gives for NumPy's."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck, tiling
from pydeform._operators import operators
from tests.conftest import assert_close, assert_same_bits
from tests.test_house import SNIPPET
from tests.test_tiling import DCN, dcn_problem, moved, problem_of

dask = pytest.importorskip("dask")
distributed = pytest.importorskip("distributed")
da = pytest.importorskip("dask.array")
bridge = pytest.importorskip("pydeform.dask")

ROOT = Path(__file__).parents[1]
TABLE = operators()


@pytest.fixture(autouse=True)
def one_task_at_a_time():
    with dask.config.set(scheduler="synchronous"):
        yield


def divided(operator, arrays):
    """One image or box in each chunk, and two queries; of what all need, one chunk."""
    sizes = {"batch": 1, "query": 2}
    chunks = {
        key: tuple(sizes[label] for label in bridge._apart(operator, key)) for key, a in arrays.items() if a is not None
    }
    return {
        key: None if a is None else da.from_array(a, (*chunks[key], *a.shape[len(chunks[key]) :]))
        for key, a in arrays.items()
    }


def assert_same_gradients(grads, want, dtype="float64"):
    assert type(grads) is type(want)
    for key, got in dask.compute(grads)[0]._asdict().items():
        lazy, grad = getattr(grads, key), getattr(want, key)
        if grad is None:
            assert got is None
        else:
            assert isinstance(lazy, da.Array) and (lazy.shape, lazy.dtype) == (grad.shape, grad.dtype), key
            assert_close(got, grad.astype(np.float64), dtype, key)


def test_every_operator_is_there():
    """One that is added to the table has its tests, which take their names from it, and nothing to write here."""
    assert bridge.__all__ == [name for key in _selfcheck.operators() for name in (key, f"{key}_backward")]
    for name in bridge.__all__:
        assert getattr(bridge, name).__name__ == name and name in getattr(bridge, name).__doc__


@pytest.mark.parametrize("name", TABLE)
def test_chunks_equal_the_whole(name):
    operator, problem = TABLE[name], _selfcheck.problem(name)
    lazy = divided(operator, {"grad_output": problem.grad_output, **problem.arrays})
    grad_output = lazy.pop("grad_output")
    y = getattr(bridge, name)(**lazy, **problem.options)
    assert isinstance(y, da.Array) and y.chunks[0] == (1,) * len(problem.grad_output)
    assert_same_bits(y.compute(), operator.forward(**problem.arrays, **problem.options))
    grads = getattr(bridge, f"{name}_backward")(grad_output, **lazy, **problem.options)
    assert_same_gradients(grads, operator.backward(problem.grad_output, **problem.arrays, **problem.options))


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtypes(name, dtype):
    """What is added up is rounded to the dtype once for each of two chunks and once more."""
    operator, problem = TABLE[name], _selfcheck.problem(name)
    kind = _selfcheck.DTYPES[dtype]
    arrays = {key: array.astype(kind) for key, array in problem.arrays.items()}
    lazy = divided(operator, arrays)
    y = getattr(bridge, name)(**lazy, **problem.options)
    assert y.dtype == kind
    assert_same_bits(y.compute(), operator.forward(**arrays, **problem.options))
    grad_output = problem.grad_output.astype(kind)
    grads = getattr(bridge, f"{name}_backward")(da.from_array(grad_output, chunks=-1), **lazy, **problem.options)
    want = operator.backward(grad_output, **arrays, **problem.options)
    for key, got in dask.compute(grads)[0]._asdict().items():
        grad = getattr(want, key)
        assert (got is None) == (grad is None)
        if grad is not None:
            assert got.dtype == getattr(grads, key).dtype == grad.dtype
            error = np.abs(got.astype(np.float64) - grad.astype(np.float64)).max()
            assert error <= 3 * float(ml_dtypes.finfo(kind).eps) * np.abs(grad.astype(np.float64)).max(), key


@pytest.mark.parametrize("name", sorted(tiling.TILED))
def test_images_in_parts(name):
    operator, problem = TABLE[name], _selfcheck.problem(name)
    axes = problem.grad_output.ndim - 2

    def parts(key, array):
        if key in operator.shared:
            return array
        return da.from_array(array, operator.with_image((1, *(-1,) * (axes + 1)), (3 if key == "input" else 2,) * axes))

    lazy = {key: parts(key, array) for key, array in problem.arrays.items()}
    y = getattr(bridge, name)(**lazy, **problem.options, **moved(name))
    assert all(len(sizes) > 1 for sizes, n in zip(*map(operator.of_image, (y.chunks, y.shape)), strict=True) if n > 3)
    assert_close(y.compute(), operator.forward(**problem.arrays, **problem.options), "float64")
    grad_output = parts("grad_output", problem.grad_output)
    grads = getattr(bridge, f"{name}_backward")(grad_output, **lazy, **problem.options, **moved(name))
    assert operator.of_image(grads.input.chunks) == operator.of_image(lazy["input"].chunks)
    assert_same_gradients(grads, operator.backward(problem.grad_output, **problem.arrays, **problem.options))


def spread(given, chunks=(1, -1, 16, 16)):
    """`problem_of` with images in parts."""
    return {
        key: a if key in ("weight", "padding", "stride") else da.from_array(a, chunks[: a.ndim])
        for key, a in given.items()
    }


@pytest.mark.parametrize("name", DCN)
@pytest.mark.parametrize("scale, stride", [(1, (1, 1)), (1.7, (2, 1))])
def test_dcn_of_images_in_parts(name, scale, stride):
    """Borders of all kinds; a gradient of the input is put together from parts that lie over each other."""
    arrays, options = dcn_problem(name, 2, scale=scale, stride=stride, padding=((2, 0), (0, 1)), remove_center=True)
    lazy = {key: da.from_array(a, (1, 16, 13, -1) if key == "input" else (1, 8, 16, -1)) for key, a in arrays.items()}
    y = getattr(bridge, name)(**lazy, **options, max_offset=2)
    assert y.chunks[1:] == (*lazy["offset" if name == "dcnv3" else "offset_mask"].chunks[1:3], (4,))
    assert_close(y.compute(), getattr(pydeform, name)(**arrays, **options), "float64")
    backward = f"{name}_backward"
    grads = getattr(bridge, backward)(da.ones_like(y), **lazy, **options, max_offset=2)
    assert grads.input.chunks == lazy["input"].chunks
    assert_same_gradients(grads, getattr(pydeform, backward)(np.ones(y.shape), **arrays, **options))


@pytest.mark.parametrize("name", DCN)
def test_dcn_follows_the_chunks_of_its_input_and_needs_a_bound(name):
    arrays, options = dcn_problem(name, 2)
    lazy = {**arrays, "input": da.from_array(arrays["input"], (1, 16, 16, 2))}
    y = getattr(bridge, name)(**lazy, **options, max_offset=2)
    assert y.chunks == ((1, 1), (16, 16, 8), (16, 14), (4,))
    assert_close(y.compute(), getattr(pydeform, name)(**arrays, **options), "float64")
    message = rf"{name}: input must have one chunk along the axes .* chunks \(\(16, 16, 8\), \(16, 14\)\)"
    with pytest.raises(ValueError, match=message):
        getattr(bridge, name)(**lazy, **options)


def test_a_longer_offset_of_dcn_is_an_error_of_its_task():
    arrays, options = dcn_problem("dcnv4", 2, scale=-0.5)
    arrays["offset_mask"][1, 33, 12, 32] = 5
    lazy = {key: da.from_array(a, (1, 16, 16, -1)) for key, a in arrays.items()}
    y = bridge.dcnv4(**lazy, **options, max_offset=2)
    y[0].compute()
    message = r"dcnv4: offset_mask must be at most max_offset = 2 pixels, got 2\.5 in the block \[32:40, 0:16\] of the"
    with pytest.raises(ValueError, match=message):
        y.compute()


def test_a_plain_convolution_needs_no_bound_and_follows_the_chunks_of_its_input():
    given = {key: a for key, a in problem_of().items() if key in ("input", "weight")}
    for stride in (1, 3):
        lazy = spread({**given, "stride": stride})
        y = bridge.conv2d(**lazy)
        assert y.numblocks[2:] == (3, 2)
        assert_close(y.compute(), pydeform.conv2d(**given, stride=stride), "float64")
        grads = bridge.conv2d_backward(da.ones_like(y), **lazy)
        assert_same_gradients(grads, pydeform.conv2d_backward(np.ones(y.shape), **given, stride=stride))


def test_pixels_that_no_tap_reaches_have_gradient_0():
    input, weight = da.ones((2, 1, 40, 9), chunks=(1, 1, 4, 9)), np.ones((1, 1, 1, 1))
    y = bridge.conv2d(input, weight, stride=30)
    grad = bridge.conv2d_backward(da.ones_like(y), input, weight, stride=30).input.compute()
    assert_same_bits(grad, pydeform.conv2d_backward(np.ones(y.shape), input.compute(), weight, stride=30).input)
    assert grad.sum() == y.size


def test_arrays_of_numpy_are_taken_too():
    given = problem_of()
    lazy = {**given, "offset": da.from_array(given["offset"], (1, -1, 40, 30))}
    y = bridge.deform_conv2d(**lazy)
    assert y.chunks[0] == (1, 1)
    assert_close(y.compute(), pydeform.deform_conv2d(**given), "float64")
    one = bridge.deform_conv2d(**given, max_offset=2)
    assert one.numblocks == (1, 1, 1, 1)
    assert_close(one.compute(), pydeform.deform_conv2d(**given), "float64")


def test_chunks_of_channels_and_of_weights_do_not_matter():
    given = problem_of()
    lazy = {key: a if key == "padding" else da.from_array(a, (1, 2, *a.shape[2:])) for key, a in given.items()}
    grads = bridge.deform_conv2d_backward(np.ones((2, 4, 40, 30)), **lazy)
    assert_same_gradients(grads, pydeform.deform_conv2d_backward(np.ones((2, 4, 40, 30)), **given))


def test_empty_chunks_do_not_matter():
    given = problem_of()
    lazy = spread(given)
    for key in ("input", "offset"):
        lazy[key] = lazy[key].rechunk((2, -1, (20, 0, 20), (0, 30)))
    assert_close(bridge.deform_conv2d(**lazy, max_offset=2).compute(), pydeform.deform_conv2d(**given), "float64")
    grads = bridge.deform_conv2d_backward(np.ones((2, 4, 40, 30)), **lazy, max_offset=2)
    assert_same_gradients(grads, pydeform.deform_conv2d_backward(np.ones((2, 4, 40, 30)), **given))


def test_only_what_is_needed():
    given = problem_of()
    grad_output = np.ones((2, 4, 40, 30))
    grads = bridge.deform_conv2d_backward(grad_output, **spread(given), max_offset=2, needs=("weight",))
    assert [key for key, grad in grads._asdict().items() if grad is not None] == ["weight"]
    want = pydeform.deform_conv2d_backward(grad_output, **given)
    assert_close(grads.weight.compute(), want.weight, "float64")
    boxes = _selfcheck.problem("roi_align")
    lazy = divided(TABLE["roi_align"], boxes.arrays)
    of_boxes = bridge.roi_align_backward(boxes.grad_output, **lazy, **boxes.options, needs=("boxes",))
    want = pydeform.roi_align_backward(boxes.grad_output, **boxes.arrays, **boxes.options, needs=("boxes",))
    assert_same_gradients(of_boxes, want)


@pytest.mark.parametrize("name", TABLE)
def test_nothing_at_all(name):
    """No image, no box."""
    operator, problem = TABLE[name], _selfcheck.problem(name)
    arrays = {key: a if key in operator.shared else a[:0] for key, a in problem.arrays.items()}
    options = operator.for_batch(problem.options, 0)
    lazy = {key: da.from_array(a, chunks=-1) for key, a in arrays.items()}
    y = getattr(bridge, name)(**lazy, **options)
    assert y.compute().shape == y.shape == (0, *problem.grad_output.shape[1:])
    grads = getattr(bridge, f"{name}_backward")(y, **lazy, **options)
    for key, grad in dask.compute(grads)[0]._asdict().items():
        if grad is not None:
            assert grad.shape == arrays[key].shape and not grad.any()


def backward_bits(**more):
    given = problem_of(dtype=np.float32)
    grad_output = np.random.default_rng(2).standard_normal((2, 4, 40, 30), np.float32)
    grads = bridge.deform_conv2d_backward(grad_output, **spread(given), max_offset=2)
    with dask.config.set(**more):
        return b"".join(grad.tobytes() for grad in dask.compute(grads)[0] if grad is not None)


def test_the_same_bits_in_any_order(monkeypatch):
    """Many threads, and orders that nobody would take. 2 x 3 x 2 tasks are added up."""
    want = backward_bits(scheduler="synchronous")
    assert backward_bits(scheduler="threads", num_workers=4) == want
    orders = []
    for seed in range(3):

        def shuffled(graph, seed=seed, **_):
            rng = np.random.default_rng(seed)
            orders.append(seed)
            return dict(zip(graph, rng.permutation(len(graph)).tolist(), strict=True))

        monkeypatch.setattr("dask.local.order", shuffled)
        assert backward_bits(scheduler="threads", num_workers=3) == want
    assert orders == [0, 1, 2]


def test_two_threads_build_and_compute_at_once():
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda _: backward_bits(scheduler="threads", num_workers=2), range(2))
    assert one == two


def never(block):
    raise AssertionError("a block was computed")


def test_a_call_computes_nothing():
    given = spread(problem_of())
    lazy = {key: a.map_blocks(never, meta=a._meta) if isinstance(a, da.Array) else a for key, a in given.items()}
    y = bridge.deform_conv2d(**lazy, max_offset=2)
    bridge.deform_conv2d_backward(y, **lazy, max_offset=2)
    with pytest.raises(AssertionError, match="a block was computed"):
        y.compute()


def test_a_task_reads_what_it_needs(monkeypatch):
    """16 x 16 results of 3 x 3 taps that move by 2 read 18 + 2 + 3 pixels along an axis."""
    sizes = []
    forward_of_tile = tiling.forward_of_tile

    def recorded(operator, arrays, options, tile):
        sizes.append({key: a.shape[2:] for key, a in arrays.items() if a is not None})
        return forward_of_tile(operator, arrays, options, tile)

    monkeypatch.setattr(tiling, "forward_of_tile", recorded)
    bridge.deform_conv2d(**spread(problem_of(size=(80, 80))), max_offset=2).compute()
    assert len(sizes) == 2 * 5 * 5
    assert max(s["input"] for s in sizes) == (23, 23)
    assert {s["offset"] for s in sizes} == {(16, 16)}


@pytest.mark.parametrize("function", ["deform_conv2d", "deform_conv2d_backward"])
@pytest.mark.parametrize("chunk", [16, -1], ids=["parts", "whole"])
def test_a_longer_offset_is_an_error_that_names_its_block(function, chunk):
    given = problem_of()
    given["offset"][1, 7, 33, 12] = -2.5
    grad_output = [np.ones((2, 4, 40, 30))] if "backward" in function else []
    result = getattr(bridge, function)(*grad_output, **spread(given, (1, -1, chunk, chunk)), max_offset=2)
    block = "32:40, 0:16" if chunk == 16 else "0:40, 0:30"
    message = (
        rf"{function}: offset must be at most max_offset = 2 pixels, got 2\.5 in the block \[{block}\] of the result"
    )
    with pytest.raises(ValueError, match=message):
        dask.compute(result)


def of_unknown_size():
    a = da.ones((2, 3, 40, 30), chunks=(1, 3, 40, 30))
    return a[da.ones(2, chunks=1) > 0]


@pytest.mark.parametrize(
    "change, kind, message",
    [
        (
            {"max_offset": None},
            ValueError,
            "input must have one chunk along the axes of an image where max_offset is not",
        ),
        ({"max_offset": -1}, ValueError, "max_offset must be a number >= 0, got -1"),
        ({"input": [[1.0]]}, TypeError, "input must be a dask or NumPy array, got builtins.list"),
        ({"input": None}, TypeError, "input must be an array, got None"),
        ({"input": of_unknown_size()}, ValueError, r"input must have a known shape, got \(nan, 3, 40, 30\)"),
        ({"mask": da.ones((3, 9, 40, 30))}, ValueError, "mask must have the first axis of offset, 2, got"),
        ({"offset": da.ones((2, 17, 40, 30))}, ValueError, r"offset must have shape .*17, 40, 30\)"),
        ({"weight": da.ones((4, 2, 3, 3))}, ValueError, "weight must have shape"),
        ({"weight": da.ones((4, 3, 3, 3), dtype="f")}, TypeError, "weight must have the dtype of input, float64"),
        ({"offset": da.ones((2, 18, 40, 30), dtype=int)}, TypeError, "offset must have the dtype of input, float64"),
        ({"boundary": "none"}, ValueError, "boundary must be one of"),
    ],
    ids=str,
)
def test_errors_when_called(change, kind, message):
    given = {**spread(problem_of()), "max_offset": 2, **change}
    with pytest.raises(kind, match=f"deform_conv2d: {message}"):
        bridge.deform_conv2d(**given)
    with pytest.raises(kind, match=f"deform_conv2d_backward: {message}"):
        bridge.deform_conv2d_backward(np.ones((2, 4, 40, 30)), **given)


def test_errors_of_other_calls():
    with pytest.raises(TypeError, match="max_offset"):
        bridge.conv2d(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)), max_offset=1)
    with pytest.raises(ValueError, match="deform_conv2d_backward: grad_output must have shape"):
        bridge.deform_conv2d_backward(np.ones((2, 4, 40, 31)), **spread(problem_of()), max_offset=2)
    with pytest.raises(ValueError, match="'nothing'"):
        bridge.deform_conv2d_backward(np.ones((2, 4, 40, 30)), **problem_of(), needs=("nothing",))
    with pytest.raises(ValueError, match="affine_grid: theta must have the first axis of size, 3, got"):
        bridge.affine_grid(da.ones((2, 2, 3)), (3, 1, 4, 4))


@pytest.fixture(scope="module")
def client():
    """Of a cluster of two processes, for all tests here, in an environment that says nothing of threads."""
    with pytest.MonkeyPatch.context() as environment:
        for name in ("NUMBA", "OMP", "MKL", "OPENBLAS"):
            environment.delenv(f"{name}_NUM_THREADS", raising=False)
        cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
        with cluster, distributed.Client(cluster) as client:
            yield client


def threads():
    import threadpoolctl

    import pydeform

    return pydeform.get_num_threads(), *(lib["num_threads"] for lib in threadpoolctl.threadpool_info())


def test_workers_do_not_fight_for_threads(client):
    """The nanny's environment says one thread for each task: ours, and BLAS's."""
    found = client.run(threads)
    assert len(found) == 2 and {n for numbers in found.values() for n in numbers} == {1}


def test_a_cluster_gives_the_same_bits(client):
    with dask.config.set(scheduler=client):
        assert backward_bits(scheduler=client) == backward_bits(scheduler="synchronous")


def slowly(block):
    time.sleep(0.2)
    return block


def test_a_worker_is_killed_and_nothing_is_lost(client):
    given = problem_of(size=(48, 48))
    lazy = spread(given)
    lazy["input"] = lazy["input"].map_blocks(slowly, meta=lazy["input"]._meta)
    grad_output = da.ones((2, 4, 48, 48), chunks=(1, 4, 16, 16))
    grads = bridge.deform_conv2d_backward(grad_output, **lazy, max_offset=2)
    want = dask.compute(bridge.deform_conv2d_backward(grad_output, **spread(given), max_offset=2))[0]
    pids = client.run(os.getpid)
    futures = client.compute([grad for grad in grads if grad is not None])
    while not any(client.who_has().values()):  # some results are there already, to be lost
        time.sleep(0.01)
    holder = next(workers[0] for workers in client.who_has().values() if workers)
    assert any(future.status == "pending" for future in futures)
    os.kill(pids[holder], signal.SIGKILL)
    got = client.gather(futures)
    client.wait_for_workers(2)
    assert pids[holder] not in client.run(os.getpid).values()
    for grad, expected in zip(got, [grad for grad in want if grad is not None], strict=True):
        assert_same_bits(grad, expected)
    assert set(client.run(pydeform.get_num_threads).values()) == {1}  # also in the process that took its place


def test_the_page_runs(tmp_path):
    """It trains on a cluster of its own, and compares its losses with those of one process."""
    (block,) = SNIPPET.findall((ROOT / "docs/bridges/dask.md").read_text(encoding="utf-8"))
    script = tmp_path / "page.py"
    script.write_text(block, encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1e-6" in block and done.stdout.startswith("loss")
