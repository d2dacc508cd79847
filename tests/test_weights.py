"""Files of other systems, made here by those systems where they install, and whose names go where in our layers."""

import argparse
import collections
import io
import os
import pickle
import re
import struct
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from pydeform import weights
from pydeform.layers import BatchNorm2d, Conv2d, DCNv3, DCNv4, DeformConv2d, Linear, MSDeformAttn, ReLU, Sequential
from tests import test_house
from tests.conftest import assert_same_bits

try:
    import torch
except ImportError:
    torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed")
RNG = np.random.default_rng(0)
NUMPY_DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
                "uint16", "uint32", "uint64"]  # fmt: skip
TORCH_DTYPES = [*NUMPY_DTYPES, "complex64", "complex128", "float8_e4m3fn", "float8_e5m2"]
FORMATS = {"archive": True, "stream": False}  # of torch.save: its argument _use_new_zipfile_serialization


def numpy_dtype(name):
    return np.dtype(getattr(ml_dtypes, name, name))


def some(shape, dtype="float32"):
    if dtype == "bool":
        return RNG.random(shape) < 0.5
    return (RNG.standard_normal(shape) * 10).astype(numpy_dtype(dtype))


def refused(path, message):
    return pytest.raises(ValueError, match=f"^read: {re.escape(str(path))} cannot be read as a .* file: {message}")


# safetensors and .npz -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_read_plain_files(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    want = {f"layer.{dtype}": some((2, 3), dtype) for dtype in NUMPY_DTYPES}
    if suffix == ".npz":
        np.savez(path, **want)
    else:
        pytest.importorskip("safetensors.numpy").save_file(want, path)
    got = weights.read(path)
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert_same_bits(got[name], array)


def test_objects_in_npz_are_refused(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, weight=np.array([print], object))
    with refused(path, "Object arrays cannot be loaded when allow_pickle=False"):
        weights.read(path)


# torch.save -----------------------------------------------------------------------------------------------------------
@pytest.fixture(params=FORMATS)
def save(request, tmp_path):
    """torch.save in each of its formats, to a path that is returned."""

    def write(value, name="a.pth"):
        path = tmp_path / name
        torch.save(value, path, _use_new_zipfile_serialization=FORMATS[request.param])
        return path

    return write


@needs_torch
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_read_every_dtype_of_torch(save, dtype):
    array = some((2, 3, 4), dtype)
    kind = getattr(torch, dtype)
    tensor = torch.frombuffer(bytearray(array.tobytes()), dtype=kind).reshape(array.shape)
    (got,) = weights.read(save({"a": tensor})).values()
    assert_same_bits(got, array)
    assert got.flags.writeable and got.flags.aligned


@needs_torch
def test_read_the_state_dict_of_a_module(save):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Linear(2, 2).double())
    want = module.state_dict()
    got = weights.read(save(want, "a.bin"))
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert_same_bits(got[name], tensor.numpy())


@needs_torch
def test_read_views_and_shared_storages(save):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "base": base,
        "transposed": base.T,
        "part": base[1:3, ::2],
        "last": base[3, 5],
        "expanded": base[:1].expand(5, 6),
        "empty": base[4:],
        "parameter": torch.nn.Parameter(base[2]),
        "none": torch.zeros(0),
        "scalar": torch.tensor(3),
    }
    got = weights.read(save(tensors))
    assert list(got) == list(tensors)
    for name, tensor in tensors.items():
        assert_same_bits(got[name], tensor.detach().numpy())
    assert np.shares_memory(got["base"], got["transposed"])
    got["base"][0, 1] = -7
    assert got["transposed"][1, 0] == -7


@needs_torch
def test_read_a_checkpoint(save):
    """What trainings leave: options, numbers, an optimiser, beside the state dict."""
    module = torch.nn.Linear(2, 3)
    optimiser = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    checkpoint = {
        "model": module.state_dict(),
        "optimizer": optimiser.state_dict(),
        "args": argparse.Namespace(lr=1e-4, name="x"),
        "epoch": 3,
        "shapes": [torch.Size((1, 2))],
        "several": [torch.ones(2), torch.zeros(1)],
        "dtype": torch.float16,
    }
    got = weights.read(save(checkpoint, "a.pt"))
    assert list(got)[:2] == ["model.weight", "model.bias"] and list(got)[-2:] == ["several.0", "several.1"]
    assert_same_bits(got["model.weight"], module.weight.detach().numpy())
    assert_same_bits(got["optimizer.state.0.exp_avg"], optimiser.state_dict()["state"][0]["exp_avg"].numpy())


