"""Every layer, loss and optimiser with every kind of array and every dtype: it trains, or refuses by name."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pydeform import layers, losses, optim
from pydeform.layers import (
    ActiveConv2d,
    BatchNorm2d,
    Conv1d,
    Conv2d,
    Conv3d,
    DCNv3,
    DCNv4,
    DeformConv1d,
    DeformConv2d,
    DeformConv3d,
    DeformPSRoIPool,
    DeformRoIPool,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    MSDeformAttn,
    ReLU,
    RoIAlign,
    Sequential,
    Sigmoid,
    Softmax,
    SpatialTransformer,
)

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
# Well inside the image: the loss of deform_psroi_pool jumps where a point leaves it.
BOXES = np.array([[0, 2.125, 1.875, 7.25, 6.125], [1, 1.75, 2.25, 6.875, 5.75]])
IMAGE = (2, 3, 9, 10)


def network(dtype):
    rng = np.random.default_rng(0)
    inner = Linear(4, 4, rng=rng, dtype=dtype)
    return Sequential(
        Conv2d(3, 4, 3, 2, 1, rng=rng, dtype=dtype),
        BatchNorm2d(4, dtype=dtype),
        ReLU(),
        GlobalAvgPool2d(),
        inner,
        Sequential(inner, Sigmoid()),
    )


def transformer(dtype):
    localisation = Sequential(Conv2d(3, 2, 3, rng=0, dtype=dtype), GlobalAvgPool2d())
    return SpatialTransformer(localisation, padding_mode="border", dtype=dtype)


# Every public layer: how it is made, and the shapes of its float inputs.
LAYERS = {
    "Conv2d": (lambda dtype: Conv2d(3, 4, 3, padding=1, rng=0, dtype=dtype), [IMAGE]),
    "DeformConv2d": (lambda dtype: DeformConv2d(3, 4, 3, padding=1, modulated=True, rng=0, dtype=dtype), [IMAGE]),
    "Conv1d": (lambda dtype: Conv1d(3, 4, 3, padding=1, rng=0, dtype=dtype), [(2, 3, 10)]),
    "Conv3d": (lambda dtype: Conv3d(3, 4, 2, padding=1, rng=0, dtype=dtype), [(2, 3, 2, 3, 4)]),
    "DeformConv1d": (lambda dtype: DeformConv1d(3, 4, 3, padding=1, modulated=True, rng=0, dtype=dtype), [(2, 3, 10)]),
    "DeformConv3d": (lambda dtype: DeformConv3d(3, 4, 2, modulated=True, rng=0, dtype=dtype), [(2, 3, 2, 3, 4)]),
    "ActiveConv2d": (lambda dtype: ActiveConv2d(3, 4, 3, padding=1, rng=0, dtype=dtype), [IMAGE]),
    "Linear": (lambda dtype: Linear(5, 3, rng=0, dtype=dtype), [(4, 5)]),
    "BatchNorm2d": (lambda dtype: BatchNorm2d(3, dtype=dtype), [IMAGE]),
    "Sequential": (network, [IMAGE]),
    "ReLU": (lambda dtype: ReLU(), [(4, 5)]),
    "Sigmoid": (lambda dtype: Sigmoid(), [(4, 5)]),
    "Softmax": (lambda dtype: Softmax(), [(4, 5)]),
    "GlobalAvgPool2d": (lambda dtype: GlobalAvgPool2d(), [IMAGE]),
    "MaxPool2d": (lambda dtype: MaxPool2d(3, 2, 1), [IMAGE]),
    "Flatten": (lambda dtype: Flatten(), [IMAGE]),
    "RoIAlign": (lambda dtype: RoIAlign(2, sampling_ratio=2), [IMAGE]),
    "DeformRoIPool": (lambda dtype: DeformRoIPool(2, 3, hidden=6, modulated=True, rng=0, dtype=dtype), [IMAGE]),
    "DeformPSRoIPool": (
        lambda dtype: DeformPSRoIPool(3, 2, feature_channels=2, modulated=True, dtype=dtype),
        [IMAGE, (2, 2, 9, 10)],
    ),
    "DCNv3": (lambda dtype: DCNv3(4, groups=2, rng=0, dtype=dtype), [(2, 5, 6, 4)]),
    "DCNv4": (lambda dtype: DCNv4(4, groups=2, dw_kernel_size=3, rng=0, dtype=dtype), [(2, 5, 6, 4)]),
    "MSDeformAttn": (lambda dtype: MSDeformAttn(4, 2, 2, 2, rng=0, dtype=dtype), [(2, 3, 4), (2, 3, 1, 2), (2, 16, 4)]),
    "SpatialTransformer": (transformer, [IMAGE]),
}
LEVELS = (4, 3), (2, 2)  # of MSDeformAttn


def test_every_layer_is_in_the_table():
    public = {name for name in layers.__all__ if isinstance(getattr(layers, name), type)}
    assert public - {"Layer"} == set(LAYERS)


def normal(shape, dtype=np.float64, seed=1):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def arguments(name, dtype, convert=lambda a: a):
    """x, then boxes and features where the layer takes them; or those of attention."""
    x, *rest = (convert(normal(shape, dtype, seed)) for seed, shape in enumerate(LAYERS[name][1], 1))
    if name == "MSDeformAttn":
        return x, *rest, LEVELS
    return (x, convert(BOXES.astype(dtype)), *rest) if "RoI" in name else (x,)


def skip_without_kernels(backend, name):
    if not backend.on_cpu and name in ("DCNv3", "DCNv4", "MSDeformAttn") and not find_spec("pydeform.cuda.gather"):
        pytest.skip("not on CUDA yet")


def names_of(name):
    """What errors call the arrays among the arguments."""
    return ("query", "reference_points", "input") if name == "MSDeformAttn" else ("x", "boxes", "features")


def made(name, dtype):
    """With no parameter zero: else the branches of offsets have no slope but in their last layer."""
    layer = LAYERS[name][0](dtype)
    for seed, param in enumerate(layer.params.values()):
        if not param.any():
            param[...] = 0.2 * normal(param.shape, seed=seed)
    return layer


def squared_error(backend, y, target):
    """Mean of squares / 2 in float64, and its gradient in the dtype of y."""
    difference = backend.numpy(y).astype(np.float64) - target
    return (difference**2).mean() / 2, backend.array((difference / difference.size).astype(y.dtype))


def descend(backend, layer, inputs, steps=12):
    """Train the parameters, or where there are none the input. Returns the losses."""
    optimiser = optim.AdamW(layer, 0.02, weight_decay=0) if layer.params else None
    found = []
    target = None
    for _ in range(steps):
        y, backprop = layer(*inputs)
        target = normal(tuple(y.shape), seed=7) if target is None else target
        loss, grad_y = squared_error(backend, y, target)
        found.append(loss)
        layer.zero_grads()
        grads = backprop(grad_y)
        grad_x = grads[0] if isinstance(grads, tuple) else grads
        assert (type(grad_x), grad_x.dtype, grad_x.shape) == (type(inputs[0]), y.dtype, inputs[0].shape)
        assert type(y) is type(inputs[0]) and y.dtype == inputs[0].dtype
        if optimiser:
            optimiser.step()
        else:
            moved = backend.numpy(inputs[0]).astype(np.float64) - 2 * backend.numpy(grad_x).astype(np.float64)
            inputs = (backend.array(moved.astype(y.dtype)), *inputs[1:])
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_trains(backend, name, dtype):
    skip_without_kernels(backend, name)
    layer = made(name, DTYPES[dtype])
    before = {key: param.copy() for key, param in layer.params.items()}
    if not backend.on_cpu:
        assert layer.to("cuda") is layer
    found = descend(backend, layer, arguments(name, DTYPES[dtype], backend.array))
    assert np.isfinite(found).all() and found[-1] < 0.99 * found[0], found
    if not backend.on_cpu:
        layer.to("cpu")
    for key, param in layer.params.items():
        assert (param.dtype, layer.grads[key].dtype) == (DTYPES[dtype], DTYPES[dtype])
        assert (param != before[key]).any(), f"{key} was not trained"
        assert layer.grads[key].any(), f"{key} has no gradient"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_device_trains_as_the_cpu_does(backend, dtype):
    """The same numbers up to rounding, also of running statistics, which are float32 at least."""
    trained = {}
    for device in ("cpu", "cpu" if backend.on_cpu else "cuda"):
        layer = made("Sequential", DTYPES[dtype]).to(device)
        convert = backend.array if device == "cuda" else lambda a: a
        optimiser = optim.SGD(layer, 0.1, momentum=0.9, weight_decay=0.01, clip=0.05)
        for step in range(3):
            y, backprop = layer(convert(normal(IMAGE, DTYPES[dtype], step)))
            _, grad = losses.softmax_cross_entropy(y, convert(np.array([1, 3])))
            layer.zero_grads()
            backprop(grad)
            optimiser.step()
        assert layer.to("cpu") is layer
        trained[device] = {**layer.params, **layer.state}
    for key, got in trained[device].items():
        tolerance = {"float64": 1e-10, "float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}[dtype]
        np.testing.assert_allclose(got.astype(float), trained["cpu"][key].astype(float), 0, tolerance, err_msg=key)
        if "running" in key:
            assert got.dtype == (np.float64 if dtype == "float64" else np.float32)


# Kinds that are refused ----------------------------------------------------------------------------------------------
class Tensor:
    """As much of an array of some other library as is looked at."""

    __module__ = "tensorflow.python"

    def __init__(self, values):
        self.values, self.shape, self.dtype, self.ndim = values, values.shape, values.dtype, values.ndim

    def __dlpack__(self):
        raise AssertionError("nobody asked for the memory")


def torch_tensor(a):
    torch = pytest.importorskip("torch")
    return torch.tensor(a.astype(np.float64)).to(getattr(torch, a.dtype.name))


def jax_array(a):
    jax = pytest.importorskip("jax")
    return jax.numpy.asarray(a if a.dtype.itemsize < 8 else a.astype(np.float32))


KINDS = {
    "torch": (torch_tensor, r"a NumPy or CuPy array, got torch\.Tensor: pass numpy\.asarray\({name}\), or cupy\."),
    "jax": (jax_array, r"a NumPy or CuPy array, got jax\.Array: pass numpy\.asarray\({name}\), or cupy\.from_dlpack"),
    "tensorflow": (Tensor, r"a NumPy or CuPy array, got tensorflow\.python\.Tensor: pass numpy\.asarray\({name}\), or"),
    "list": (np.ndarray.tolist, r"a NumPy or CuPy array, got list: pass numpy\.asarray\({name}\)$"),
    "masked": (np.ma.array, r"a plain array, got numpy\.ma(\.core)?\.MaskedArray"),
    "None": (lambda a: None, r"a NumPy or CuPy array, got NoneType: pass"),
    "number": (lambda a: a.ravel()[0], r"a NumPy or CuPy array, got .*float"),
}


def refused(op, name, kind):
    return pytest.raises(TypeError, match=rf"^{op}: {name} must be " + KINDS[kind][1].replace("{name}", name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYERS)
def test_other_kinds_are_refused(name, kind, dtype):
    layer, convert = made(name, DTYPES[dtype]), KINDS[kind][0]
    op = "Conv2d" if name == "Sequential" else name
    given = arguments(name, DTYPES[dtype])
    for place, (array, called) in enumerate(zip(given, names_of(name), strict=False)):
        if (called, kind) != ("features", "None"):
            with refused(op, called, kind):
                layer(*given[:place], convert(array), *given[place + 1 :])
    y, backprop = layer(*given)
    before = {key: grad.copy() for key, grad in layer.grads.items()}
    with refused("Sigmoid" if name == "Sequential" else name, "grad_y", kind):
        backprop(convert(y))
    for key, grad in layer.grads.items():
        np.testing.assert_array_equal(grad, before[key])


@pytest.mark.parametrize("name", LAYERS)
def test_other_dtypes_are_refused(name):
    layer, (x, *rest) = made(name, np.float32), arguments(name, np.float32)
    op = "Conv2d" if name == "Sequential" else name
    for dtype in (np.int64, np.complex64, np.bool_, ">f4"):
        with pytest.raises(
            TypeError,
            match=rf"^{op}: {names_of(name)[0]} must have (the dtype of the parameters|dtype float64), .* got ",
        ):
            layer(np.ones(x.shape, dtype), *rest)
    y, backprop = layer(x, *rest)
    op = "Sigmoid" if name == "Sequential" else name
    with pytest.raises(TypeError, match=rf"^{op}: grad_y must have the dtype of y, float32, got float64"):
        backprop(y.astype(np.float64))


@pytest.mark.parametrize("name", LAYERS)
def test_devices_do_not_mix(backend, name):
    if backend.on_cpu:
        pytest.skip("one device only")
    skip_without_kernels(backend, name)
    layer, (x, *rest) = made(name, np.float32), arguments(name, np.float32)
    op = "Conv2d" if name == "Sequential" else name
    sent = [a if a is LEVELS else backend.array(a) for a in (x, *rest)]
    text = rf"^{op}: {names_of(name)[0]} must be a {{}} array, as the parameters, got a {{}} array: call to"
    text += r'\("{}"\) of the layer'
    if layer.params:
        with pytest.raises(TypeError, match=text.format("NumPy", "CuPy", "cuda")):
            layer(*sent)
        layer.to("cuda")
        with pytest.raises(TypeError, match=text.format("CuPy", "NumPy", "cpu")):
            layer(x, *rest)
    y, backprop = layer(*sent)
    op = "Sigmoid" if name == "Sequential" else name
    with pytest.raises(TypeError, match=rf"^{op}: grad_y must be a CuPy array, as y, got a NumPy array"):
        backprop(backend.numpy(y))


LOSSES = {
    "softmax_cross_entropy": (losses.softmax_cross_entropy, "logits", "labels", lambda dtype: np.array([1, 0, 4, 3])),
    "smooth_l1": (losses.smooth_l1, "prediction", "target", lambda dtype: normal((4, 5), dtype, 2)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_train(backend, name, dtype):
    """Descent by the gradient lowers them; on the device they have the numbers of the CPU."""
    function, _, _, second = LOSSES[name]
    x, other = normal((4, 5), DTYPES[dtype]), second(DTYPES[dtype])
    found = []
    for _ in range(5):
        loss, grad = function(backend.array(x), backend.array(other))
        assert type(loss) is float and type(grad) is type(backend.array(x))
        assert (grad.dtype, grad.shape) == (x.dtype, x.shape)
        want, want_grad = function(x.astype(np.float64), other.astype(np.float64) if name == "smooth_l1" else other)
        assert loss == pytest.approx(want, rel=1e-5)
        np.testing.assert_allclose(backend.numpy(grad).astype(float), want_grad, 2**-8, 1e-6)
        found.append(loss)
        x = (x - 4 * backend.numpy(grad).astype(np.float64)).astype(x.dtype)
    assert found == sorted(found, reverse=True) and found[-1] < 0.9 * found[0]
    empty = backend.array(x[:0]), backend.array(other[:0])
    loss, grad = function(*empty)
    assert loss == 0 and type(grad) is type(empty[0]) and (grad.shape, grad.dtype) == ((0, 5), x.dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_refuse_other_kinds(name, kind):
    function, first_name, second_name, second = LOSSES[name]
    x, other = normal((4, 5), np.float32), second(np.float32)
    convert = KINDS[kind][0]
    with refused(name, first_name, kind):
        function(convert(x), other)
    with refused(name, second_name, kind):
        function(x, convert(other))


def test_losses_do_not_mix_devices(backend):
    if backend.on_cpu:
        pytest.skip("one device only")
    for name, (function, first_name, second_name, second) in LOSSES.items():
        x, other = normal((4, 5), np.float32), second(np.float32)
        with pytest.raises(
            TypeError, match=f"{name}: {second_name} must be a CuPy array, as {first_name}, got a NumPy"
        ):
            function(backend.array(x), other)


# Parameters and gradients that are none of ours ----------------------------------------------------------------------
@pytest.mark.parametrize("optimiser", [optim.SGD, optim.AdamW])
@pytest.mark.parametrize("kind", ["torch", "jax", "tensorflow", "list"])
def test_optimisers_refuse_other_kinds(optimiser, kind):
    """`params[name] -= array` of JAX would bind a name and change nothing."""
    layer = Linear(3, 2, rng=0)
    own = layer.params["bias"]
    layer.params["bias"] = KINDS[kind][0](own)
    with refused(optimiser.__name__, "parameter bias", kind):
        optimiser(layer, lr=0.1)
    layer.params["bias"] = own
    trainer = optimiser(layer, lr=0.1)
    before = {name: param.copy() for name, param in layer.params.items()}
    layer.grads["weight"][...] = 1
    layer.grads["bias"] = KINDS[kind][0](layer.grads["bias"])
    with refused(optimiser.__name__, "gradient of bias", kind):
        trainer.step()
    layer.grads["bias"] = np.zeros(2)
    with pytest.raises(TypeError, match="gradient of bias must have the dtype of the parameter, float32, got float64"):
        trainer.step()
    layer.grads["bias"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match=r"gradient of bias must have the shape of the parameter, \(2,\), got \(3,\)"):
        trainer.step()
    for name, param in layer.params.items():
        np.testing.assert_array_equal(param, before[name])
    assert trainer.steps == 0


# Moving --------------------------------------------------------------------------------------------------------------
def test_to_replaces_arrays_wherever_they_are_held(backend):
    """A shared layer, branches of layers and Sequentials inside keep holding the very same arrays."""
    shared = Linear(4, 4, rng=0)
    roi = DeformRoIPool(2, 3, hidden=4, modulated=True, rng=0)
    whole = Sequential(BatchNorm2d(4), Sequential(shared, ReLU()), shared)
    for layer in (whole, roi):
        values = {name: array.copy() for name, array in {**layer.params, **layer.state}.items()}
        names = list(layer.params)
        here = dict(layer.params)
        assert layer.to("cpu") is layer and all(layer.params[name] is here[name] for name in names)
        if not backend.on_cpu:
            assert layer.to("cuda") is layer and list(layer.params) == names
            there = [array for held in (layer.params, layer.grads, layer.state) for array in held.values()]
            assert {type(array).__module__ for array in there} == {"cupy"}
            assert layer.to("cuda").params[names[0]] is there[0]
        if layer is whole:
            assert whole.params["1.0.weight"] is shared.params["weight"] is whole.layers[1].params["0.weight"]
            assert whole.grads["1.0.bias"] is shared.grads["bias"]
            assert whole.state["0.running_var"] is whole.layers[0].state["running_var"]
        else:
            assert roi.params["mask.2.weight"] is roi.mask.layers[2].params["weight"] is roi.mask.params["2.weight"]
        layer.to("cpu")
        for name, array in {**layer.params, **layer.state}.items():
            np.testing.assert_array_equal(array, values[name])


def test_optimisers_follow_a_layer_that_moves(backend):
    """Between two steps, to the device and back: the same parameters as without."""
    found = []
    for device in ("cpu", "cpu" if backend.on_cpu else "cuda"):
        layer = Linear(3, 2, rng=0, dtype=np.float16)
        trainer = optim.AdamW(layer, 0.01)
        for place in ("cpu", device, "cpu"):
            layer.to(place)
            for name, grad in layer.grads.items():
                grad[...] = 0.25 if name == "bias" else -1
            trainer.step()
        found.append(layer.params)
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])


def test_nothing_is_moved_where_one_array_cannot_be(backend, monkeypatch):
    if backend.on_cpu:
        pytest.skip("one device only")
    layer = Sequential(Linear(3, 2, rng=0), Linear(2, 2, rng=0))
    before = dict(layer.params)
    sent = []

    def asarray(array):
        sent.append(array)
        if len(sent) == 3:
            raise MemoryError("the device is full")
        return backend.array(array)

    monkeypatch.setattr("pydeform.cuda._arrays.to_device", asarray)
    with pytest.raises(MemoryError):
        layer.to("cuda")
    assert all(layer.params[name] is before[name] and layer.layers[int(name[0])].params[name[2:]] is before[name]
               for name in before)  # fmt: skip


MISSING = """
import sys, types
cupy = types.ModuleType("cupy")
cupy.is_available = lambda: False
sys.modules["cupy"] = {cupy}
from pydeform.layers import Linear
layer = Linear(3, 2, rng=0)
before = dict(layer.params)
try:
    layer.to("cuda")
except RuntimeError as error:
    print(error)
assert all(layer.params[name] is before[name] for name in before)
"""


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        ("None", 'Linear: to("cuda") needs CuPy, which cannot be imported: '),
        ("cupy", 'Linear: to("cuda") needs a CUDA device, and CuPy finds none'),
    ],
)
def test_a_device_that_is_not_there(cupy, message):
    done = subprocess.run(
        [sys.executable, "-c", MISSING.format(cupy=cupy)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(message), done.stderr


def test_devices_have_names():
    layer = Linear(3, 2, rng=0)
    with pytest.raises(ValueError, match=r"Linear: device must be one of 'cpu', 'cuda', got 'gpu'"):
        layer.to("gpu")
