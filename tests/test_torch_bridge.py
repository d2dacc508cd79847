"""`pydeform.torch`: the bits of the NumPy functions, their gradients, and everything PyTorch does with an operator."""

import contextlib
import importlib.util
import inspect
import pickle
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from pydeform._operators import operators
from tests.conftest import assert_same_bits

HAS_TORCH = importlib.util.find_spec("torch") is not None
pytestmark = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
if HAS_TORCH:
    import torch

    import pydeform.torch as bridge
    from pydeform.torch import _options

ROOT = Path(__file__).parents[1]
TABLE = operators()
ONE_OF_EACH_FAMILY = ("deform_conv2d", "roi_align", "ms_deform_attn", "grid_sample")


def tensor(array, dtype="float64"):
    return torch.from_numpy(np.array(array, "f8")).to(getattr(torch, dtype))


def tensors(problem, dtype="float64"):
    return {key: tensor(array, dtype) for key, array in problem.arrays.items()}


def recorded(name, arrays):
    """Leaves that require gradients, but for those that have none."""
    return {key: a.clone().requires_grad_(key not in TABLE[name].fixed) for key, a in arrays.items()}


def differentiable(name, arrays):
    """The function of the arrays that have gradients alone, and these."""
    wanted = [key for key in arrays if key not in TABLE[name].fixed]
    rest = {key: array for key, array in arrays.items() if key not in wanted}
    options = _selfcheck.problem(name).options

    def function(*given):
        return getattr(bridge, name)(**dict(zip(wanted, given, strict=True)), **rest, **options)

    return function, [arrays[key] for key in wanted]


def operator_call(name, arrays, options):
    """The arguments of `torch.ops.pydeform.name`."""
    plain = {key: _options.plain(name, key, value) for key, value in options.items()}
    return [*map(arrays.get, TABLE[name].arrays), *_options.packed(plain)]