@needs_torch
def test_read_one_tensor(save):
    (item,) = weights.read(save(torch.ones(2))).items()
    assert item[0] == "" and item[1].tolist() == [1, 1]


@needs_torch
def test_what_is_no_plain_tensor_is_refused(save):
    path = save({"a": torch.eye(3).to_sparse()})
    with refused(path, r"it wants to import torch\._utils\._rebuild_sparse_tensor"):
        weights.read(path)
    path = save({"a": torch.zeros(3, dtype=torch.complex64).conj()})
    with refused(path, r"it holds a tensor that is conj: save tensor\.resolve_conj\(\)\.resolve_neg\(\)"):
        weights.read(path)
    path = save({"a": torch._neg_view(torch.ones(3))})
    with refused(path, "it holds a tensor that is neg"):
        weights.read(path)
    path = save(torch.nn.Linear(2, 2))
    with refused(path, r"it wants to import torch\.nn\.modules\.linear\.Linear, and only tensors are read"):
        weights.read(path)
    path = save({"a": {"b": torch.ones(1)}, "a.b": torch.ones(2)})
    with refused(path, r"it holds two arrays of the name a\.b"):
        weights.read(path)


@needs_torch
@pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning")
def test_programs_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), path)
    with refused(path, r"it is no archive of torch\.save \(one of torch\.jit\.save holds a program\)"):
        weights.read(path)


# Pickles that want something ------------------------------------------------------------------------------------------
class Wants:
    """Pickled as a call of a function with arguments."""

    def __init__(self, function, *arguments, state=None):
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.call


