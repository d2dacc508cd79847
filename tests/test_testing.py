"""gradcheck must find what is wrong, say where, and not complain about what is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

import pydeform
from pydeform import _selfcheck
from pydeform.testing import gradcheck, off_integers


class Grads(NamedTuple):
    x: np.ndarray
    w: np.ndarray | None


X = np.array([[0.5, -1.5, 2.0], [0.25, 3.0, -0.75]])
W = np.array([1.0, -2.0, 0.5])


def product(x, w):
    return np.sin(x) @ (w * w)


def product_backward(grad, x, w):
    return Grads(np.cos(x) * (w * w) * grad[:, None], 2 * w * (grad @ np.sin(x)))


def sine(x):
    return np.sin(x)


def hinge(x):
    return np.maximum(x, 0.0)


def step(x):
    return np.where(x >= 0, 1.0 + x, 0.0)


def test_right_gradients_pass():
    report = gradcheck(product, product_backward, {"x": X, "w": W})
    assert report.checked == {"x": [(i, j) for i in range(2) for j in range(3)], "w": [(0,), (1,), (2,)]}
    assert report.kinked == {"x": [], "w": []}


def test_a_wrong_element_is_named():
    def backward(grad, x, w):
        grads = product_backward(grad, x, w)
        grads.x[1, 2] *= 1 + 1e-4
        return grads

    with pytest.raises(
        AssertionError, match=r"gradcheck: x\[1, 2\]: analytic .*\d, numeric .*\d, allowed error \S+e-0\d$"
    ):
        gradcheck(product, backward, {"x": X, "w": W}, directions=0)


def test_an_error_a_little_above_the_tolerance_is_found_and_one_below_is_not():
    def backward(error):
        return lambda grad, x: {"x": np.cos(x) * grad * (1 + error)}

    x = np.linspace(0.1, 1, 5)
    for elements, directions, clearly in ((24, 0, 2), (0, 2, 20)):  # along a direction, slopes cancel in part
        options = {"elements": elements, "directions": directions}
        with pytest.raises(AssertionError, match=r"x\[\d\]: analytic"):
            gradcheck(sine, backward(clearly * 1e-6), {"x": x}, **options)
        gradcheck(sine, backward(5e-7), {"x": x}, **options)
        with pytest.raises(AssertionError, match=r"x\[\d\]: analytic"):
            gradcheck(sine, backward(clearly * 1e-9), {"x": x}, rtol=1e-9, **options)
        gradcheck(sine, backward(5e-10), {"x": x}, rtol=1e-9, **options)


def test_a_wrong_element_that_was_not_sampled_is_found_along_a_direction_and_named():
    x = np.linspace(0.1, 1, 1000)

    def backward(grad, x):
        wrong = np.cos(x) * grad
        wrong[missed] += 1
        return {"x": wrong}

    missed = 0
    sampled = gradcheck(sine, lambda grad, x: {"x": np.cos(x) * grad}, {"x": x}, elements=3).checked["x"]
    missed = next(i for i in range(1000) if (i,) not in sampled)
    with pytest.raises(AssertionError, match=rf"x\[{missed}\]: analytic"):
        gradcheck(sine, backward, {"x": x}, elements=3)


def test_a_missing_gradient_is_found_unless_it_is_declared():
    def backward(grad, x, w):
        return product_backward(grad, x, w)._replace(w=None)

    assert list(gradcheck(product, backward, {"x": X, "w": W}, wrt=["x"]).checked) == ["x"]
    with pytest.raises(
        AssertionError, match=r"^gradcheck: backward gave no gradient for w; wrt lists the arguments that have one$"
    ):
        gradcheck(product, backward, {"x": X, "w": W})
    with pytest.raises(AssertionError, match=r"^gradcheck: backward gave no gradient for w$"):
        gradcheck(product, backward, {"x": X, "w": W}, wrt=("x", "w"))


def test_a_gradient_of_the_wrong_shape_or_nan_is_found():
    with pytest.raises(AssertionError, match=r"^gradcheck: gradient of x must have shape \(3,\), got \(1, 3\)$"):
        gradcheck(sine, lambda grad, x: {"x": (np.cos(x) * grad)[None]}, {"x": W})
    with pytest.raises(AssertionError, match=r"x\[0\]: analytic nan, numeric 0\."):
        gradcheck(sine, lambda grad, x: {"x": x * np.nan}, {"x": W})


def test_several_outputs_and_arguments_that_are_not_arrays():
    def forward(x, power, missing):
        assert missing is None
        return x**power, np.exp(x)

    def backward(grads, x, power, missing):
        return {"x": power * x ** (power - 1) * grads[0] + np.exp(x) * grads[1], "missing": None}

    assert gradcheck(forward, backward, {"x": W, "power": 3, "missing": None}).checked == {"x": [(0,), (1,), (2,)]}
    with pytest.raises(AssertionError, match="x"):
        gradcheck(
            forward,
            lambda g, **a: {"x": backward(g, **a)["x"] - np.exp(a["x"]) * g[1]},
            {
                "x": W,
                "power": 3,
                "missing": None,
            },
        )


def test_a_nearby_kink_makes_the_step_smaller():
    """Distances below the first step, down to what the smallest still resolves."""
    for distance in (9e-4, 4e-4, 3.3e-4, 2e-4, 2e-5):
        x = np.array([1.0, distance, -distance])
        report = gradcheck(hinge, lambda grad, x: {"x": np.where(x > 0, grad, 0)}, {"x": x}, directions=4)
        assert report.kinked["x"] == []
        with pytest.raises(AssertionError, match=r"x\[2\]"):
            gradcheck(hinge, lambda grad, x: {"x": np.where(x > -1, grad, 0)}, {"x": x}, directions=0)


def test_on_a_kink_any_value_between_the_slopes_passes_and_is_reported():
    x = np.array([1.0, 0.0, -1.0])

    def backward(at_zero):
        return lambda grad, x: {"x": np.where(x > 0, grad, np.where(x == 0, at_zero * grad, 0))}

    for at_zero in (0.0, 0.5, 1.0):
        assert gradcheck(hinge, backward(at_zero), {"x": x}).kinked == {"x": [(1,)]}
    for at_zero in (-0.01, 1.01):
        with pytest.raises(AssertionError, match=r"x\[1\]: analytic \S+, numeric \S+ left and \S+ right"):
            gradcheck(hinge, backward(at_zero), {"x": x})


def test_one_side():
    x = np.array([1.0, 0.0, -1.0])

    def backward(at_zero):
        return lambda grad, x: {"x": np.where(x > 0, grad, np.where(x == 0, at_zero * grad, 0))}

    gradcheck(hinge, backward(1.0), {"x": x}, side="right")
    gradcheck(hinge, backward(0.0), {"x": x}, side="left")
    for at_zero, side in ((0.0, "right"), (0.5, "right"), (1.0, "left"), (0.5, "left")):
        with pytest.raises(AssertionError, match=r"x\[1\]"):
            gradcheck(hinge, backward(at_zero), {"x": x}, side=side)
        with pytest.raises(AssertionError, match=r"x\[1\]"):
            gradcheck(hinge, backward(at_zero), {"x": x}, side=side, elements=0)


def test_a_jump_passes_only_from_its_continuous_side():
    x = np.array([0.0, 1.0])

    def backward(grad, x):
        return {"x": np.where(x >= 0, grad, 0)}

    gradcheck(step, backward, {"x": x}, side="right")
    for side in ("both", "left"):
        with pytest.raises(AssertionError, match=r"x\[0\].*differences do not settle"):
            gradcheck(step, backward, {"x": x}, side=side)


def test_kinks_moves_what_is_too_close():
    seen = []

    def forward(x):
        seen.append(x)
        return np.abs(x - np.round(x))

    def backward(grad, x):
        return {"x": np.sign(x - np.round(x)) * grad}

    x = np.array([1.0, 2.25, -3.001, 4.02])
    report = gradcheck(forward, backward, {"x": x}, kinks={"x": off_integers}, kink_margin=0.05)
    np.testing.assert_allclose(seen[0], [1.05, 2.25, -3.05, 4.05])
    assert not report.kinked["x"]
    assert x.tolist() == [1.0, 2.25, -3.001, 4.02]


def test_the_rng_decides_and_is_the_same_by_default():
    def sampled(**options):
        x = np.linspace(0.1, 1, 500)
        return gradcheck(sine, lambda grad, x: {"x": np.cos(x) * grad}, {"x": x}, elements=5, **options).checked

    assert sampled() == sampled() == sampled(rng=np.random.default_rng(0))
    assert sampled() != sampled(rng=1)


def test_empty_arrays_pass():
    assert gradcheck(sine, lambda grad, x: {"x": np.cos(x) * grad}, {"x": np.zeros((0, 3))}).checked == {"x": []}


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ({"x": W}, {"side": "up"}, "side must be one of 'both', 'right', 'left', got 'up'"),
        ({"x": W}, {"kink_margin": 0}, "kink_margin must be above 0 and finite, got 0"),
        ({"x": W}, {"kink_margin": np.nan}, "kink_margin must be above 0 and finite, got nan"),
        ({"x": W}, {"rtol": 0.0}, "rtol must be above 0 and below 1, got 0.0"),
        ({"x": W}, {"rtol": np.inf}, "rtol must be above 0 and below 1, got inf"),
        ({"x": W}, {"elements": -1}, "elements and directions must be at least 0, got -1 and 2"),
        ({"x": W}, {"directions": -1}, "elements and directions must be at least 0, got 24 and -1"),
        ({"x": W}, {"kinks": {"y": off_integers}}, "kinks must name arguments among x, got 'y'"),
        ({"x": W}, {"wrt": ("y",)}, "y must be a float64 NumPy array among the arguments, got no such name"),
        ({"x": W}, {"wrt": ()}, "nothing to check; no array of floats among x"),
        ({"x": 3}, {}, "nothing to check; no array of floats among x"),
        (
            {"x": W.astype("f4")},
            {"wrt": ("x",)},
            "x must be a float64 NumPy array among the arguments, got ndarray of float32",
        ),
        (
            {"x": W.astype(complex)},
            {},
            "x must be a float64 NumPy array among the arguments, got ndarray of complex128; "
            "wrt lists the arguments to check",
        ),
    ],
)
def test_unusable_arguments(arguments, options, message):
    with pytest.raises(ValueError) as caught:
        gradcheck(sine, lambda grad, x: {"x": np.cos(x) * grad}, arguments, **options)
    assert str(caught.value) == f"gradcheck: {message}"


# wrong ones -----------------------------------------------------------------------------------------------------------
#
# Each is a forward, a backward and arguments: right but for what its name says. `said`: what the error must tell.

LONG = np.linspace(-2, 2.1, 200)
MIXED = np.array([[0.5, -1.25, 2.0, 0.75], [-0.3, 1.1, -0.6, 1.7], [0.2, 0.9, -1.4, 0.4]])


def smooth(x):
    return np.sin(x) + x * x[::-1]  # each output depends on two elements


def smooth_grad(g, x):
    return np.cos(x) * g + (x * g)[::-1] + x[::-1] * g


def of_smooth(change, x=MIXED):
    """A backward of `smooth` with `change(grad, g, x)` made to its result."""
    x = x.copy() if x.base is None else x  # some changes write to it
    return smooth, lambda g, x: {"x": change(smooth_grad(g, x), g, x)}, {"x": x}


def put(place, value):
    def change(grad, g, x):
        grad[place] = value if not callable(value) else value(grad[place])
        return grad

    return change


def once(change, number):
    """`change` in one call only, the one of this number."""
    calls = []

    def changed(grad, g, x):
        calls.append(None)
        return change(grad, g, x) if len(calls) == number else grad

    return changed


def writes_to_grad_output(grad, g, x):
    g *= 2
    return grad


def writes_to_argument(grad, g, x):
    x += 1
    return grad


def writes_between(grad, g, x):
    x.base[:, 1::2] = 7.0  # the elements between those of the argument
    return grad


def transposes_argument(grad, g, x):
    x.shape = x.shape[::-1]
    return grad


def one_buffer(shape):
    buffer = np.empty(shape)

    def change(grad, g, x):
        buffer[...] = grad
        return buffer

    return change


def rewritten():
    """Memory of its own in each call, of which the last call's is spoilt."""
    last = []

    def change(grad, g, x):
        for old in last:
            old *= 2
        last[:] = [grad]
        return grad

    return change