class Calls(torch.utils._python_dispatch.TorchDispatchMode if HAS_TORCH else object):
    """The arguments of every call of our operators meanwhile."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "pydeform":
            self.calls.append(args)
        return function(*args, **(kwargs or {}))


# What there is --------------------------------------------------------------------------------------------------------
def test_it_has_exactly_the_operators():
    assert list(bridge._OPERATORS) == list(TABLE)
    assert set(TABLE) <= set(bridge.__all__)
    assert all(hasattr(torch.ops.pydeform, name + suffix) for name in TABLE for suffix in ("", "_backward"))


@pytest.mark.parametrize("name", TABLE)
def test_signature_and_documentation(name):
    function = getattr(bridge, name)
    assert inspect.signature(function) == inspect.signature(getattr(pydeform, name))
    assert function.__name__ == function.__qualname__ == name
    assert f"`pydeform.{name}`" in function.__doc__
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="torchvision is not installed")
@pytest.mark.parametrize("name", ["deform_conv2d", "roi_pool", "roi_align", "ps_roi_pool", "ps_roi_align"])
def test_arguments_are_in_the_order_of_torchvision(name):
    theirs = list(inspect.signature(getattr(importlib.import_module("torchvision.ops"), name)).parameters)
    assert list(inspect.signature(getattr(bridge, name)).parameters)[: len(theirs)] == theirs


# Numbers --------------------------------------------------------------------------------------------------------------
@pytest.fixture(params=["alone", "dispatched"])
def way(request):
    """A context for each way that a call goes: at once, and through the dispatcher, since a mode sees it."""
    return contextlib.nullcontext if request.param == "alone" else Calls


def assert_same(name, problem, dtype, way):
    """Result and gradients have the bits of the NumPy functions; no input is written to, no result shares memory."""
    operator, arrays = TABLE[name], {k: a.astype(_selfcheck.DTYPES[dtype]) for k, a in problem.arrays.items()}
    leaves = recorded(name, tensors(problem, dtype))
    before = {key: leaf.detach().clone() for key, leaf in leaves.items()}
    with way() as seen:
        output = getattr(bridge, name)(**leaves, **problem.options)
        output.backward(tensor(problem.grad_output, dtype))
    assert seen is None or len(seen.calls) == 2

    def as_tensor(array):
        return pydeform._interop.to_native("op", {"a": torch.empty(0, dtype=output.dtype)})[1](array)

    def assert_bits(got, want):
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        integers = torch.int16 if got.element_size() == 2 else torch.uint8
        assert torch.equal(got.detach().contiguous().view(integers), want.contiguous().view(integers))

    assert_bits(output, as_tensor(operator.forward(**arrays, **problem.options)))
    grad_output = problem.grad_output.astype(_selfcheck.DTYPES[dtype])
    wanted = [key for key in arrays if key not in operator.fixed]
    grads = operator.backward(grad_output, **arrays, **problem.options, needs=wanted)
    for key, leaf in leaves.items():
        assert torch.equal(leaf.detach(), before[key])
        assert leaf.data_ptr() != output.data_ptr()
        want = getattr(grads, key)
        if key in operator.fixed:
            assert leaf.grad is None
        elif want is None:  # a place that has no slope
            assert leaf.grad.shape == leaf.shape and not leaf.grad.any()
        else:
            assert_bits(leaf.grad, as_tensor(want))


@pytest.mark.parametrize("name", TABLE)
def test_bits_are_those_of_numpy(name, way):
    for problem in _selfcheck.problems(name):
        assert_same(name, problem, "float64", way)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_bits_are_those_of_numpy_in_other_dtypes(name, dtype, way):
    assert_same(name, _selfcheck.problem(name), dtype, way)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_coordinates_in_float32_beside_half_types(dtype):
    problem = _selfcheck.problem("deform_conv2d")
    leaves = recorded("deform_conv2d", tensors(problem, dtype))
    leaves["offset"] = tensor(problem.arrays["offset"], "float32").requires_grad_()
    output = bridge.deform_conv2d(**leaves, **problem.options)
    output.sum().backward()
    assert output.dtype == leaves["input"].grad.dtype == getattr(torch, dtype)
    assert leaves["offset"].grad.dtype == torch.float32


@pytest.mark.parametrize("name", TABLE)
def test_gradcheck(name):
    """Against finite differences of what the bridge returns; boxes' batch index has no neighbours."""
    function, arrays = differentiable(name, tensors(_selfcheck.problem(name)))
    problem = _selfcheck.problem(name)
    if "boxes" in problem.arrays and "boxes" not in TABLE[name].fixed:

        def of_corners(input, corners):
            index = tensor(problem.arrays["boxes"][:, :1])
            return function(input, torch.cat([index, corners], 1))

        arrays, checked = [arrays[0], arrays[1][:, 1:].contiguous()], of_corners
    else:
        checked = function
    leaves = [array.requires_grad_() for array in arrays]
    assert torch.autograd.gradcheck(checked, leaves, eps=1e-6, atol=1e-7, fast_mode=True)


def test_gradients_that_nobody_asked_for_are_not_computed():
    problem = _selfcheck.problem("roi_align")
    for wanted in (["input"], ["boxes"], ["input", "boxes"]):
        arrays = {key: a.requires_grad_(key in wanted) for key, a in tensors(problem).items()}
        output = bridge.roi_align(**arrays, **problem.options)
        with Calls() as seen:
            output.sum().backward()
        assert [arguments[-1] for arguments in seen.calls] == [wanted]
        assert [key for key, a in arrays.items() if a.grad is not None] == wanted


def test_arrays_without_a_gradient_may_require_one():
    """They get none, beside others and alone."""
    problem = _selfcheck.problem("roi_pool")
    for wanted in (["input", "boxes"], ["boxes"]):
        arrays = {key: a.requires_grad_(key in wanted) for key, a in tensors(problem).items()}
        bridge.roi_pool(**arrays, **problem.options).sum().backward()
        assert arrays["boxes"].grad is None
        assert (arrays["input"].grad is not None) == ("input" in wanted)


def test_a_call_that_only_autograd_sees_does_not_go_through_the_dispatcher(monkeypatch):
    problem = _selfcheck.problem("roi_align")
    leaves = recorded("roi_align", tensors(problem))
    monkeypatch.setattr(_options, "packed", None)  # which the dispatcher's arguments need
    bridge.roi_align(**leaves, **problem.options).sum().backward()
    with torch.no_grad(), torch.autocast("cpu"):
        bridge.roi_align(**leaves, **problem.options)