def written(path, pickled, storages=(), byteorder=b"little"):
    """An archive as torch writes it, of bytes that torch did not write."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        for key, content in enumerate(storages):
            archive.writestr(f"archive/data/{key}", content)
    return path


def in_stream(path, pickled):
    """The same before PyTorch 1.6; the pickle of tensors may be the first, or the fourth."""
    head = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
    path.write_bytes(b"".join(head) + pickled + pickle.dumps([], 2))
    return path


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("write", [written, in_stream, lambda path, pickled: path.write_bytes(pickled)],
                         ids=["archive", "stream", "first pickle"])  # fmt: skip
@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        (Wants(os.mkdir, "harm"), "(posix|nt).mkdir"),
        (Wants(eval, "__import__('os').mkdir('harm')"), r"(builtins|__builtin__)\.eval"),
        (Wants(getattr, os, "mkdir"), None),
        ({"weight": Wants(os.system, "mkdir harm")}, "(posix|nt).system"),
        (collections.OrderedDict(a=[(Wants(os.mkdir, "harm"),)]), "(posix|nt).mkdir"),
        (Wants(np.zeros, 3), "numpy.zeros"),
    ],
)
def test_a_malicious_pickle_runs_nothing(tmp_path, monkeypatch, write, wanted, name, protocol):
    monkeypatch.chdir(tmp_path)
    try:
        pickled = pickle.dumps(wanted, protocol)
    except TypeError:  # a module cannot be pickled: the case is written by hand
        pickled = b"cos\nmkdir\n(S'harm'\ntR."
        name = "os.mkdir"
    path = tmp_path / "a.pth"
    write(path, pickled)
    with refused(path, f"it wants to import {name}, and only tensors are read; nothing was imported or run"):
        weights.read(path)
    assert not (tmp_path / "harm").exists()


def test_the_pickles_above_would_do_harm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Wants(os.mkdir, "harm")))
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize("name", ["OrderedDict.fromkeys", "OrderedDict.__init__", "namedtuple"])
def test_not_even_parts_of_what_is_allowed(tmp_path, name):
    pickled = b"\x80\x04\x8c\x0bcollections" + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93."
    path = written(tmp_path / "a.pth", pickled)
    with refused(path, re.escape(f"it wants to import collections.{name}")):
        weights.read(path)


def test_a_pickle_changes_nothing_that_stays(tmp_path):
    """BUILD sets attributes of whatever there is: of what one file got, the next one gets none."""
    good = written(tmp_path / "good.pth", pickled_tensor(), [np.ones(4, np.float32).tobytes()])
    before = weights.read(good)["a"]
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n"
    bad = written(tmp_path / "bad.pth", b"\x80\x02" + rebuild + b"N}X\x0c\x00\x00\x00__defaults__(K\x01tss\x86b.")
    with pytest.raises(ValueError):
        weights.read(bad)
    slots = b"\x80\x02" + rebuild + b"N}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    assert weights.read(written(tmp_path / "slots.pth", slots)) == {}
    assert_same_bits(weights.read(good)["a"], before)


class Persistent:
    def __init__(self, pid):
        self.pid = pid


class Global:
    """Pickled as a name that need not exist here."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Rebuilt:
    """Pickled as a call of such a name."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.pid if isinstance(value, Persistent) else None

    def save(self, value, save_persistent_id=True):
        if isinstance(value, Global):
            self.write(f"c{value.module}\n{value.name}\n".encode())
        elif isinstance(value, Rebuilt):
            self.save(value.function)
            self.save(value.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(value, save_persistent_id)


def pickled_tensor(dtype="FloatStorage", offset=0, size=(4,), stride=(1,), key="0", pid=None, **more):
    """A dict {"a": tensor} as torch pickles it, with any numbers."""
    kind = Global("torch", dtype) if isinstance(dtype, str) else dtype[0]
    storage = Persistent(pid or ("storage", kind, key, "cpu", 4))
    function = Global("torch._utils", more.pop("function", "_rebuild_tensor_v2"))
    tensor = Rebuilt(function, storage, offset, size, stride, False, {}, *more.values())
    stream = io.BytesIO()
    Pickler(stream, 2).dump({"a": tensor})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (5,)}, r"it holds a tensor of size \(5,\) with strides \(1,\) that reaches beyond its storage"),
        ({"offset": 1}, r"it holds a tensor of size \(4,\) with strides \(1,\) that reaches beyond its storage"),
        ({"size": (2, 2), "stride": (3, 1)}, "it holds a tensor of size .* reaches beyond its storage"),
        ({"size": (2,), "stride": (10**18,)}, "it holds a tensor of size .* reaches beyond its storage"),
        ({"offset": -1}, r"it holds a tensor of size \(4,\) with strides \(1,\) at -1, which none can have"),
        ({"offset": 3, "stride": (-1,)}, "it holds a tensor of size .* which none can have"),
        ({"size": (-4,)}, "it holds a tensor of size .* which none can have"),
        ({"size": (2, 2)}, "it holds a tensor of size .* which none can have"),
        ({"key": "1"}, "\"There is no item named 'archive/data/1' in the archive"),
        ({"key": "../../../etc/passwd"}, '"There is no item named'),
        ({"dtype": ["O"]}, "it holds a tensor of the unknown dtype 'O'"),
        ({"dtype": ["float33"]}, "it holds a tensor of the unknown dtype 'float33'"),
        ({"dtype": "QUInt8Storage"}, r"it wants to import torch\.QUInt8Storage"),
        ({"pid": ("module", "x", 1, 2, 3)}, "it holds a module of a kind that is not known"),
        ({"pid": ("storage", "x", "0", "cpu", 3, ("0", 1, 2))}, "it holds a storage of a kind that is not known"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, changes, message):
    path = written(tmp_path / "a.pth", pickled_tensor(**changes), [bytes(16)])
    with refused(path, message):
        weights.read(path)


def test_the_tensor_above_can_be(tmp_path):
    path = written(tmp_path / "a.pth", pickled_tensor(), [np.arange(4, dtype=np.float32).tobytes()])
    assert weights.read(path)["a"].tolist() == [0, 1, 2, 3]
    huge = {"size": (2**40, 4), "stride": (0, 1)}  # as torch's, it takes no memory
    path = written(tmp_path / "b.pth", pickled_tensor(**huge), [bytes(16)])
    assert weights.read(path)["a"].shape == (2**40, 4)


def test_damaged_and_foreign_files(tmp_path):
    path = written(tmp_path / "a.pth", pickled_tensor(), [bytes(16)], byteorder=b"big")
    with refused(path, "it was written by a machine whose bytes have another order"):
        weights.read(path)
    path.write_bytes(b"no pickle at all")
    with refused(path, ""):
        weights.read(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with refused(path, r"it is no file of torch\.save"):
        weights.read(path)
    with tarfile.open(path, "w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    with refused(path, r"it is a tar archive, of PyTorch before 0\.2"):
        weights.read(path)
    recursive = {}
    recursive["a"] = recursive
    with refused(written(path, pickle.dumps(recursive)), "maximum recursion depth"):
        weights.read(path)
    with pytest.raises(FileNotFoundError):
        weights.read(tmp_path / "nowhere.pth")
    with pytest.raises(
        ValueError, match=r"^read: path must end in .npz, .safetensors, .pth, .pt, .bin or .params, got 'a.pkl'$"
    ):
        weights.read("a.pkl")


@needs_torch
def test_files_cut_short(save):
    path = save({"a": torch.ones(64), "b": torch.ones(64)})
    whole = path.read_bytes()
    for length in (0, 1, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with refused(path, "it is an archive whose end is missing" if whole[:length].startswith(b"PK") else ""):
            weights.read(path)


# MXNet ----------------------------------------------------------------------------------------------------------------
TYPE_FLAGS = {"float32": 0, "float64": 1, "float16": 2, "uint8": 3, "int32": 4, "int8": 5, "int64": 6, "bool": 7,
              "int16": 8, "uint16": 9, "uint32": 10, "uint64": 11, "bfloat16": 12}  # fmt: skip


def mxnet_array(array, version, device=(1, 0)):
    """As the format's page says, but for sparse arrays."""
    if version == 0:
        head = struct.pack("<I", array.ndim) + b"".join(struct.pack("<I", n) for n in array.shape)
    else:
        head = {1: b"\xc8\xfa\x93\xf9", 2: b"\xc9\xfa\x93\xf9", 3: b"\xca\xfa\x93\xf9"}[version]
        head += struct.pack("<i", 0) if version > 1 else b""
        head += struct.pack("<i", array.ndim) + b"".join(struct.pack("<q", n) for n in array.shape)
    return head + struct.pack("<iii", *device, TYPE_FLAGS[array.dtype.name]) + array.tobytes()


