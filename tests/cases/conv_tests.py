"""What every convolution must do, whatever its axes and kind: a test module makes a class of these for its operator."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import pydeform
from pydeform.testing import gradcheck, off_integers
from tests.cases.conv import (
    ARRAYS,
    AXES,
    CASES_OF_3,
    Case,
    case_of,
    checked,
    expected,
    kind_of,
    make,
    make_grad_output,
    run,
    run_backward,
    solve_oracle,
)
from tests.cases.deform_conv2d import dtype_of
from tests.conftest import Backend, assert_close, assert_same_bits
from tests.test_deform_conv2d import LAYOUTS, Guard

BOUNDARIES = ("torchvision", "dcnv2", "dcnv1")
DTYPES = ("float64", "float32", "float16", "bfloat16")
PLACES = ("offset", "positions")
CPU = Backend("cpu")


def assert_grads(got: dict[str, Any], want: dict[str, Any], dtype: str, wide: str = "") -> None:
    """`wide`: the name of what is in float32 beside a half type."""
    assert got.keys() == want.keys()
    for name, grad in want.items():
        if grad is None:
            assert got[name] is None, name
        else:
            assert_close(got[name], grad, "float32" if name == wide else dtype, f"grad of {name}")


class ConvTests:
    """Of any kind. `operator` is what the class that inherits tests."""

    operator: str

    @property
    def axes(self) -> int:
        return AXES[self.operator]

    @property
    def names(self) -> tuple[str, ...]:
        return ARRAYS[kind_of(self.operator)]

    @property
    def place(self) -> str:
        """The argument that says where to sample; empty: none does."""
        return next((name for name in self.names if name in PLACES), "")

    def case(self, name: str) -> Case:
        return case_of(name, self.axes).of(self.operator)

    def problem(self, name: str, dtype: str = "float64") -> tuple[dict[str, Any], dict[str, Any], Any]:
        case = self.case(name)
        return make(self.operator, case, dtype), case.options(self.operator), make_grad_output(case, dtype)

    def both(
        self, backend: Any, arrays: dict[str, Any], options: dict[str, Any], grad_output: Any, **of_backward: Any
    ) -> Any:
        """Output and gradients, and nothing that was given is written to."""
        with Guard(grad_output, *arrays.values()):
            output = run(backend, self.operator, arrays, options)
            return output, run_backward(backend, self.operator, grad_output, arrays, {**options, **of_backward})

    # Against the oracle

    @pytest.mark.parametrize("name", CASES_OF_3)
    def test_against_the_oracle(self, backend, name):
        output, grads = self.both(backend, *self.problem(name))
        want, want_grads = expected(self.operator, name)
        assert_close(output, want, "float64")
        assert tuple(grads) == self.names
        assert_grads(grads, want_grads, "float64")

    @pytest.mark.parametrize("name", ["every_option", "past_tiles", "depthwise"])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_dtypes(self, backend, name, dtype):
        output, grads = self.both(backend, *self.problem(name, dtype))
        want, want_grads = expected(self.operator, name)
        assert_close(output, want, dtype)
        assert_grads(grads, want_grads, dtype)

    def test_same_padding(self, backend):
        """Output size ceil(size / stride); an odd pixel of padding follows the image."""
        every = {"kernel": (2, 3, 2), "stride": (1, 2, 1), "padding": ((0, 1), (1, 1), (0, 1))}
        case = Case(1, 2, (3, 7, 6)[-self.axes :], 3, **{n: a[-self.axes :] for n, a in every.items()})
        arrays, options = make(self.operator, case), case.options(self.operator)
        want, grads = solve_oracle(self.operator, arrays, options, make_grad_output(case))
        assert want.shape == (1, 3, *(3, 4, 6)[-self.axes :])
        options["padding"] = "same"
        output, got = self.both(backend, arrays, options, make_grad_output(case))
        assert_close(output, want, "float64")
        assert_grads(got, grads, "float64")

    def test_an_int_stands_for_every_axis(self, backend):
        n = self.axes
        case = Case(1, 2, (9, 8, 7)[-n:], 3, (3, 2, 3)[-n:], (2,) * n, ((1, 1),) * n, (2,) * n).of(self.operator)
        arrays, full = make(self.operator, case), case.options(self.operator)
        want = run(backend, self.operator, arrays, full)
        values = {"stride": 2, "padding": 1, "dilation": 2}
        for short in (lambda v: v, lambda v: [v] * n, lambda v: np.full(n, v), lambda v: (np.int64(v),) * n):
            options = {**full, **{name: short(value) for name, value in values.items() if name in full}}
            assert_same_bits(run(backend, self.operator, arrays, options), want)

    def test_positional_order(self, backend):
        arrays, options, _ = self.problem("every_option")
        order = ["input", *[p for p in PLACES if p == self.place], "weight", "bias", "stride", "padding"]
        order += [name for name in ("dilation", "mask", "groups") if name in options or name in arrays]
        given = {name: backend.array(a) for name, a in arrays.items()} | options
        got = getattr(pydeform, self.operator)(*[given[name] for name in order])
        assert_close(backend.numpy(got), expected(self.operator, "every_option")[0], "float64")

    # Differences

    def small(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """A problem with every option, of ordinary real numbers."""
        rng = np.random.default_rng(3)
        case = self.case("every_option")._replace(in_channels=4, offset_groups=2, batch=1)
        arrays = {name: rng.normal(0, 1.5, a.shape) for name, a in make(self.operator, case).items()}
        return arrays, case.options(self.operator)

    def test_gradcheck(self, backend):
        arrays, options = self.small()
        kinks = {self.place: off_integers} if self.place else {}
        report = gradcheck(*checked(backend, self.operator, options), arrays, wrt=self.names, kinks=kinks, elements=12)
        assert {n: len(indices) for n, indices in report.checked.items()} == {
            n: min(arrays[n].size, 12) for n in self.names
        }
        assert not any(report.kinked.values())

    def test_a_wrong_backward_fails(self, backend):
        """One element of one gradient that is a hundredth too large."""
        arrays, options = self.small()
        if self.place:
            arrays[self.place] = off_integers(arrays[self.place], 0.05)
        forward, backward = checked(backend, self.operator, options)
        for wrong in self.names:

            def faulty(grad_output, wrong=wrong, **arrays):
                grads = backward(grad_output, **arrays)
                largest = np.abs(grads[wrong]).argmax()
                grads[wrong] = grads[wrong].copy()
                grads[wrong].flat[largest] *= 1.01
                return grads

            with pytest.raises(AssertionError, match=wrong):
                gradcheck(forward, faulty, arrays, wrt=(wrong,), elements=4)

    def compare_with_pytorch(self, backend: Any, dtype: str) -> None:
        """Of a plain convolution, with as much padding after as before, which is all that PyTorch has."""
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        case = self.case("every_option")._replace(padding=((1, 1), (2, 2), (1, 1))[-self.axes :])
        arrays, options = make(self.operator, case, dtype), case.options(self.operator)
        tensors = {name: torch.from_numpy(a).requires_grad_() for name, a in arrays.items()}
        pads = tuple(before for before, _ in case.padding)
        output = getattr(torch.nn.functional, self.operator)(**tensors, **{**options, "padding": pads})
        grad_output = make_grad_output(case, dtype)
        output.backward(torch.from_numpy(grad_output))
        got, grads = self.both(backend, arrays, options, grad_output)
        assert_close(got, output.detach().numpy().astype(np.float64), dtype)
        assert_grads(grads, {name: t.grad.numpy().astype(np.float64) for name, t in tensors.items()}, dtype)

    # needs, arrays in odd places

    @pytest.mark.parametrize("name", ["every_option", "version_1", "past_tiles"])
    def test_needs(self, backend, name):
        """Each subset leaves the others None and changes no bit of what it computes."""
        arrays, options, grad_output = self.problem(name, "float32")
        options["deterministic"] = True
        every = run_backward(backend, self.operator, grad_output, arrays, options)
        present = [n for n in self.names if arrays[n] is not None]
        for needs in [(n,) for n in present] + [present[:2], present[1:], ["input", "weight"], ()]:
            got = run_backward(backend, self.operator, grad_output, arrays, {**options, "needs": needs})
            for gradient in self.names:
                if gradient in needs:
                    assert_same_bits(got[gradient], every[gradient], f"{gradient} of needs={needs}")
                else:
                    assert got[gradient] is None, f"{gradient} of needs={needs}"

    def test_needs_of_absent_arguments_stays_none(self, backend):
        arrays, options, grad_output = self.problem("version_1")
        got = run_backward(backend, self.operator, grad_output, arrays, {**options, "needs": ("bias", "weight")})
        assert {name for name, grad in got.items() if grad is not None} == {"weight"}

    @pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
    def test_layouts_give_the_bits_of_a_copy(self, backend, dtype):
        arrays, options, grad_output = self.problem("every_option", dtype)
        output, grads = self.both(backend, arrays, options, grad_output, deterministic=True)
        for layout in LAYOUTS:
            odd = {name: layout(a) for name, a in arrays.items()}
            odd_output, odd_grads = self.both(backend, odd, options, layout(grad_output), deterministic=True)
            assert_same_bits(odd_output, output, layout.__name__)
            for name in self.names:
                assert_same_bits(odd_grads[name], grads[name], f"{name}, {layout.__name__}")

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_batch_0(self, backend, dtype):
        """Empty results of the right shape; gradients of what all images share are zeros, not absent."""
        arrays, options, grad_output = self.problem("batch_0", dtype)
        output, grads = self.both(backend, arrays, options, grad_output)
        assert (output.shape, output.dtype.name) == (grad_output.shape, dtype)
        for name in self.names:
            assert (grads[name].shape, grads[name].dtype.name) == (arrays[name].shape, dtype)
            assert not grads[name].any()

    def test_results_are_fresh_and_contiguous(self, backend):
        """The caller may write to a result without touching an argument or the next result."""
        arrays, options, _ = self.problem("one_pixel")
        sent = {name: backend.array(a) for name, a in arrays.items()}
        forward, backward = (getattr(pydeform, self.operator + end) for end in ("", "_backward"))
        one, two = forward(**sent, **options), forward(**sent, **options)
        results = [one, two, *backward(one, **sent, **options)]
        assert all(r.flags.c_contiguous for r in results)
        if backend.on_cpu:
            assert all(r.flags.writeable for r in results)
            everything = [*results, *sent.values()]
            assert not any(np.shares_memory(a, b) for a, b in itertools.combinations(everything, 2))

    @pytest.mark.parametrize("name", ["every_option", "version_1", "depthwise"])
    def test_deterministic_is_accepted_and_changes_nothing_on_the_cpu(self, name):
        arrays, options, grad_output = self.problem(name)
        plain = run_backward(CPU, self.operator, grad_output, arrays, options)
        asked = run_backward(CPU, self.operator, grad_output, arrays, {**options, "deterministic": True})
        for gradient, array in plain.items():
            if array is not None:
                assert_same_bits(asked[gradient], array, gradient)

    @pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
    def test_the_number_of_threads_changes_no_bit(self, monkeypatch, threads, dtype):
        monkeypatch.setattr("pydeform.cpu.conv.plan.SERIAL_FLOPS", 0)
        for name in ("every_option", "past_tiles", "channel_blocks", "depthwise", "mostly_outside"):
            arrays, options, grad_output = self.problem(name, dtype)
            threads(1)
            want = self.both(CPU, arrays, options, grad_output)
            for count in (2, 3, 7):
                threads(count)
                output, grads = self.both(CPU, arrays, options, grad_output)
                assert_same_bits(output, want[0], f"{name} on {count}")
                for gradient, array in want[1].items():
                    if array is not None:
                        assert_same_bits(grads[gradient], array, f"{gradient} of {name} on {count}")

    def test_a_bad_pixel_stays_where_it_is_used(self, backend):
        """A corner pixel, where a clamped index would land: what is outside must not multiply it by zero."""
        n = self.axes
        case = Case(1, 2, (3, 4, 5)[-n:], 2, (2, 1, 2)[-n:], padding=((2, 2),) * n, reach=9).of(self.operator)
        arrays, options, grad_output = make(self.operator, case), case.options(self.operator), make_grad_output(case)
        arrays["input"][(0, 1, *[0] * n)] = np.nan
        arrays["input"][(0, 0, *[-1] * n)] = np.nan
        want, grads = solve_oracle(self.operator, arrays, options, grad_output)
        assert np.isnan(want).sum() < want.size
        output, got = self.both(backend, arrays, options, grad_output)
        assert_close(output, want, "float64")
        assert_grads(got, grads, "float64")
        assert np.isfinite(got["input"]).all()  # the input's gradient does not depend on the input


class PlacedTests(ConvTests):
    """Of those that are told where to sample."""

    @pytest.mark.parametrize("half", ["float16", "bfloat16"])
    def test_places_in_float32_beside_halves(self, backend, half):
        """Places past pixel 512 in eighths, which no half type tells apart; their gradient is float32 as well."""
        n = self.axes
        sizes = {"in_size": (2, 3, 600), "kernel": (2, 1, 2), "stride": (1, 2, 600)}
        case = Case(2, 4, out_channels=3, offset_groups=2, **{name: a[-n:] for name, a in sizes.items()})
        arrays, options = make(self.operator, case, half), case.of(self.operator).options(self.operator)
        grad_output = make_grad_output(case, half)
        places = make(self.operator, case)[self.place]
        channels = places.ndim - 1 - (n if self.place == "offset" else 0)
        along = places[(slice(None),) * channels + (slice(n - 1, None, n),)]  # of the last axis
        rng = np.random.default_rng(4)
        along[...] = rng.integers(513, 590, along.shape) + rng.choice([0.125, 0.375, 0.625], along.shape)
        arrays[self.place] = places.astype(np.float32)
        want, grads = solve_oracle(self.operator, arrays, options, grad_output)
        rounded = {**arrays, self.place: arrays[self.place].astype(dtype_of(half))}
        assert np.abs(solve_oracle(self.operator, rounded, options, grad_output)[0] - want).max() > 0.05
        output, got = self.both(backend, arrays, options, grad_output)
        assert_close(output, want, half)
        assert_grads(got, grads, half, wide=self.place)


class DeformTests(PlacedTests):
    """Of deformable convolution: what its offsets and its boundary rules add."""

    @pytest.mark.parametrize("boundary", BOUNDARIES[1:])
    @pytest.mark.parametrize("name", ["every_option", "padding_asymmetric", "mostly_outside", "one_pixel"])
    def test_boundary(self, backend, name, boundary):
        arrays, options, grad_output = self.problem(name)
        output, grads = self.both(backend, arrays, {**options, "boundary": boundary}, grad_output)
        want, want_grads = expected(self.operator, name, boundary)
        assert_close(output, want, "float64")
        assert_grads(grads, want_grads, "float64")

    def one_point_each(self, points: np.ndarray, dtype: str) -> tuple[dict[str, Any], dict[str, Any], Any]:
        """One batch entry a point; with a stride of the image's size the kernel of 1 has one output, from pixel 0."""
        n, rng = self.axes, np.random.default_rng(8)
        size = (2, 3, 4)[-n:]
        image, weight = (rng.integers(8, 65, (1, 2, *size)) / 32, rng.integers(-64, 65, (3, 2, *[1] * n)) / 32)
        arrays = {
            "input": np.broadcast_to(image, (len(points), 2, *size)),
            "offset": points.reshape(-1, n, *[1] * n),
            "weight": weight,
            "bias": None,
            "mask": rng.integers(8, 65, (len(points), 1, *[1] * n)) / 32,
        }
        grad_output = (rng.integers(8, 65, (len(points), 3, *[1] * n)) / 32).astype(dtype_of(dtype))
        arrays = {name: None if a is None else a.astype(dtype_of(dtype)) for name, a in arrays.items()}
        return arrays, {"stride": size, "padding": ((0, 0),) * n, "dilation": (1,) * n}, grad_output

    def points(self, dtype: str) -> np.ndarray:
        """Every multiple of 1/2 around the image, one rounding beside -1, 0 and the length, far, infinite and NaN."""
        axes = []
        for length in (2, 3, 4)[-self.axes :]:
            line = [*np.arange(-2, length + 1, 0.5), np.nan, np.inf, -np.inf, 65504.0, -65504.0]
            if dtype in ("float64", "float32"):
                line += [float(np.finfo(dtype).max), -1e30, 2.0**31, 2.0**63]
                edges = np.array([-1, 0, length - 1, length], dtype)
                line += [float(np.nextafter(e, e.dtype.type(to))) for e in edges for to in (-np.inf, np.inf)]
            axes.append(line)
        every = np.array(list(itertools.product(*axes)))
        # Every one in one and two axes; of three what takes the oracle a moment.
        return every if self.axes < 3 else every[:: len(every) // 1999]

    @pytest.mark.parametrize("boundary", BOUNDARIES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_kind_of_point(self, backend, dtype, boundary):
        """Value and all gradients, at the border and off it; NaN gives NaN, infinity is outside."""
        arrays, options, grad_output = self.one_point_each(self.points(dtype), dtype)
        want, grads = solve_oracle(self.operator, arrays, {**options, "boundary": boundary}, grad_output)
        assert 0 < np.isnan(want).sum() < want.size
        assert np.isnan(grads["offset"]).sum() == self.axes * np.isnan(grads["mask"]).sum() > 0
        assert np.isfinite(grads["input"]).all()
        if not backend.on_cpu:  # its float32 has no numbers below 2**-126, so one rounding below 0 is 0
            below = abs(arrays["offset"].astype(float)) < np.finfo(np.float32).tiny
            arrays["offset"] = np.where(below & (arrays["offset"] != 0), arrays["offset"] * 0, arrays["offset"])
            want, grads = solve_oracle(self.operator, arrays, {**options, "boundary": boundary}, grad_output)
        output, got = self.both(backend, arrays, {**options, "boundary": boundary}, grad_output)
        assert_close(output, want, dtype)
        assert_grads(got, grads, dtype)

    @pytest.mark.parametrize("boundary", BOUNDARIES)
    def test_one_rounding_below_minus_1_is_outside(self, backend, boundary):
        """And one above it is inside, wherever the rule says so at all."""
        for dtype in ("float64", "float32"):
            edge = np.array([-1], dtype)
            ends = [float(np.nextafter(edge, edge.dtype.type(to))[0]) for to in (-2, 0)]
            points = np.array([[*[0.0] * (self.axes - 1), end] for end in ends])
            arrays, options, grad_output = self.one_point_each(points, dtype)
            output, grads = self.both(backend, arrays, {**options, "boundary": boundary}, grad_output)
            assert not output[0].any()
            assert not grads["offset"][0].any()
            assert not grads["input"][0].any()
            assert grads["offset"][1].any() == output[1].any() == (boundary != "dcnv1")

    def lattice(self, backend: Any, boundary: str) -> tuple[Any, Any, np.ndarray, np.ndarray]:
        """As a function of the offset alone, with one sample on every integer point from -2 to 1 past the image."""
        n, rng = self.axes, np.random.default_rng(11)
        size = (1, 2, 3)[-n:]
        out = tuple(length + 4 for length in size)
        points = np.stack(np.meshgrid(*[np.arange(-2.0, length + 2) for length in size], indexing="ij"))
        fixed = {
            "input": rng.uniform(1, 2, (1, 2, *size)),
            "weight": rng.uniform(1, 2, (3, 2, *[1] * n)),
            "mask": rng.uniform(1, 2, (1, 1, *out)),
        }
        options = {"padding": ((0, 4),) * n, "boundary": boundary}
        forward, backward = checked(backend, self.operator, options)
        return (
            lambda offset: forward(offset=offset, **fixed),
            lambda grad_output, offset: {"offset": backward(grad_output, offset=offset, **fixed)["offset"]},
            (points - np.indices(out))[None],
            points,
        )

    @pytest.mark.parametrize("boundary", ["torchvision", "dcnv1"])
    def test_right_hand_derivative_on_every_kink(self, backend, boundary):
        """At -1, 0, L-1, L and each integer between, along all axes; dcnv1's value jumps at 0 and L, from the left."""
        forward, backward, offset, _ = self.lattice(backend, boundary)
        elements = min(offset.size, 120)
        gradcheck(forward, backward, {"offset": offset}, wrt=("offset",), side="right", elements=elements)
        with pytest.raises(AssertionError, match="offset"):
            gradcheck(forward, backward, {"offset": offset}, side="left", elements=offset.size)

    def test_dcnv2_slope_at_minus_one_is_zero(self, backend):
        """Zero is the derivative from the left there; at every other integer it is the one from the right."""
        forward, backward, offset, points = self.lattice(backend, "dcnv2")
        edge = (points == -1).any(axis=0)
        away = np.where(edge, offset + 0.5, offset)
        gradcheck(forward, backward, {"offset": away}, wrt=("offset",), side="right", elements=min(offset.size, 120))
        grad = backward(np.ones((1, 3, *points.shape[1:])), offset)["offset"]
        assert (grad[0][:, edge] == 0).all()
        assert (grad[0][:, ~edge] != 0).any()
        with pytest.raises(AssertionError, match="offset"):
            gradcheck(forward, backward, {"offset": offset}, side="right", elements=offset.size)
