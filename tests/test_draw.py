"""The sample of tests that a commit draws."""

import itertools
from typing import Any, NamedTuple

import pytest

from tests.draw import drawn, split

IDS = ["-".join(values) for values in itertools.product(("cpu", "emulated"), ("float32", "float16"), "abcdefgh")]


class Item(NamedTuple):
    nodeid: str
    function: Any = None


@pytest.mark.parametrize("seed", ["", "1", "0cdaa01"])
def test_each_value_is_drawn(seed):
    kept = [IDS[place] for place in drawn(IDS, seed)]
    assert {value for name in kept for value in name.split("-")} == {
        "cpu",
        "emulated",
        "float32",
        "float16",
        *"abcdefgh",
    }
    assert len(kept) < len(IDS) / 2


def test_a_seed_draws_always_the_same_and_seeds_draw_everything_in_time():
    assert drawn(IDS, "1") == drawn(IDS, "1") != drawn(IDS, "2")
    assert set().union(*(drawn(IDS, str(seed)) for seed in range(30))) == set(range(len(IDS)))


def test_values_that_differ_in_little_are_several():
    kernels = ["conv2-forward<Mma<f16, 64, 64>, int, 1>", "conv2-forward<Mma<f16, 64, 32>, int, 1>"]
    assert drawn(kernels, "") == {0, 1}
    assert drawn(["forward<float>", "backward<double>"], "") == {0, 1}
    assert drawn(["1.5-a", "1.25-a", "5-a", "25-a"], "") == {0, 1, 2, 3}
    vectors = ["cpu-conv1d/one-made__x", "cpu-conv2d/two-made__x", "gpu-conv2d/one-made__x", "gpu-conv1d/two-made__x"]
    assert drawn(vectors, "") == {0, 1, 2, 3}


def test_functions_are_drawn_apart_and_those_without_parameters_stay():
    items = [Item(f"tests/{file}.py::test_it[{name}]") for file in "xy" for name in IDS] + [
        Item("tests/x.py::test_one")
    ]
    kept, others = split(items, "1")
    assert items[-1] in kept
    assert sorted(kept + others) == sorted(items)
    assert kept == [item for item in items if item in kept]
    of_x, of_y = (
        {i.nodeid.partition("[")[2] for i in kept if i.nodeid.startswith(f"tests/{f}.py::test_it")} for f in "xy"
    )
    assert of_x != of_y


def test_of_classes_that_inherit_a_test_each_runs_it_and_all_together_with_each_value():
    def function():
        pass

    items = [Item(f"tests/{c}.py::Test{c}::test_it[{name}]", function) for c in "pqrstuvw" for name in IDS]
    kept, _ = split(items, "1")
    values = {value for item in kept for value in item.nodeid.partition("[")[2].removesuffix("]").split("-")}
    assert {item.nodeid.partition("::")[0] for item in kept} == {f"tests/{c}.py" for c in "pqrstuvw"}
    assert values == {value for name in IDS for value in name.split("-")}
    assert len(kept) < 16