def mxnet_file(arrays, names, magic=0x112):
    """`arrays` as bytes."""
    texts = [struct.pack("<Q", len(name.encode())) + name.encode() for name in names]
    parts = [struct.pack("<QQQ", magic, 0, len(arrays)), *arrays, struct.pack("<Q", len(names)), *texts]
    return b"".join(parts)


@pytest.mark.parametrize("version", range(4))
def test_read_mxnet(tmp_path, version):
    path = tmp_path / "a.params"
    want = {f"layer_{dtype}": some((2, 3, 1), dtype) for dtype in TYPE_FLAGS}
    if version == 3:
        want["scalar"] = np.float32(2.5).reshape(())
    path.write_bytes(mxnet_file([mxnet_array(array, version, (2, 3)) for array in want.values()], want))
    got = weights.read(path)
    assert list(got) == list(want)
    for name, array in want.items():
        assert_same_bits(got[name], array)
        assert got[name].flags.writeable


def test_names_of_mxnet(tmp_path):
    path = tmp_path / "a.params"
    arrays = [mxnet_array(some((n + 1,)), 2) for n in range(3)]
    path.write_bytes(mxnet_file(arrays, ["arg:conv_weight", "aux:bn_moving_mean", "é"]))
    assert {name: array.shape for name, array in weights.read(path).items()} == {
        "conv_weight": (1,), "bn_moving_mean": (2,), "é": (3,)
    }  # fmt: skip
    path.write_bytes(mxnet_file(arrays, []))
    assert list(weights.read(path)) == ["0", "1", "2"]


def test_params_of_mxnet_2_are_npz(tmp_path):
    path = tmp_path / "a.params"
    with open(path, "wb") as file:
        np.savez(file, weight=np.ones(3, np.float32))
    assert weights.read(path)["weight"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it ends where 16 bytes should follow"),
        (mxnet_file([], [], magic=0x113), "it is not a file of MXNet"),
        (mxnet_file([b"\xc9\xfa\x93\xf9" + struct.pack("<i", 1)], ["a"]), "it holds a sparse array"),
        (mxnet_file([b"\xc9\xfa\x93\xf9" + struct.pack("<ii", 0, 0)], ["a"]), "it holds an array that has not been"),
        (mxnet_file([b"\xca\xfa\x93\xf9" + struct.pack("<ii", 0, -1)], ["a"]), "it holds an array that has not been"),
        (mxnet_file([b"\xca\xfa\x93\xf9" + struct.pack("<iiq", 0, 1, -1)], ["a"]), "it holds an array that has not"),
        (mxnet_file([struct.pack("<I", 33)], ["a"]), "it holds an array with 33 axes"),
        (mxnet_file([struct.pack("<IIiii", 1, 1, 1, 0, 99)], ["a"]), "it holds an array whose dtype has the unknown"),
        (mxnet_file([struct.pack("<IIiii", 1, 2**31, 1, 0, 0)], []), "it ends where 8589934592 bytes should follow"),
        (mxnet_file([mxnet_array(np.ones(1), 2)], ["a", "b"]), "it holds 1 arrays and 2 names"),
        (mxnet_file([mxnet_array(np.ones(1), 2)] * 2, ["arg:a", "aux:a"]), "it holds two arrays of one name"),
        (struct.pack("<QQQ", 0x112, 0, 2**60), "it cannot hold 1152921504606846976 of what it says"),
        (mxnet_file([mxnet_array(np.ones(4), 2)], ["abcdef"])[:-1], "it ends where 6 bytes should follow"),
    ],
)
def test_files_that_are_not_mxnets(tmp_path, content, message):
    path = tmp_path / "a.params"
    path.write_bytes(content)
    with refused(path, message):
        weights.read(path)


