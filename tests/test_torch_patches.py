"""Libraries with our operators in them: the same results and gradients, and afterwards everything is as it was."""

import importlib
import importlib.resources
import sys
import threading
import types

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
import pydeform.torch as bridge  # noqa: E402
from pydeform.torch import patch_torchvision, patch_transformers  # noqa: E402
from tests import test_models  # noqa: E402


@pytest.fixture
def calls(monkeypatch):
    """How often each of our operators is called, by name."""
    found = {}

    def counting(name, function):
        def counted(*arguments, **keywords):
            found[name] = found.get(name, 0) + 1
            return function(*arguments, **keywords)

        return counted

    for name in ("ms_deform_attn", "deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool"):
        monkeypatch.setattr(bridge, name, counting(name, getattr(bridge, name)))
    return found


# transformers ---------------------------------------------------------------------------------------------------------
@pytest.fixture
def _transformers():
    """Not when tests are collected: it takes seconds to import."""
    pytest.importorskip("transformers", reason="transformers is not installed")


def some(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator)


def d_fine(points):
    """With other numbers of points in each level."""
    config = test_models.d_fine()
    config.decoder_n_points = points
    return config


@pytest.mark.usefixtures("_transformers")
@pytest.mark.parametrize(
    ("name", "config", "head", "expected"),
    [
        ("deformable_detr", test_models.deformable_detr, "DeformableDetrForObjectDetection", 4),
        ("rt_detr_v2", lambda: test_models.rt_detr_v2("discrete"), "RTDetrV2ForObjectDetection", 2),
        ("d_fine", lambda: d_fine([4, 2, 3]), "DFineForObjectDetection", 2),
    ],
)
def test_detectors(calls, name, config, head, expected):
    theirs = test_models.modeling(name)
    torch.manual_seed(0)
    model = test_models.randomised(test_models.of_transformers(head)(config())).eval()
    before = {key: dict(vars(value)) if isinstance(value, type) else value for key, value in vars(theirs).items()}
    pixels, mask = some(2, 3, 128, 160), torch.ones(2, 128, 160, dtype=torch.int64)
    mask[1, :, 130:] = 0
    want, want_grads = test_models.run(model, pixels, mask)
    assert not calls
    with patch_transformers():
        got, got_grads = test_models.run(model, pixels, mask)
    assert calls == {"ms_deform_attn": expected}
    test_models.close(got, want, 1e-4, want)
    test_models.close(got_grads, want_grads, 1e-4, [])
    after = {key: dict(vars(value)) if isinstance(value, type) else value for key, value in vars(theirs).items()}
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert after[key] == value if isinstance(value, dict) else after[key] is value, key
    again, _ = test_models.run(model, pixels, mask)
    assert calls == {"ms_deform_attn": expected}
    assert all(torch.equal(again[key], want[key]) for key in want)


ATTENTION_CLASSES = ("rt_detr", "grounding_dino", "mm_grounding_dino", "omdet_turbo", "lw_detr", "rf_detr")
ATTENTION_FUNCTIONS = ("mask2former", "oneformer")
SHAPES = [(4, 5), (2, 3)]


@pytest.mark.usefixtures("_transformers")
@pytest.mark.parametrize("name", [*ATTENTION_CLASSES, *ATTENTION_FUNCTIONS])
def test_attention_of_other_models(calls, name):
    """Their attention alone, called as they call it."""
    theirs = test_models.modeling(name)
    value, locations, weights = some(2, 26, 2, 8), some(2, 7, 2, 2, 3, 2) / 4 + 0.5, some(2, 7, 2, 2, 3).softmax(-1)
    arrays = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    sizes, starts = torch.tensor(SHAPES), torch.tensor([0, 20])

    def attend():
        for tensor in arrays:
            tensor.grad = None
        if name in ATTENTION_FUNCTIONS:
            y = theirs.multi_scale_deformable_attention(value, sizes, locations, weights)
        else:
            y = theirs.MultiScaleDeformableAttention()(value, sizes, SHAPES, starts, locations, weights, 64)
        (y * some(*y.shape)).sum().backward()
        return [y.detach(), *(tensor.grad for tensor in arrays)]

    want = attend()
    with patch_transformers():
        got = attend()
    assert calls == {"ms_deform_attn": 1}
    for ours, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_transformers")
def test_every_model_with_deformable_attention_is_found():
    """Files of transformers that speak of it; one that has it in a new form would fail here."""
    import transformers

    folder = importlib.resources.files(transformers) / "models"
    names = []
    for place in folder.iterdir():
        source = place / f"modeling_{place.name}.py"
        if source.is_file() and "nn.functional.grid_sample(" in (text := source.read_text("utf-8")):
            if "deformable_attention" in text.lower().replace("multiscaledeformable", "deformable_"):
                names.append(place.name)
    assert len(names) > 10
    modules = [test_models.modeling(name) for name in names]
    with patch_transformers():
        for module in modules:
            held = vars(module)
            changed = [
                function
                for function in (
                    held.get("multi_scale_deformable_attention"),
                    held.get("multi_scale_deformable_attention_v2"),
                    getattr(held.get("MultiScaleDeformableAttention"), "forward", None),
                )
                if function is not None
            ]
            assert changed and all(f.__module__ == "pydeform.torch.patches" for f in changed), module.__name__