def stale():
    """A backward that uses what the last forward saw, whatever it is called with."""
    seen = []

    def forward(x):
        seen[:] = [x]
        return smooth(x)

    return forward, lambda g, x: {"x": smooth_grad(g, seen[0])}, {"x": MIXED}


def counted():
    """A forward that drifts."""
    calls = []

    def forward(x):
        calls.append(None)
        return smooth(x) + 1e-3 * len(calls)

    return forward, lambda g, x: {"x": smooth_grad(g, x)}, {"x": MIXED}


def contiguous_only(grad, g, x):
    return smooth_grad(g.ravel(order="K").reshape(g.shape), x)


def contiguous_argument_only(grad, g, x):
    return smooth_grad(g, x.ravel(order="K").reshape(x.shape))


def two(change):
    def backward(g, x, w):
        return change(product_backward(g, x, w)._asdict())

    return product, backward, {"x": X, "w": W}


def far(x):
    return x + 1e20


def kinked_backward(change):
    """max(x, 0) on many kinks at once, beside as many elements off them; right but for `change`."""
    x = np.where(np.arange(300) % 2, LONG[0], 0.0) * np.ones(300)
    x[3::4] = 1.5
    return hinge, lambda g, x: {"x": change(np.where(x >= 0, g, 0.0))}, {"x": x}