# Whose names go where -------------------------------------------------------------------------------------------------
def deformable(**options):
    return DeformConv2d(4, 6, 3, modulated=True, offset_groups=2, rng=0, **options)


def arrays_like(layer):
    return {name: some(param.shape) for name, param in {**layer.params, **layer.state}.items()}


def renamed(arrays, prefix, changes):
    return {prefix + changes.get(name, name): array for name, array in arrays.items()}


def assert_loaded(layer, arrays):
    for name, param in {**layer.params, **layer.state}.items():
        np.testing.assert_array_equal(param, arrays[name])


@pytest.mark.parametrize(
    ("prefix", "offset"),
    [
        ("", "offset."),
        ("backbone.layer3.0.conv2.", "backbone.layer3.0.conv2.conv_offset."),  # mmcv
        ("layer3.0.conv2.", "layer3.0.conv2_offset."),  # Detectron2, mmcv of old
        ("dla.", "dla.conv_offset_mask."),  # CharlesShang's
        ("res5a_branch2b_", "res5a_branch2b_offset_"),  # MXNet's symbols
        ("features.3.", "features.3.offset_"),  # Gluon
    ],
)
def test_names_of_deformable_convolutions(prefix, offset):
    layer = deformable()
    arrays = arrays_like(layer)
    theirs = {prefix + name: arrays[name] for name in ("weight", "bias")}
    if prefix == "features.3.":
        theirs = {f"{prefix}deformable_conv_{name}": arrays[name] for name in ("weight", "bias")}
    theirs |= {offset + name: arrays[f"offset.{name}"] for name in ("weight", "bias")}
    theirs["elsewhere.weight"] = np.ones(1)
    if not prefix:
        del theirs["elsewhere.weight"]
    held = layer.params["weight"]
    weights.load(layer, theirs, prefix)
    assert_loaded(layer, arrays)
    assert layer.params["weight"] is held


def test_names_that_the_caller_gives():
    layer = deformable()
    arrays = arrays_like(layer)
    theirs = {"conv.weight": arrays["weight"], "conv.bias": arrays["bias"]}
    theirs |= {"moves.weight": arrays["offset.weight"], "moves.bias": arrays["offset.bias"]}
    with pytest.raises(
        ValueError,
        match=r"^load: weights under 'conv\.' must hold the arrays of DeformConv2d; "
        r"missing: offset\.bias, offset\.weight; unknown: none$",
    ):
        weights.load(layer, theirs, "conv.")
    weights.load(layer, theirs, "conv.", names={"offset": "moves"})
    assert_loaded(layer, arrays)
    with pytest.raises(ValueError, match=r"^load: names must name parts of DeformConv2d, got offsets$"):
        weights.load(layer, theirs, "conv.", names={"offsets": "moves"})


@pytest.mark.parametrize("changes", [{}, {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean",
                                          "running_var": "moving_var"}])  # fmt: skip
def test_names_of_normalisations(changes):
    layer = BatchNorm2d(3)
    arrays = arrays_like(layer)
    theirs = renamed(arrays, "bn1_" if changes else "bn1.", changes)
    if not changes:
        theirs["bn1.num_batches_tracked"] = np.array(7)
    weights.load(layer, theirs, "bn1_" if changes else "bn1.")
    assert_loaded(layer, arrays)