def seen_by_the_profiler(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    assert any(event.name == "pydeform::grid_sample" for event in profile.events())


def seen_by_a_mode(call):
    with Calls() as seen:
        call()
    assert len(seen.calls) == 1


def seen_by_a_function_mode(call):
    with torch.device("cpu"):  # a default, which is one
        call()


def seen_by_dual_numbers(call):
    with torch.autograd.forward_ad.dual_level():
        call()


def seen_by_a_transform(call):
    torch.func.vmap(lambda _: call())(torch.zeros(2))


def seen_by_a_trace(call):
    graph = torch.jit.trace(lambda x: call() + x, torch.zeros(()), check_trace=False).graph
    assert "pydeform::grid_sample" in str(graph)


@pytest.mark.parametrize(
    "watched",
    [
        seen_by_the_profiler,
        seen_by_a_mode,
        seen_by_a_function_mode,
        seen_by_dual_numbers,
        seen_by_a_transform,
        seen_by_a_trace,
    ],
)
def test_what_others_see_goes_through_the_dispatcher(watched, monkeypatch):
    problem = _selfcheck.problem("grid_sample")
    arrays, packed, calls = tensors(problem), _options.packed, []
    monkeypatch.setattr(_options, "packed", lambda options: calls.append(options) or packed(options))
    bridge.grid_sample(**arrays, **problem.options)
    assert not calls
    watched(lambda: bridge.grid_sample(**arrays, **problem.options))
    assert calls


def test_tensors_that_are_not_numbers_in_memory():
    """They are the dispatcher's, which makes them plain."""
    problem = _selfcheck.problem("grid_sample")
    arrays = tensors(problem)
    want = bridge.grid_sample(**arrays, **problem.options)
    arrays["input"] = torch._neg_view(arrays["input"])
    assert torch.equal(bridge.grid_sample(**arrays, **problem.options), -want)


def test_in_inference_mode():
    problem = _selfcheck.problem("grid_sample")
    want = bridge.grid_sample(**tensors(problem), **problem.options)
    with torch.inference_mode():
        assert torch.equal(bridge.grid_sample(**tensors(problem), **problem.options), want)


def test_subclasses_see_the_call():
    class Named(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    names: list[str] = []
    problem = _selfcheck.problem("grid_sample")
    arrays = tensors(problem)
    arrays["grid"] = arrays["grid"].as_subclass(Named)
    bridge.grid_sample(**arrays, **problem.options)
    assert any("pydeform.grid_sample" in name for name in names)


def test_an_argument_changed_before_the_backward_is_an_error():
    problem = _selfcheck.problem("grid_sample")
    leaves = recorded("grid_sample", tensors(problem))
    output = bridge.grid_sample(**leaves, **problem.options)
    with torch.no_grad():
        leaves["grid"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_an_option_changed_before_the_backward_changes_nothing():
    problem = _selfcheck.problem("ms_deform_attn")
    shapes = [list(rows) for rows in problem.options["spatial_shapes"]]
    rest = {key: value for key, value in problem.options.items() if key != "spatial_shapes"}
    grads = []
    for change in (0, 1):
        leaves = recorded("ms_deform_attn", tensors(problem))
        output = bridge.ms_deform_attn(**leaves, spatial_shapes=shapes, **rest)
        shapes[0][0] += change
        output.sum().backward()
        grads.append(leaves["value"].grad)
    assert torch.equal(*grads)


def test_many_gradients_of_one_call_at_once():
    """torch.func can; the older vmap of autograd itself has no rules for operators like ours, and says so."""
    problem = _selfcheck.problem("grid_sample")
    leaves = recorded("grid_sample", tensors(problem))
    output = bridge.grid_sample(**leaves, **problem.options)
    directions = torch.randn(3, *output.shape, dtype=output.dtype)
    inputs = list(leaves.values())
    with pytest.raises(RuntimeError, match="Batching rule not implemented for pydeform::grid_sample_backward"):
        torch.autograd.grad(output, inputs, directions, retain_graph=True, is_grads_batched=True)
    found = torch.func.vmap(lambda d: torch.autograd.grad(output, inputs, d, retain_graph=True))(directions)
    for i, direction in enumerate(directions):
        want = torch.autograd.grad(output, inputs, direction, retain_graph=True)
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got[i], expected, rtol=1e-12, atol=1e-12)


def test_strides_do_not_matter():
    problem = _selfcheck.problem("deform_conv2d")
    plain = recorded("deform_conv2d", tensors(problem))
    strided = {}
    for key, leaf in plain.items():
        spread = torch.full((*leaf.shape, 2), torch.nan, dtype=leaf.dtype)
        spread[..., 0] = leaf.detach()
        strided[key] = spread[..., 0].requires_grad_()
    negated = {key: torch._neg_view(-leaf.detach()).requires_grad_() for key, leaf in plain.items()}
    last = tensor(problem.grad_output).transpose(0, 1).contiguous().transpose(0, 1)
    results = []
    for leaves in (plain, strided, negated):
        output = bridge.deform_conv2d(**leaves, **problem.options)
        output.backward(last)
        results.append([output.detach(), *(leaf.grad for leaf in leaves.values())])
    assert not strided["input"].is_contiguous() and negated["input"].is_neg()
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


@pytest.mark.parametrize("name", TABLE)
def test_empty(name):
    """No images, or no boxes."""
    problem, operator = _selfcheck.problem(name), TABLE[name]
    leaves = recorded(name, {k: a if k in operator.shared else a[:0] for k, a in tensors(problem).items()})
    options = dict(problem.options)
    if "size" in options:
        options["size"] = (0, *options["size"][1:])
    output = getattr(bridge, name)(**leaves, **options)
    assert output.shape == (0, *problem.grad_output.shape[1:])
    output.sum().backward()
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values() if leaf.requires_grad)


def test_not_finite():
    problem = _selfcheck.problem("deform_conv2d")
    arrays = tensors(problem)
    arrays["offset"][0, 0, 0, 0], arrays["offset"][1, 0, 0, 0] = torch.nan, torch.inf
    output = bridge.deform_conv2d(**arrays, **problem.options)
    want = pydeform.deform_conv2d(**{k: a.numpy() for k, a in arrays.items()}, **problem.options)
    assert_same_bits(output.numpy(), want)
    assert output[0, :, 0, 0].isnan().any() and not output[1].isnan().any()


def test_threads():
    problem, failed = _selfcheck.problem("deform_conv2d"), []
    leaves = recorded("deform_conv2d", tensors(problem))
    expected = torch.autograd.grad(bridge.deform_conv2d(**leaves, **problem.options).sum(), list(leaves.values()))

    def work():
        for _ in range(20):
            output = bridge.deform_conv2d(**leaves, **problem.options)
            grads = torch.autograd.grad(output.sum(), list(leaves.values()))
            if not all(map(torch.equal, grads, expected)):
                failed.append(grads)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


# Call forms of torchvision --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [name for name in TABLE if "boxes" in TABLE[name].arrays])
def test_boxes_as_a_list(name):
    problem = _selfcheck.problem(name)
    arrays = tensors(problem)
    boxes = arrays.pop("boxes")
    order = torch.argsort(boxes[:, 0], stable=True)
    by_image = [boxes[boxes[:, 0] == image][:, 1:] for image in range(2)]
    whole = getattr(bridge, name)(boxes=boxes, **arrays, **problem.options)
    arrays = {key: a if key == "input" else a[order] for key, a in arrays.items()}
    listed = getattr(bridge, name)(boxes=by_image, **arrays, **problem.options)
    assert torch.equal(listed, whole[order])


def test_gradient_of_listed_boxes():
    problem = _selfcheck.problem("roi_align")
    boxes = [tensor(problem.arrays["boxes"][:3, 1:]).requires_grad_(), torch.empty(0, 4, dtype=torch.float64)]
    bridge.roi_align(tensor(problem.arrays["input"]), boxes, (1, 2), 0.5, 2).sum().backward()
    assert boxes[0].grad.shape == (3, 4) and boxes[0].grad.any()


def test_spatial_shapes_of_any_kind():
    problem = _selfcheck.problem("ms_deform_attn")
    options = {key: value for key, value in problem.options.items() if key != "spatial_shapes"}
    shapes = problem.options["spatial_shapes"]
    want = bridge.ms_deform_attn(**tensors(problem), **problem.options)
    for given in (list(map(list, shapes)), np.array(shapes), torch.tensor(shapes)):
        assert torch.equal(bridge.ms_deform_attn(**tensors(problem), spatial_shapes=given, **options), want)


# Options in a graph ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "value",
    [1, -3, 2**40, 0.1, 1.0, -0.0, float("inf"), True, None, "it's", (), (1,), ((1, 2), (3, (0.5, None))), "same"],
    ids=str,
)
def test_options_come_back_as_they_were(value):
    ints, floats = [], []
    text = _options._literal_of(value, ints, floats)
    back = _options.unpacked("{'x': " + text + ", 'y': ..., 'z': 0.0}", [*ints, 7], [*floats, 7.5])
    assert repr(back) == repr({"x": value, "y": 7, "z": 7.5})