def of(forward, grad, x):
    return lambda x: forward(x), lambda g, x: {"x": grad(g, x)}, {"x": x}


def tents(x):
    return np.abs(x - np.round(x))


ANALYTIC = "analytic"
WRONG = {
    "one element infinite": (lambda: of_smooth(put((1, 2), np.inf)), r"x\[1, 2\]: analytic inf, numeric "),
    "one element NaN": (lambda: of_smooth(put((1, 2), np.nan)), r"x\[1, 2\]: analytic nan, numeric "),
    "one of many infinite": (lambda: of_smooth(put(77, -np.inf), LONG), r"x\[77\]: analytic -inf, numeric "),
    "one of many NaN": (lambda: of_smooth(put(77, np.nan), LONG), r"x\[77\]: analytic nan, numeric "),
    "one of many huge": (lambda: of_smooth(put(77, 1e300), LONG), ANALYTIC),
    "one of many zero": (lambda: of_smooth(put(77, 0.0), LONG), ANALYTIC),
    "one of many off by 1e-3": (lambda: of_smooth(put(77, lambda v: v + 1e-3), LONG), ANALYTIC),
    "all zero": (lambda: of_smooth(lambda grad, g, x: 0 * grad), ANALYTIC),
    "twice": (lambda: of_smooth(lambda grad, g, x: 2 * grad), ANALYTIC),
    "other sign": (lambda: of_smooth(lambda grad, g, x: -grad), ANALYTIC),
    "off by 1e-5": (lambda: of_smooth(lambda grad, g, x: grad * (1 + 1e-5)), ANALYTIC),
    "two elements swapped": (lambda: of_smooth(lambda grad, g, x: grad[:, [1, 0, 2, 3]]), ANALYTIC),
    "one of many beside a huge one": (
        lambda: of(
            lambda x: x * put(5, 1e6)(np.ones(200), 0, 0),
            lambda g, x: g * put(77, 0.5)(put(5, 1e6)(np.ones(200), 0, 0), 0, 0),
            LONG,
        ),
        r"x\[77\]: analytic",
    ),
    "elements in one place": (
        lambda: of(
            lambda x: x.sum(), lambda g, x: np.lib.stride_tricks.as_strided(g * np.ones(1), (3, 4), (0, 0)), MIXED
        ),
        "elements of the gradient of x share memory",
    ),
    "many swapped": (lambda: of_smooth(lambda grad, g, x: grad[[*range(100), 101, 100, *range(102, 200)]], LONG), "x"),
    "transposed": (lambda: of_smooth(lambda grad, g, x: grad.T.copy(), MIXED[:, :3]), ANALYTIC),
    "reversed rows": (lambda: of_smooth(lambda grad, g, x: grad[::-1].copy()), ANALYTIC),
    "part of the chain rule missing": (lambda: of(smooth, lambda g, x: np.cos(x) * g + x[::-1] * g, MIXED), ANALYTIC),
    "small beside another": (lambda: of(np.exp, lambda g, x: np.where(x < 0, 2, 1) * np.exp(x) * g, W * 6), ANALYTIC),
    "right for ones only": (lambda: of_smooth(lambda grad, g, x: smooth_grad(np.ones_like(g), x)), ANALYTIC),
    "mean of grad_output": (lambda: of_smooth(lambda grad, g, x: smooth_grad(np.full_like(g, g.mean()), x)), ANALYTIC),
    "first channel of grad_output only": (lambda: of_smooth(lambda grad, g, x: smooth_grad(g[:, :1], x)), ANALYTIC),
    "grad_output squared": (lambda: of_smooth(lambda grad, g, x: smooth_grad(g * g, x)), ANALYTIC),
    "grad_output clipped at 50": (lambda: of_smooth(lambda grad, g, x: smooth_grad(g.clip(-50, 50), x)), "not linear"),
    "gradient clipped at a norm": (
        lambda: of_smooth(lambda grad, g, x: grad / max(1.0, np.linalg.norm(grad) / 1e3)),
        "not linear",
    ),
    "tiny grad_output dropped": (
        lambda: of_smooth(lambda grad, g, x: smooth_grad(np.where(abs(g) < 1e-6, 0, g), x)),
        "not linear",
    ),
    "a constant added": (lambda: of_smooth(lambda grad, g, x: grad + 1e-8), "x"),
    "not zero for zero": (lambda: of_smooth(lambda grad, g, x: grad if g.any() else grad + 1), "not linear"),
    "writes to grad_output": (lambda: of_smooth(writes_to_grad_output), "backward wrote to grad_output"),
    "writes to the argument": (lambda: of_smooth(writes_to_argument), "backward wrote to x"),
    "writes beside the argument": (
        lambda: of_smooth(writes_between, np.repeat(MIXED, 2, axis=1)[:, ::2]),
        "backward wrote to x",
    ),
    "reshapes the argument": (lambda: of_smooth(transposes_argument), "backward wrote to x"),
    "writes to another argument": (
        lambda: (
            lambda x, other: smooth(x),
            lambda g, x, other: (other[1].append(1), {"x": smooth_grad(g, x)})[1],
            {"x": MIXED, "other": (3, [])},
        ),
        r"backward wrote to other\[1\]",
    ),
    "writes to an array of integers": (
        lambda: (
            lambda x, labels: smooth(x),
            lambda g, x, labels: (labels.sort(), {"x": smooth_grad(g, x)})[1],
            {"x": MIXED, "labels": np.array([2, 1])},
        ),
        "backward wrote to labels",
    ),
    "forward writes": (
        lambda: of(lambda x: np.sin(x, out=x).copy(), lambda g, x: g * np.cos(x), MIXED.copy()),
        "forward wrote to x",
    ),
    "is grad_output": (lambda: of(lambda x: x + 1, lambda g, x: g, MIXED), "gradient of x shares memory with grad_out"),
    "is a view of grad_output": (
        lambda: of(lambda x: x.T + 1, lambda g, x: g.T, MIXED),
        "gradient of x shares memory with grad_output",
    ),
    "is the argument": (lambda: of(lambda x: x * x / 2, lambda g, x: x, MIXED), "gradient of x shares memory with x"),
    "one buffer for two gradients": (
        lambda: (
            lambda x, w: x + w,
            lambda g, x, w: dict.fromkeys("xw", g.copy()),
            {"x": MIXED, "w": MIXED[::-1].copy()},
        ),
        "gradient of w shares memory with the gradient of x",
    ),
    "one buffer for all calls": (lambda: of_smooth(one_buffer(MIXED.shape)), "same memory in two calls"),
    "spoils what it returned": (lambda: of_smooth(rewritten()), "wrote to what it had returned"),
    "wrong in the second call": (lambda: of_smooth(once(lambda grad, g, x: 2 * grad, 2)), "called again"),
    "random": (lambda: of_smooth(lambda grad, g, x: grad * (1 + 1e-7 * np.random.standard_normal())), "called again"),
    "keeps what forward saw": (stale, "called again"),
    "forward drifts": (counted, "forward, called again|analytic"),
    "contiguous grad_output only": (lambda: of_smooth(contiguous_only), "other strides of grad_output"),
    "contiguous argument only": (lambda: of_smooth(contiguous_argument_only), "other strides of its arguments"),
    "complex": (lambda: of_smooth(lambda grad, g, x: grad + 0j), "must be float64, got complex128"),
    "float32": (lambda: of_smooth(lambda grad, g, x: grad.astype("f4")), "must be float64, got float32"),
    "objects": (lambda: of_smooth(lambda grad, g, x: grad.astype(object)), "must be float64, got object"),
    "complex output": (
        lambda: of(lambda x: x + 0j, lambda g, x: g.real, MIXED),
        "output must be a float64 NumPy array",
    ),
    "float32 output": (lambda: of(lambda x: x.astype("f4"), lambda g, x: g * 1, MIXED), "output must be a float64"),
    "computes in float32": (
        lambda: of(lambda x: np.sin(x.astype("f4")).astype("f8"), lambda g, x: 0 * g, MIXED),
        "cannot verify: the outputs are no more precise",
    ),
    "a list": (lambda: of_smooth(lambda grad, g, x: grad.tolist()), "must be a NumPy array, got list"),
    "masked": (
        lambda: of_smooth(lambda grad, g, x: np.ma.masked_less(grad, 0)),
        "must be a NumPy array, got MaskedArr",
    ),
    "one axis more": (lambda: of_smooth(lambda grad, g, x: grad[None]), r"must have shape \(3, 4\), got \(1, 3, 4\)"),
    "a broadcast": (lambda: of_smooth(lambda grad, g, x: grad[:1]), r"must have shape \(3, 4\), got \(1, 4\)"),
    "an array, not fields": (lambda: (smooth, smooth_grad, {"x": MIXED}), "must return a NamedTuple or a mapping"),
    "None": (lambda: two(lambda grads: {**grads, "w": None}), "gave no gradient for w"),
    "a field missing": (lambda: two(lambda grads: {"x": grads["x"]}), "gave no gradient for w"),
    "a field too many": (lambda: two(lambda grads: {**grads, "y": W * 1}), "gave a gradient for y"),
    "fields exchanged": (
        lambda: (
            lambda x, w: x * x * w,
            lambda g, x, w: {"w": 2 * x * w * g, "x": x * x * g},
            {"x": W, "w": W[::-1] / 3},
        ),
        ANALYTIC,
    ),
    "one output of two forgotten": (
        lambda: of(lambda x: (np.sin(x), x**2), lambda g, x: g[0] * np.cos(x), MIXED),
        ANALYTIC,
    ),
    "outputs exchanged": (
        lambda: of(lambda x: (np.sin(x), x**2), lambda g, x: g[1] * np.cos(x) + g[0] * 2 * x, MIXED),
        ANALYTIC,
    ),
    "noise hides everything": (lambda: of(far, lambda g, x: -3 * g, MIXED), "cannot verify x"),
    "noise hides everything, zero": (lambda: of(far, lambda g, x: 0 * g, MIXED), "cannot verify x"),
    "noise hides one output": (
        lambda: of(lambda x: (x * 2, far(x)), lambda g, x: 2 * g[0], MIXED),
        "cannot verify x",
    ),
    "noise hides half": (lambda: of(lambda x: x + 1e12, lambda g, x: 1.01 * g, MIXED), "x"),
    "cancellation within": (lambda: of(lambda x: (x + 1e8) - 1e8 + x / 3, lambda g, x: (4 / 3 + 1e-5) * g, MIXED), "x"),
    "finite where the output is not": (
        lambda: of(lambda x: x / abs(x), lambda g, x: 0 * g, W * [1, 0, 1]),
        "cannot ver",
    ),
    "infinite beside an infinite output": (
        lambda: of(np.reciprocal, lambda g, x: -g / x**2 + [np.inf, 0, 0, 0], np.array([2.0, 0.0, -3.0, 5.0])),
        r"x\[0\]: analytic inf",
    ),
    "outside of both slopes on a kink": (lambda: kinked_backward(lambda grad: 1.5 * grad), ANALYTIC),
    "wrong on one kink of many": (lambda: kinked_backward(lambda g: put(100, lambda v: -v)(g, 0, 0)), ANALYTIC),
    "wrong beside kinks": (lambda: kinked_backward(lambda g: put(103, lambda v: v * 0.99)(g, 0, 0)), ANALYTIC),
    "a kink next to it taken for the other side": (
        lambda: of(tents, lambda g, x: g * np.sign(x - np.round(x) + 1e-4), np.array([0.3, 2.7, 3 - 1e-5])),
        ANALYTIC,
    ),
    "a jump of the value": (lambda: of(step, lambda g, x: g * (x >= 0), np.array([1.0, 0.0, -1.0])), "x"),
    "a jump in one of many": (lambda: of(step, lambda g, x: g * (x >= 0), put(150, 0.0)(LONG.copy(), 0, 0)), "x"),
    "a slope without end": (lambda: of(np.sqrt, lambda g, x: g * 0, np.array([1.0, 0.0])), "x"),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, seed):
    make, said = WRONG[name]
    with np.errstate(all="ignore"), pytest.raises(AssertionError, match=f"^gradcheck: .*(?:{said})"):
        gradcheck(*make(), rng=seed)


