"""Files of layers and optimisers: what comes back is what was there, training goes on, and no broken file is taken."""

import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from pydeform import layers
from pydeform.layers import BatchNorm2d, Conv2d, DeformConv2d, GlobalAvgPool2d, Linear, ReLU, Sequential
from pydeform.losses import softmax_cross_entropy
from pydeform.optim import SGD, AdamW
from tests.conftest import assert_same_bits

ROOT = Path(__file__).parents[1]
SUFFIXES = [".npz", ".safetensors"]
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]
OPTIMISERS = {
    "SGD": lambda layer: SGD(layer, 0.05, momentum=0.9, weight_decay=0.01, clip=1),
    "AdamW": lambda layer: AdamW(layer, 0.01),
}


@pytest.fixture(autouse=True)
def _safetensors(request):
    """Not everybody has it."""
    if "suffix" in request.fixturenames and request.getfixturevalue("suffix") == ".safetensors":
        pytest.importorskip("safetensors")


def network(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return Sequential(
        DeformConv2d(1, 3, 3, modulated=True, rng=rng, dtype=dtype),
        BatchNorm2d(3, dtype=dtype),
        GlobalAvgPool2d(),
        Linear(3, 2, rng=rng, dtype=dtype),
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_save_and_load(tmp_path, suffix, dtype):
    a, b = network(1, dtype), network(2, dtype)
    a.state["1.running_mean"][...] = 3
    a.params["0.offset.weight"][...] = 0.5
    kept = b.params["0.weight"]
    layers.save(a, tmp_path / f"network{suffix}")
    layers.load(b, str(tmp_path / f"network{suffix}"))
    for name, array in {**a.params, **a.state}.items():
        np.testing.assert_array_equal({**b.params, **b.state}[name], array)
    assert b.params["0.weight"] is kept


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_load_refuses_another_network_and_changes_nothing(tmp_path, suffix):
    path = tmp_path / f"network{suffix}"
    layers.save(Linear(3, 2, rng=0), path)
    wider = Linear(4, 2, rng=1)
    before = wider.params["weight"].copy()
    with pytest.raises(ValueError, match=r"load: weight in .* must have shape \(2, 4\), got \(2, 3\)"):
        layers.load(wider, path)
    np.testing.assert_array_equal(wider.params["weight"], before)
    with pytest.raises(ValueError, match=r"must hold the arrays of Linear; missing: none; unknown: bias"):
        layers.load(Linear(3, 2, bias=False), path)
    with pytest.raises(ValueError, match=r"missing: running_mean, running_var; unknown: none"):
        layers.load(BatchNorm2d(2), path)
    with pytest.raises(ValueError, match=r"path must end in .npz or .safetensors, got 'network.pt'"):
        layers.save(wider, "network.pt")


# Training that goes on -----------------------------------------------------------------------------------------------
def small(dtype):
    rng = np.random.default_rng(0)
    return Sequential(
        Conv2d(1, 4, 3, rng=rng, dtype=dtype), BatchNorm2d(4, dtype=dtype), ReLU(), GlobalAvgPool2d(),
        Linear(4, 3, rng=rng, dtype=dtype),
    )  # fmt: skip


def train(layer, optimiser, steps, send=lambda a: a):
    for step in steps:
        rng = np.random.default_rng(step)
        x = rng.standard_normal((3, 1, 6, 5)).astype(next(iter(layer.params.values())).dtype)
        y, backprop = layer(send(x))
        _, grad = softmax_cross_entropy(y, send(rng.integers(0, 3, 3)))
        layer.zero_grads()
        backprop(grad)
        optimiser.step()


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], name)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", OPTIMISERS.values(), ids=OPTIMISERS)
def test_training_resumes_bit_for_bit(tmp_path, build, dtype, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    whole, part, resumed = small(dtype), small(dtype), small(dtype)
    optimiser = build(whole)
    train(whole, optimiser, range(7))
    first = build(part)
    train(part, first, range(4))
    layers.save(part, path, optimiser=first)
    train(part, first, range(90, 93))  # the file has nothing to do with these any more
    second = build(resumed)
    layers.load(resumed, path, optimiser=second)
    train(resumed, second, range(4, 7))
    assert_same({**resumed.params, **resumed.state}, {**whole.params, **whole.state})
    assert_same(second.state(), optimiser.state())
    for_inference = small(dtype)
    layers.load(for_inference, path)  # the optimiser's arrays stay in the file
    with pytest.raises(AssertionError):
        assert_same(for_inference.params, whole.params)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_training_resumes_on_the_device(backend, tmp_path, suffix):
    """Saved there, loaded on either."""
    device = "cpu" if backend.on_cpu else "cuda"
    path = tmp_path / f"checkpoint{suffix}"
    layer = small(np.float16).to(device)
    optimiser = OPTIMISERS["AdamW"](layer)
    train(layer, optimiser, range(2), backend.array)
    layers.save(layer, path, optimiser)
    for place, send in ((device, backend.array), ("cpu", lambda a: a)):
        resumed = small(np.float16).to(place)
        again = OPTIMISERS["AdamW"](resumed)
        layers.load(resumed, path, again)
        host = {name: np.array(backend.numpy(a) if place != "cpu" else a) for name, a in resumed.params.items()}
        assert_same(host, {name: np.array(backend.numpy(a)) for name, a in layer.params.items()})
        assert again.steps == 2
        train(resumed, again, range(2, 3), send)


def test_state_is_a_copy_to_return_to():
    layer = small(np.float16)
    optimiser = OPTIMISERS["SGD"](layer)
    train(layer, optimiser, range(3))
    kept, params = optimiser.state(), {name: param.copy() for name, param in layer.params.items()}
    train(layer, optimiser, range(3, 6))
    wanted = {name: param.copy() for name, param in layer.params.items()}
    for name, param in params.items():
        layer.params[name][...] = param
    optimiser.load_state(kept)
    for array in layer.state.values():  # running statistics take no part in training
        array[...] = 0
    train(layer, optimiser, range(3, 6))
    assert_same(layer.params, wanted)


def test_states_that_do_not_fit_change_nothing():
    layer = small(np.float16)
    adam, sgd = OPTIMISERS["AdamW"](layer), OPTIMISERS["SGD"](layer)
    train(layer, adam, range(2))
    before = adam.state()
    good = adam.state()
    name = "mean.0.weight"
    mean, large = good[name], np.full(good[name].shape, 1e300)
    bad = [
        (sgd.state(), ValueError, "state must hold the arrays of AdamW; missing: mean.0.bias, .*; unknown: velocity"),
        ({**good, name: mean[:1]}, ValueError, rf"{name} in state must have shape .* got \(1, 1, 3, 3\)"),
        ({**good, name: mean.tolist()}, TypeError, f"{name} in state must be a NumPy or CuPy array, got list"),
        ({**good, name: mean.astype(complex)}, TypeError, f"{name} in state must have dtype float64, .* got c"),
        ({**good, name: large}, ValueError, f"{name} in state must hold values that fit in float32, got 1e"),
        ({**good, "steps": np.array(1.5)}, TypeError, "steps in state must have an integer dtype, got float64"),
        ({**good, "steps": np.array(-1)}, ValueError, "steps in state must be >= 0, got -1"),
        ([1], TypeError, "state must be a dict of arrays, got list"),
    ]  # fmt: skip
    for state, error, message in bad:
        with pytest.raises(error, match=f"^AdamW: {message}"):
            adam.load_state(state)
        assert_same(adam.state(), before)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_optimisers_that_do_not_fit(tmp_path, suffix):
    layer, path = small(np.float32), tmp_path / f"network{suffix}"
    layers.save(layer, path)
    with pytest.raises(ValueError, match=r"load: .* must hold the state of an optimiser, got only that of a layer"):
        layers.load(layer, path, AdamW(layer))
    layers.save(layer, path, SGD(layer, 0.1))
    layer.params["0.weight"][...] = 7
    with pytest.raises(ValueError, match=r"AdamW: state must hold the arrays of AdamW; missing: mean"):
        layers.load(layer, path, AdamW(layer))
    assert (layer.params["0.weight"] == 7).all()
    for call in (layers.save, layers.load):
        with pytest.raises(ValueError, match=r"optimiser must be that of the layer, got that of another Linear"):
            call(layer, path, SGD(Linear(3, 2), 0.1))
        with pytest.raises(TypeError, match=r"optimiser must be one of pydeform.optim, got float"):
            call(layer, path, 0.1)


# Conversions ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_values_are_converted(tmp_path, suffix, saved, loaded):
    """Also from bfloat16, whose bytes mean other numbers in float16."""
    a, b = Linear(3, 2, rng=0, dtype=saved), Linear(3, 2, rng=1, dtype=loaded)
    layers.save(a, tmp_path / f"layer{suffix}")
    layers.load(b, tmp_path / f"layer{suffix}")
    np.testing.assert_array_equal(b.params["weight"], a.params["weight"].astype(loaded))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_values_that_do_not_fit_are_refused(tmp_path, suffix):
    a, b = Linear(3, 2, rng=0), Linear(3, 2, rng=1, dtype=np.float16)
    a.params["weight"][0, 0] = 1e6
    before = b.params["weight"].copy()
    layers.save(a, tmp_path / f"layer{suffix}")
    with pytest.raises(ValueError, match=r"load: weight in .* must hold values that fit in float16, got 1000000.0"):
        layers.load(b, tmp_path / f"layer{suffix}")
    np.testing.assert_array_equal(b.params["weight"], before)
    a.params["weight"][0, 0] = np.inf  # which it has
    layers.save(a, tmp_path / f"layer{suffix}")
    layers.load(b, tmp_path / f"layer{suffix}")
    assert b.params["weight"][0, 0] == np.inf


@pytest.mark.parametrize("dtype", [np.int64, complex, bool, "U3", "V4", object])
def test_files_of_other_dtypes_are_refused(tmp_path, dtype):
    layer = Linear(3, 2, rng=0)
    np.savez(tmp_path / "layer.npz", weight=np.zeros((2, 3), dtype), bias=np.zeros(2, np.float32))
    with pytest.raises(
        (TypeError, ValueError), match=r"^load: (weight in .* must have dtype float64|.* cannot be read)"
    ):
        layers.load(layer, tmp_path / "layer.npz")


# Broken files --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed", "garbage", "other"])
def test_broken_files_are_named(tmp_path, suffix, damage):
    layer, path = Linear(30, 20, rng=0), tmp_path / f"layer{suffix}"
    layers.save(layer, path)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    path.write_bytes({
        "empty": b"", "cut": content[: len(content) // 2], "zeroed": bytes(len(content)),
        "garbage": rng.bytes(len(content)), "other": b"\x93NUMPY" + content,
    }[damage])  # fmt: skip
    before = layer.params["weight"].copy()
    with pytest.raises(ValueError, match=rf"^load: .*layer\{suffix} cannot be read as a \{suffix} file: "):
        layers.load(layer, path)
    np.testing.assert_array_equal(layer.params["weight"], before)


def test_a_flipped_bit_is_noticed(tmp_path):
    layer, path = Linear(30, 20, rng=0), tmp_path / "layer.npz"
    layers.save(layer, path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("weight.npy").header_offset + 1000
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read as a \.npz file: Bad CRC-32"):
        layers.load(layer, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_files_that_are_not_there_say_so_themselves(tmp_path, suffix):
    with pytest.raises(FileNotFoundError):
        layers.load(Linear(3, 2), tmp_path / f"none{suffix}")
    with pytest.raises(FileNotFoundError):
        layers.save(Linear(3, 2), tmp_path / "none" / f"layer{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, suffix, monkeypatch):
    path = tmp_path / f"layer{suffix}"
    old = Linear(3, 2, rng=0)
    layers.save(old, path)
    monkeypatch.setattr(os, "fsync", lambda number: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        layers.save(Linear(3, 2, rng=1), path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    layers.load(loaded := Linear(3, 2), path)
    np.testing.assert_array_equal(loaded.params["weight"], old.params["weight"])


KILLED = """
import os, signal, sys
from pydeform import layers
os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)  # when all is written, but not yet in place
layers.save(layers.Linear(3, 2, rng=1), sys.argv[1])
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_writer_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"layer{suffix}"
    old = Linear(3, 2, rng=0)
    layers.save(old, path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    layers.load(loaded := Linear(3, 2), path)
    np.testing.assert_array_equal(loaded.params["weight"], old.params["weight"])


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    link = tmp_path / "latest.npz"
    link.symlink_to(tmp_path / "real" / "layer.npz")
    layers.save(Linear(3, 2, rng=0), link)
    assert link.is_symlink() and (tmp_path / "real" / "layer.npz").is_file()


@pytest.mark.parametrize("function", [layers.save, layers.load])
def test_what_is_no_layer(function, tmp_path):
    for layer, kind in (({}, "dict"), (None, "NoneType")):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}: layer must be a pydeform\.layers\.Layer, got {kind}"
        ):
            function(layer, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", [layers.Flatten, layers.GlobalAvgPool2d, layers.ReLU, layers.Sigmoid])
def test_layers_without_options_take_none(layer):
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        layer(1)
