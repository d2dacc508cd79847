"""gradcheck must find what is wrong, say where, and not complain about what is right."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

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
        return lambda grad, x: {"x": np.cos(x) * grad + error}

    x = np.linspace(0.1, 1, 5)
    with pytest.raises(AssertionError, match="x"):
        gradcheck(sine, backward(1e-5), {"x": x})
    gradcheck(sine, backward(1e-8), {"x": x})
    with pytest.raises(AssertionError, match="x"):
        gradcheck(sine, backward(1e-8), {"x": x}, rtol=1e-9)


def test_a_wrong_element_that_was_not_sampled_shows_along_a_direction():
    x = np.linspace(0.1, 1, 1000)

    def backward(grad, x):
        wrong = np.cos(x) * grad
        wrong[missed] += 1
        return {"x": wrong}

    missed = 0
    sampled = gradcheck(sine, lambda grad, x: {"x": np.cos(x) * grad}, {"x": x}, elements=3).checked["x"]
    missed = next(i for i in range(1000) if (i,) not in sampled)
    with pytest.raises(AssertionError, match="x along random direction 0: analytic"):
        gradcheck(sine, backward, {"x": x}, elements=3)


def test_a_missing_gradient_is_found_only_when_asked_for():
    def backward(grad, x, w):
        return product_backward(grad, x, w)._replace(w=None)

    assert list(gradcheck(product, backward, {"x": X, "w": W}).checked) == ["x"]
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
        with pytest.raises(AssertionError, match="x along random direction 0"):
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
        ({"x": W}, {"side": "up"}, "gradcheck: side must be one of 'both', 'right', 'left', got 'up'"),
        ({"x": W}, {"kink_margin": 0}, "gradcheck: kink_margin must be above 0, got 0"),
        ({"x": W}, {"kinks": {"y": off_integers}}, "gradcheck: kinks must name arguments among x, got 'y'"),
        ({"x": W}, {"wrt": ("y",)}, "gradcheck: y must be a float64 NumPy array among the arguments"),
        ({"x": W.astype("f4")}, {"wrt": ("x",)}, "gradcheck: x must be a float64 NumPy array among the arguments"),
        (
            {"x": W.astype("f4")},
            {},
            "gradcheck: nothing to check; no float64 array among x has a gradient",
        ),
    ],
)
def test_unusable_arguments(arguments, options, message):
    with pytest.raises(ValueError) as caught:
        gradcheck(sine, lambda grad, x: {"x": np.cos(x) * grad}, arguments, **options)
    assert str(caught.value) == message


def test_off_integers():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-3, 3, 500), np.arange(-3.0, 4), np.arange(-3.0, 4) + 1e-9])
    moved = off_integers(values, 0.1)
    assert np.abs(moved - np.round(moved)).min() > 0.1 - 1e-12
    far = np.abs(values - np.round(values)) >= 0.1
    np.testing.assert_array_equal(moved[far], values[far])
    assert np.abs(moved - values).max() <= 0.1 + 1e-12