@pytest.mark.parametrize(
    "layer",
    [
        DCNv3(8, groups=2, rng=0),
        DCNv4(8, groups=2, dw_kernel_size=3, rng=0),
        MSDeformAttn(8, 2, 2, 3, rng=0),
        MSDeformAttn(8, 2, 2, (3, 1), projections=False, rng=0),
    ],
    ids=["DCNv3", "DCNv4", "MSDeformAttn", "D-FINE"],
)
def test_layers_that_have_the_names_of_their_modules(layer):
    arrays = arrays_like(layer)
    theirs = renamed(arrays, "levels.0.blocks.1.dcn.", {})
    theirs["levels.0.blocks.1.dcn.num_points_scale"] = np.ones(3)  # of D-FINE
    weights.load(layer, theirs, "levels.0.blocks.1.dcn.")
    assert_loaded(layer, arrays)


@needs_torch
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_network_of_torch(tmp_path, suffix):
    """Through a file, and it computes the same."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3, stride=2), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Conv2d(4, 2, 1)
    )
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.copy_(tensor + torch.rand(tensor.shape))
    layer = Sequential(Conv2d(3, 4, 3, stride=2, rng=0), BatchNorm2d(4), ReLU(), Conv2d(4, 2, 1, rng=0))
    path = tmp_path / f"network{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": module.state_dict()}, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(
            {f"state_dict.{name}": tensor for name, tensor in module.state_dict().items()}, path
        )
    weights.load(layer, weights.read(path), "state_dict.")
    x = some((2, 3, 9, 8))
    y, _ = layer(x, train=False)
    np.testing.assert_allclose(y, module.eval()(torch.tensor(x)).detach(), rtol=1e-5, atol=1e-5)


@needs_torch
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_tensors_are_taken_and_converted(dtype):
    module = torch.nn.Linear(3, 2).to(getattr(torch, dtype))
    layer = Linear(3, 2, rng=0)
    weights.load(layer, module.state_dict())
    np.testing.assert_array_equal(layer.params["weight"], module.weight.detach().float().numpy())
    assert not np.shares_memory(layer.params["weight"], module.weight.detach().float().numpy())


@needs_torch
@pytest.mark.parametrize("name", ["deformable_detr", "rt_detr_v2", "d_fine"])
def test_models_of_transformers(tmp_path, name):
    """State dicts with their buffers, from files."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.test_models import attention_of, randomised

    module, layer = attention_of(name)
    state = randomised(module).state_dict()
    torch.save({"model": {f"decoder.0.{key}": tensor for key, tensor in state.items()}}, tmp_path / "a.pth")
    weights.load(layer, weights.read(tmp_path / "a.pth"), "model.decoder.0.")
    for key, param in layer.params.items():
        np.testing.assert_array_equal(param, state[key])


def test_what_does_not_fit_changes_nothing():
    layer = deformable()
    arrays = arrays_like(layer)
    before = {name: param.copy() for name, param in layer.params.items()}
    for changes, error, message in [
        ({"weight": some((6, 4, 3, 2))}, ValueError, r"weight in weights must have shape \(6, 4, 3, 3\), got"),
        ({"other": some(3)}, ValueError, "missing: none; unknown: other"),
        ({"bias": None}, TypeError, "bias in weights must be"),
        ({"bias": np.arange(6)}, TypeError, "bias in weights must have dtype float64, .*, got int64"),
        ({"bias": np.full(6, 1e300)}, ValueError, "bias in weights must hold values that fit in float32, got 1e"),
        ({"bias": [1.0] * 6}, TypeError, r"bias must be an array \(NumPy, CuPy, or one with __dlpack__\), got list"),
        ({"conv_offset.bias": arrays["offset.bias"]}, ValueError, r"missing: none; unknown: conv_offset\.bias"),
    ]:
        with pytest.raises(error, match=f"^load: .*{message}"):
            weights.load(layer, {**arrays, **changes})
        assert_loaded(layer, before)
    with pytest.raises(TypeError, match=r"^load: layer must be a Layer, got dict$"):
        weights.load({}, arrays)
    with pytest.raises(TypeError, match=r"^load: weights must be a dict of arrays, as `read` returns it, got str$"):
        weights.load(layer, "a.pth")


def test_halves_and_devices(backend):
    layer = deformable(dtype=ml_dtypes.bfloat16)
    if not backend.on_cpu:
        layer.to("cuda")
    arrays = {name: some(param.shape) for name, param in layer.params.items()}
    weights.load(layer, arrays)
    for name, param in layer.params.items():
        np.testing.assert_array_equal(backend.numpy(param), arrays[name].astype(ml_dtypes.bfloat16))


def test_the_page_runs(tmp_path):
    test_house.test_snippets_run("docs/bridges/weights.md", tmp_path)