# What PyTorch asks of an operator -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TABLE)
def test_opcheck(name):
    problem = _selfcheck.problem(name)
    call = getattr(torch.ops.pydeform, name).default
    torch.library.opcheck(call, operator_call(name, recorded(name, tensors(problem)), problem.options))
    call = getattr(torch.ops.pydeform, f"{name}_backward").default
    wanted = [key for key in problem.arrays if key not in TABLE[name].fixed]
    arguments = [tensor(problem.grad_output), *operator_call(name, tensors(problem), problem.options), wanted]
    torch.library.opcheck(call, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_compile(name):
    problem = _selfcheck.problem(name)
    function, arrays = differentiable(name, tensors(problem))
    arrays = [array.requires_grad_() for array in arrays]
    output = torch.compile(function, fullgraph=True, backend="aot_eager")(*arrays)
    want = function(*arrays)
    assert torch.equal(output, want)
    grads, wanted = (torch.autograd.grad((result**2).sum(), arrays) for result in (output, want))
    assert all(map(torch.equal, grads, wanted))


def test_compile_with_options_that_change():
    """Ints and floats become symbols the second time."""
    problem = _selfcheck.problem("roi_align")
    input, boxes = tensors(problem).values()
    compiled = torch.compile(
        lambda boxes, *options: bridge.roi_align(input, boxes, *options), fullgraph=True, backend="aot_eager"
    )
    for size, scale in ((2, 0.5), (3, 0.25), (4, 0.125)):
        assert torch.equal(compiled(boxes, size, scale), bridge.roi_align(input, boxes, size, scale))
    listed = [boxes[:3, 1:], boxes[:0, 1:]]
    assert torch.equal(compiled(listed, 2, 0.5), bridge.roi_align(input, listed, 2, 0.5))


def test_compile_with_inductor():
    """Its own code calls the operator and the backward; nothing here is for it to compile in C++."""
    problem = _selfcheck.problem("deform_conv2d")
    function, arrays = differentiable("deform_conv2d", tensors(problem))
    arrays = [array.requires_grad_() for array in arrays]
    output, grad_output = torch.compile(function, fullgraph=True)(*arrays), tensor(problem.grad_output)
    want = function(*arrays)
    assert torch.equal(output, want)
    grads, wanted = (torch.autograd.grad(result, arrays, grad_output) for result in (output, want))
    assert all(map(torch.equal, grads, wanted))


@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_export_with_a_dynamic_batch(name):
    """And a file of it. The graph has our operator in it."""
    problem, operator = _selfcheck.problem(name), TABLE[name]
    arrays = tensors(problem)

    class Model(torch.nn.Module):
        def forward(self, *given):
            return getattr(bridge, name)(**dict(zip(arrays, given, strict=True)), **problem.options)

    dynamic = [None if key in operator.shared else {0: torch.export.Dim.DYNAMIC} for key in arrays]
    program = torch.export.export(Model(), tuple(arrays.values()), dynamic_shapes=(tuple(dynamic),), strict=False)
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [
        getattr(torch.ops.pydeform, name).default
    ]
    for times in (1, 3):
        given = [a if key in operator.shared else torch.cat([a] * times) for key, a in arrays.items()]
        assert torch.equal(program.module()(*given), Model()(*given))


def test_export_of_a_size_that_is_a_symbol(tmp_path):
    class Model(torch.nn.Module):
        def forward(self, theta, input):
            return bridge.grid_sample(input, bridge.affine_grid(theta, input.shape))

    dynamic = {0: torch.export.Dim.DYNAMIC}
    example = torch.eye(2, 3).expand(3, 2, 3).clone(), torch.rand(3, 1, 4, 5)
    program = torch.export.export(Model(), example, dynamic_shapes=(dynamic, dynamic), strict=False)
    torch.export.save(program, tmp_path / "model.pt2")
    again = torch.export.load(tmp_path / "model.pt2").module()
    larger = torch.cat([example[0]] * 2), torch.rand(6, 1, 4, 5)
    assert torch.equal(again(*larger), Model()(*larger))


# torch.func -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TABLE)
def test_vmap(name):
    """Over each array alone and all together, of results and of gradients."""
    problem, operator = _selfcheck.problem(name), TABLE[name]
    arrays = tensors(problem)
    wanted = tuple(n for n, key in enumerate(arrays) if key not in operator.fixed)

    def function(*given):
        return getattr(bridge, name)(**dict(zip(arrays, given, strict=True)), **problem.options)

    gradients = torch.func.grad(lambda *given: (function(*given) ** 2).sum(), argnums=wanted)
    for mapped in [*((key,) for key in arrays), tuple(arrays)]:
        axes = tuple(-1 if key in mapped else None for key in arrays)
        given = [
            torch.stack([a, a if key == "boxes" else a / 2], -1) if key in mapped else a for key, a in arrays.items()
        ]
        parts = [[a if axis is None else a[..., n] for a, axis in zip(given, axes, strict=True)] for n in range(2)]
        outputs = torch.func.vmap(function, in_dims=axes)(*given)
        assert torch.equal(outputs, torch.stack([function(*part) for part in parts]))
        grads = torch.func.vmap(gradients, in_dims=axes)(*given)
        torch.testing.assert_close(
            grads, tuple(map(torch.stack, zip(*[gradients(*part) for part in parts], strict=True)))
        )


def test_vmap_folds_what_it_can():
    """One call of a larger batch where no shared array is mapped."""
    problem = _selfcheck.problem("deform_conv2d")
    arrays = tensors(problem)
    with Calls() as seen:
        torch.func.vmap(lambda input: bridge.deform_conv2d(**{**arrays, "input": input}, **problem.options))(
            torch.stack([arrays["input"]] * 3)
        )
    assert [arguments[0].shape[0] for arguments in seen.calls] == [3 * 2]


@pytest.mark.parametrize("key", ["input", "weight"])
def test_vmap_over_nothing(key):
    problem = _selfcheck.problem("deform_conv2d")
    arrays = tensors(problem)

    def function(array):
        return bridge.deform_conv2d(**{**arrays, key: array}, **problem.options)

    nothing = arrays[key].new_empty(0, *arrays[key].shape)
    assert torch.func.vmap(function)(nothing).shape == (0, *problem.grad_output.shape)
    assert torch.func.vmap(torch.func.grad(lambda array: function(array).sum()))(nothing).shape == nothing.shape


def test_vmap_in_vmap():
    problem = _selfcheck.problem("deform_conv2d")
    arrays = tensors(problem)
    weights = torch.stack([arrays["weight"], -arrays["weight"]])
    inputs = torch.stack([arrays["input"], arrays["input"] / 2, arrays["input"] / 4])

    def function(weight, input):
        return bridge.deform_conv2d(**{**arrays, "weight": weight, "input": input}, **problem.options)

    of_inputs = torch.func.vmap(function, in_dims=(None, 0))
    got = torch.func.vmap(of_inputs, in_dims=(0, None))(weights, inputs)
    assert torch.equal(got, torch.stack([torch.stack([function(w, x) for x in inputs]) for w in weights]))


def test_jacobians():
    problem = _selfcheck.problem("roi_align")
    input, boxes = tensors(problem).values()

    def function(input):
        return bridge.roi_align(input, boxes, **problem.options)

    jacobian = torch.func.jacrev(function)(input)
    assert jacobian.shape == (*problem.grad_output.shape, *input.shape)
    torch.testing.assert_close(torch.tensordot(jacobian, input, input.ndim), function(input))  # it is linear


def test_autograd_around_a_transform():
    """A weight that only autograd knows, beside an input that torch.func follows, at one level or at two."""
    problem = _selfcheck.problem("deform_conv2d")
    arrays = recorded("deform_conv2d", tensors(problem))
    input, weight = arrays.pop("input"), arrays["weight"]

    def function(input):
        return bridge.deform_conv2d(input, **arrays, **problem.options)

    (want,) = torch.autograd.grad(function(input).sum(), weight)
    output, _ = torch.func.vjp(function, input.detach())
    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], want)
    output, _ = torch.func.vjp(lambda input: torch.func.vjp(function, input)[0], input.detach())
    assert torch.equal(torch.autograd.grad(output.sum(), weight)[0], want)


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_second_derivatives_are_refused(name):
    function, arrays = differentiable(name, tensors(_selfcheck.problem(name)))
    arrays = [array.requires_grad_() for array in arrays]
    (grad,) = torch.autograd.grad((function(*arrays) ** 2).sum(), arrays[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=f"^{name}: differentiable once"):
        grad.sum().backward()
    first = torch.func.grad(lambda x: (function(x, *arrays[1:]) ** 2).sum())
    with pytest.raises(NotImplementedError, match=f"^{name}: differentiable once"):
        torch.func.grad(lambda x: first(x).sum())(arrays[0].detach())


@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: torch.func.jacfwd(f)(x),
        lambda f, x: torch.func.hessian(lambda x: (f(x) ** 2).sum())(x),
        lambda f, x: torch.func.grad(lambda x: torch.func.jvp(f, (x,), (x,))[1].sum())(x),
        lambda f, x: torch.func.jvp(torch.func.grad(lambda x: (f(x) ** 2).sum()), (x,), (x,)),
    ],
    ids=["forward", "forward of backward's", "backward of forward's", "forward of two levels"],
)
def test_forward_mode_is_refused(derivative):
    """Rather than answered with a tangent of zeros."""
    function, (input, *others) = differentiable("deform_conv2d", tensors(_selfcheck.problem("deform_conv2d")))
    with pytest.raises(NotImplementedError, match=r"^deform_conv2d(_backward)?: has no forward-mode derivatives"):
        derivative(lambda input: function(input, *others), input)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"input": np.ones((2, 4, 5, 6))}, TypeError, "deform_conv2d: input must be a torch.Tensor, got ndarray"),
        ({"weight": None}, TypeError, "deform_conv2d: weight must be a torch.Tensor, got NoneType"),
        ({"stride": {1, 2}}, TypeError, "deform_conv2d: stride must be of numbers, texts, None and tuples"),
        ({"stride": 0}, ValueError, "deform_conv2d: stride must be an int >= 1"),
        ({"boundary": "none"}, ValueError, "deform_conv2d: boundary must be one of 'torchvision'"),
        ({"color": 1}, TypeError, "deform_conv2d() got an unexpected keyword argument 'color'"),
    ],
    ids=str,
)
def test_errors(change, error, message):
    problem = _selfcheck.problem("deform_conv2d")
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        bridge.deform_conv2d(**{**tensors(problem), **problem.options, **change})