# right ones -----------------------------------------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def softmax_grad(g, x):
    y = softmax(x)
    return y * (g - (g * y).sum(axis=-1, keepdims=True))


def normalised(x):
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + 1e-5)


def normalised_grad(g, x):
    y, spread = normalised(x), np.sqrt(x.var() + 1e-5)
    return (g - g.mean() - y * (g * y).mean()) / spread


def largest(x):
    return x.max(axis=1)


def largest_grad(g, x):
    grad = np.zeros_like(x)
    grad[np.arange(len(x)), x.argmax(axis=1)] = g
    return grad


E7 = 1e7 + np.array([0.0, 1.0, 2.5, -3.25])
ZEROS = np.zeros((20, 15))
RIGHT = {
    "smooth": of_smooth(lambda grad, g, x: grad),
    "many": of_smooth(lambda grad, g, x: grad, LONG),
    "two arguments": two(lambda grads: grads),
    "sin(100 x)": of(lambda x: np.sin(100 * x), lambda g, x: 100 * g * np.cos(100 * x), MIXED),
    "sin(1e4 x)": of(lambda x: np.sin(1e4 * x), lambda g, x: 1e4 * g * np.cos(1e4 * x), MIXED),
    "sqrt at 1e-3": of(np.sqrt, lambda g, x: g / 2 / np.sqrt(x), np.array([1e-3, 2e-3, 5e-4])),
    "sqrt of many sizes": of(np.sqrt, lambda g, x: g / 2 / np.sqrt(x), 10.0 ** np.arange(-8, 3)),
    "log of all sizes": of(np.log, lambda g, x: g / x, 10.0 ** np.arange(-9, 8)),
    "reciprocal at 1e-6": of(np.reciprocal, lambda g, x: -g / x**2, np.array([1e-6, -3e-6, 1.0])),
    "square at 1e7": of(np.square, lambda g, x: 2 * g * x, E7),
    "sin at 1e7": of(np.sin, lambda g, x: g * np.cos(x), E7),
    "sin of 1e-7 x at 1e7": of(lambda x: np.sin(x * 1e-7), lambda g, x: 1e-7 * g * np.cos(x * 1e-7), E7),
    "product at 1e-30": of(lambda x: 3 * x, lambda g, x: 3 * g, MIXED * 1e-30),
    "product at 1e200": of(lambda x: 3 * x, lambda g, x: 3 * g, MIXED * 1e200),
    "x + 1 at 1e-9": of(lambda x: x + 1, lambda g, x: g * 1, MIXED * 1e-9),
    "exp from -20 to 20": of(np.exp, lambda g, x: g * np.exp(x), np.linspace(-20, 20, 17)),
    "outputs of 1e6": of(lambda x: x + 1e6, lambda g, x: g * 1, MIXED),
    "softmax": of(softmax, softmax_grad, MIXED * 5),
    "normalisation": of(normalised, normalised_grad, MIXED),
    "bias before normalisation": (
        lambda b: normalised(MIXED + b),
        lambda g, b: {"b": np.array([normalised_grad(g, MIXED + b).sum()])},
        {"b": np.array([0.25])},
    ),
    "maxima": of(largest, largest_grad, MIXED),
    "two maxima next to each other": of(largest, largest_grad, np.array([[1.0, 1.0 + 1e-5, 0.3], [0.1, 0.2, 0.2002]])),
    "two equal maxima": of(largest, largest_grad, np.array([[1.0, 1.0, 0.3], [0.1, 0.2, 0.2]])),
    "a scalar": of(np.sin, lambda g, x: np.cos(x) * g, np.array(0.7)),
    "a mean": of(np.mean, lambda g, x: np.full(x.shape, g / x.size), MIXED),
    "no dependence": of(lambda x: np.full(3, 2.5), lambda g, x: np.zeros_like(x), MIXED),
    "nothing": of(lambda x: x * 2, lambda g, x: g * 2, np.zeros((0, 3))),
    "no outputs": of(lambda x: np.zeros((0, 4)), lambda g, x: np.zeros_like(x), MIXED),
    "all on kinks, from the right": of(np.abs, lambda g, x: np.where(x >= 0, g, -g), ZEROS),
    "all on kinks, from the left": of(np.abs, lambda g, x: np.where(x > 0, g, -g), ZEROS),
    "all on kinks, the middle": of(np.abs, lambda g, x: np.sign(x) * g, ZEROS),
    "all on kinks, of several rules": of(
        np.abs, lambda g, x: g * np.where(x == 0, np.linspace(-1, 1, 300).reshape(20, 15), np.sign(x)), ZEROS
    ),
    "some on kinks": kinked_backward(lambda grad: grad),
    "kinks nearby": of(
        tents, lambda g, x: g * np.sign(x - np.round(x)), np.array([0.3, 3 - 1e-5, -2 + 1e-4, 7.0 + 1e-3])
    ),
    "infinite with its output": of(np.reciprocal, lambda g, x: -g / x**2, np.array([2.0, 0.0, -3.0])),
    "NaN with its output": of(np.sqrt, lambda g, x: g / 2 / np.sqrt(x), np.array([2.0, -1.0, 3.0])),
    "an infinite argument": of(np.arctan, lambda g, x: g / (1 + x**2), np.array([2.0, np.inf, 3.0])),
    "strided arguments": of_smooth(lambda grad, g, x: grad, np.repeat(MIXED, 2, axis=1)[:, ::2]),
    "read-only arguments": of_smooth(lambda grad, g, x: grad, np.broadcast_to(MIXED[0], (3, 4))),
    "gradients that are parts of one array": (
        lambda x, w: np.sin(x) * w,
        lambda g, x, w: dict(
            zip("xw", np.stack([g * np.cos(x) * w, g * np.sin(x)], -1).transpose(2, 0, 1), strict=True)
        ),
        {"x": MIXED, "w": MIXED[::-1].copy()},
    ),
}