@pytest.mark.usefixtures("_transformers")
def test_models_made_in_a_block(calls):
    """D-FINE's modules hold the function that they were made with: theirs, also after the block."""
    config, theirs = test_models.d_fine(), test_models.modeling("d_fine")
    original = theirs.multi_scale_deformable_attention_v2
    before = theirs.DFineMultiscaleDeformableAttention(config)
    with patch_transformers():
        module = theirs.DFineMultiscaleDeformableAttention(config)
        assert module.ms_deformable_attn_core is before.ms_deformable_attn_core is not original
    assert before.ms_deformable_attn_core is original
    del module


@pytest.mark.usefixtures("_transformers")
def test_no_model_is_imported(monkeypatch):
    importlib.import_module("transformers")
    for name in [name for name in sys.modules if name.startswith("transformers.models.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(
        RuntimeError, match=r"^patch_transformers: a model with deformable attention must be made before"
    ):
        with patch_transformers():
            pass


# torchvision, or what has its structure -------------------------------------------------------------------------------
NAMES = ("deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
MODULES = {"deform_conv2d": "deform_conv"}  # others have the operator's name


@pytest.fixture
def library(monkeypatch):
    """A package with torchvision's modules and names, whose functions say which they are."""
    made = {name: types.ModuleType(name) for name in ("torchvision", "torchvision.ops", "torchvision.ops.poolers")}
    for name in NAMES:
        function = types.FunctionType((lambda *_: "theirs").__code__, {}, name)
        module = types.ModuleType(f"torchvision.ops.{MODULES.get(name, name)}")
        setattr(module, name, function)
        setattr(made["torchvision.ops"], name, function)
        made[module.__name__] = module
    made["torchvision"].ops = made["torchvision.ops"]
    made["torchvision.ops.poolers"].roi_align = made["torchvision.ops"].roi_align
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return made


def functions_of(library):
    return {(module, name): value for module, held in library.items() for name, value in vars(held).items()
            if name in NAMES}  # fmt: skip


def test_torchvision(library):
    before = functions_of(library)
    assert len(before) == 11
    with patch_torchvision():
        inside = functions_of(library)
        for (_, name), function in inside.items():
            assert function is getattr(bridge, name)
    assert functions_of(library) == before
    with pytest.raises(KeyError, match="of the block"):
        with patch_torchvision():
            raise KeyError("of the block")
    assert functions_of(library) == before


def test_nested_blocks(library):
    before = functions_of(library)
    with patch_torchvision():
        with patch_torchvision():
            pass
        assert library["torchvision.ops"].roi_align is bridge.roi_align
    assert functions_of(library) == before


def test_blocks_of_two_threads_that_overlap(library):
    before = functions_of(library)
    entered, leave = threading.Event(), threading.Event()

    def other():
        with patch_torchvision():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with patch_torchvision():
        thread.start()
        assert entered.wait(60)
    assert library["torchvision.ops"].roi_pool is bridge.roi_pool  # the other block is open
    leave.set()
    thread.join()
    assert functions_of(library) == before


def test_missing_libraries(monkeypatch):
    for name, patch in (("torchvision", patch_torchvision), ("transformers", patch_transformers)):
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=f"^{patch.__name__}: {name} cannot be imported: "):
            with patch():
                pass


def test_the_real_torchvision(calls):
    """Where it installs beside this PyTorch."""
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    image, boxes = some(2, 12, 9, 8).requires_grad_(), torch.tensor([[0, 1, 2, 9.5, 12], [1, 3, 3, 14, 15]])
    offset, weight = some(2, 18, 7, 6).requires_grad_(), some(4, 12, 3, 3).requires_grad_()
    ops = torchvision.ops
    modules = [
        lambda: ops.RoIAlign((3, 2), 0.5, 2, True)(image, boxes),
        lambda: ops.RoIPool((3, 2), 0.5)(image, boxes),
        lambda: ops.PSRoIAlign((3, 2), 0.5, 2)(image, boxes),
        lambda: ops.PSRoIPool((3, 2), 0.5)(image, boxes),
        lambda: ops.deform_conv2d(image, offset, weight, mask=some(2, 9, 7, 6).sigmoid()),
        lambda: ops.MultiScaleRoIAlign(["0"], 3, 2)({"0": image}, [boxes[:1, 1:], boxes[1:, 1:]], [(18, 16)] * 2),
    ]
    if not torchvision.extension._has_ops():  # a build for another PyTorch: of its operators, this is what Python has
        modules = [modules[0], modules[5]]

    def run(call):
        for tensor in (image, offset, weight):
            tensor.grad = None
        y = call()
        (y * some(*y.shape)).sum().backward()
        return [y.detach(), *[tensor.grad for tensor in (image, offset, weight) if tensor.grad is not None]]

    for call in modules:
        want = run(call)
        calls.clear()
        with patch_torchvision():
            got = run(call)
        assert len(calls) == 1
        for ours, expected in zip(got, want, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