def test_errors_of_shapes_dtypes_and_devices():
    problem = _selfcheck.problem("deform_conv2d")
    arrays = tensors(problem)
    with pytest.raises(ValueError, match=r"^deform_conv2d: mask must have shape .*, got \(2, 3, 3, 8\)$"):
        bridge.deform_conv2d(**{**arrays, "mask": arrays["mask"][:, :3]}, **problem.options)
    with pytest.raises(TypeError, match=r"^deform_conv2d: weight must have the dtype of input, float64, got float32$"):
        bridge.deform_conv2d(**{**arrays, "weight": arrays["weight"].float()}, **problem.options)
    with pytest.raises(TypeError, match=r"^deform_conv2d: input must be a dense tensor, got layout torch\.sparse_coo"):
        bridge.deform_conv2d(**{**arrays, "input": arrays["input"].to_sparse()}, **problem.options)
    with pytest.raises(TypeError, match=r"^deform_conv2d\(\) missing 1 required positional argument: 'weight'"):
        bridge.deform_conv2d(arrays["input"], arrays["offset"])
    with pytest.raises(TypeError, match=r"^deform_conv2d\(\) got multiple values for argument 'input'"):
        bridge.deform_conv2d(arrays["input"], **arrays)
    with pytest.raises(TypeError, match=r"^roi_align\(\) takes from 3 to 6 positional arguments but 7 were given"):
        bridge.roi_align(arrays["input"], arrays["input"], 1, 1.0, 1, False, "avg")
    for boxes in ([], [np.ones((1, 4))], [torch.ones(4)]):
        with pytest.raises(
            TypeError, match=r"^roi_align: boxes must be a tensor, or a list of one for each image, got"
        ):
            bridge.roi_align(arrays["input"], boxes, 1)
    meta = {key: array.to("meta") for key, array in arrays.items()}
    assert bridge.deform_conv2d(**meta, **problem.options).shape == problem.grad_output.shape