UNCHECKED = {"infinite with its output": 1, "NaN with its output": 1, "an infinite argument": 1}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", RIGHT)
def test_right(name, seed):
    with np.errstate(all="ignore"):
        report = gradcheck(*RIGHT[name], rng=seed)
    if name == "all on kinks, of several rules":  # hardly two elements follow the same one: most are compared alone
        assert 24 <= len(report.kinked["x"]) <= ZEROS.size - report.unchecked["x"] < ZEROS.size
    else:
        assert sum(report.unchecked.values()) == UNCHECKED.get(name, 0)


def test_zero_offsets_where_every_sample_lies_on_a_kink():
    """The first step of every training. A wrong element that was not sampled is found there, too."""
    problem = _selfcheck.problem("deform_conv2d")
    arguments = {**problem.arrays, **problem.options, "offset": np.zeros_like(problem.arrays["offset"])}
    wrong = None

    def backward(grad, **arguments):
        grads = pydeform.deform_conv2d_backward(grad, **arguments)
        if wrong is not None:
            grads.offset[wrong] += 0.5 + abs(grads.offset).max()  # outside of any two slopes
        return grads

    report = gradcheck(pydeform.deform_conv2d, backward, arguments)
    assert report.kinked["offset"] and not any(report.unchecked.values())
    wrong = next(i for i in np.ndindex(arguments["offset"].shape) if i not in report.checked["offset"])
    with pytest.raises(AssertionError, match=r"offset\[{}\]: analytic".format(", ".join(map(str, wrong)))):
        gradcheck(pydeform.deform_conv2d, backward, arguments)


def test_off_integers():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-3, 3, 500), np.arange(-3.0, 4), np.arange(-3.0, 4) + 1e-9])
    moved = off_integers(values, 0.1)
    assert np.abs(moved - np.round(moved)).min() > 0.1 - 1e-12
    far = np.abs(values - np.round(values)) >= 0.1
    np.testing.assert_array_equal(moved[far], values[far])
    assert np.abs(moved - values).max() <= 0.1 + 1e-12