# Autocast -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ONE_OF_EACH_FAMILY)
def test_autocast_computes_in_float32(name):
    """As torchvision: whatever comes is widened, and the result has the dtype of the first array."""
    problem = _selfcheck.problem(name)
    arrays = recorded(name, tensors(problem, "bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        output = getattr(bridge, name)(**arrays, **problem.options)
    wide = getattr(bridge, name)(**{key: array.detach().float() for key, array in arrays.items()}, **problem.options)
    assert output.dtype == torch.bfloat16 and torch.equal(output, wide.bfloat16())
    output.sum().backward()
    assert all(array.grad.dtype == torch.bfloat16 for array in arrays.values() if array.requires_grad)


def test_autocast_with_mixed_dtypes():
    """A convolution before it gives bfloat16, its weight is float32; float64 stays what it is."""
    problem = _selfcheck.problem("deform_conv2d")
    arrays = tensors(problem, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        mixed = bridge.deform_conv2d(**{**arrays, "input": arrays["input"].bfloat16()}, **problem.options)
        double = bridge.deform_conv2d(**tensors(problem), **problem.options)
        compiled = torch.compile(bridge.deform_conv2d, fullgraph=True, backend="aot_eager")(
            **{**arrays, "input": arrays["input"].bfloat16()}, **problem.options
        )
    assert mixed.dtype == torch.bfloat16 and double.dtype == torch.float64
    assert torch.equal(mixed, bridge.deform_conv2d(**arrays, **problem.options).bfloat16())
    assert torch.equal(compiled, mixed)


# Around them ----------------------------------------------------------------------------------------------------------
def test_checkpoint_and_a_function_around_it():
    problem = _selfcheck.problem("deform_conv2d")
    function, arrays = differentiable("deform_conv2d", tensors(problem))
    arrays = [array.requires_grad_() for array in arrays]
    want = torch.autograd.grad(function(*arrays).sum(), arrays)
    output = torch.utils.checkpoint.checkpoint(function, *arrays, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(output.sum(), arrays), want))

    class Around(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *given):
            ctx.save_for_backward(*given)
            return function(*given)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                leaves = [saved.detach().requires_grad_() for saved in ctx.saved_tensors]
                return torch.autograd.grad(function(*leaves), leaves, grad)

    assert all(map(torch.equal, torch.autograd.grad(Around.apply(*arrays).sum(), arrays), want))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere workers are not forked")
def test_a_forked_worker_computes():
    problem = _selfcheck.problem("deform_conv2d")
    arrays = recorded("deform_conv2d", tensors(problem))
    want = bridge.deform_conv2d(**arrays, **problem.options).detach()

    class Results(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            output = bridge.deform_conv2d(**arrays, **problem.options)
            output.sum().backward()
            return output.detach()

    loader = torch.utils.data.DataLoader(Results(), batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert all(torch.equal(result, want) for result in loader)


def test_page_runs():
    """In this process, which has spent the seconds for importing PyTorch."""
    page = (ROOT / "docs" / "bridges" / "torch.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})


# Tensors without numbers ----------------------------------------------------------------------------------------------
def test_a_meta_tensor_beside_others_is_refused():
    """PyTorch would take memory that nobody has written for the result."""
    x, offset = torch.rand(1, 2, 3, 3), torch.zeros(1, 18, 3, 3)
    with torch.device("meta"):
        module = pydeform.torch.DeformConv2d(2, 2, 3, padding=1)
    text = "deform_conv2d: all arrays must be on one device, got input is on cpu, offset is on cpu, weight is on meta"
    with pytest.raises(TypeError, match=text):
        module(x, offset)
    with pytest.raises(TypeError, match=r"roi_align: all arrays must be on one device, .* boxes is on meta"):
        pydeform.torch.roi_align(x, torch.zeros(1, 5, device="meta"), 2)
    assert module(x.to("meta"), offset.to("meta")).shape == (1, 2, 3, 3)


@pytest.mark.parametrize("functions", [pydeform, pydeform.torch])
def test_a_tensor_whose_storage_is_freed_is_refused(functions):
    x, offset, weight = torch.ones(1, 1, 3, 3), torch.zeros(1, 2, 3, 3), torch.ones(1, 1, 1, 1)
    weight.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="weight must be a tensor with memory, got one whose storage was freed"):
        functions.deform_conv2d(x, offset, weight)
