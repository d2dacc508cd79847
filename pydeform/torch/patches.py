"""Our operators under other libraries, for the time of a with-block."""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

from torch import nn

ours: Any = sys.modules["pydeform.torch"]  # which imports this module first, and has the operators when they are called
ABSENT = object()
OF_TORCHVISION = ("deform_conv2d", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")


class Change(NamedTuple):
    """An attribute of a module or class, and what it becomes."""

    owner: Any
    name: str
    new: Any


class _Blocks:
    """What is changed as long as a block is open, in any thread. Blocks may be nested, and end in any order."""

    def __init__(self, find: Callable[[], list[Change]]) -> None:
        self._find, self._lock, self._open = find, threading.Lock(), 0
        self._before: dict[tuple[int, str], Change] = {}

    @contextlib.contextmanager
    def block(self) -> Iterator[None]:
        with self._lock:
            for change in self._find():  # also what has been imported since the block around this one
                owner, name, new = change
                self._before.setdefault((id(owner), name), Change(owner, name, vars(owner).get(name, ABSENT)))
                setattr(owner, name, new)
            self._open += 1
        try:
            yield
        finally:
            with self._lock:
                self._open -= 1
                if not self._open:
                    for owner, name, old in self._before.values():
                        if old is ABSENT:
                            delattr(owner, name)
                        else:
                            setattr(owner, name, old)
                    self._before.clear()


def patch_torchvision() -> contextlib.AbstractContextManager[None]:
    """A block in which torchvision's deform_conv2d, roi_align, roi_pool, ps_roi_align and ps_roi_pool are ours.

    They are so wherever torchvision's modules hold them, so in its detectors too. What another module has imported by
    name before stays what it was. Blocks may be nested; with the last one everything is as before.

        with patch_torchvision():
            loss = model(images, targets)

    Raises
    ------
    ImportError
        torchvision cannot be imported.
    """
    return _TORCHVISION.block()


def patch_transformers() -> contextlib.AbstractContextManager[None]:
    """A block in which the deformable attention of all models of transformers that have one is ours.

    That is Deformable-DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, RF-DETR, LW-DETR, GroundingDINO, OmDet-Turbo,
    Mask2Former, OneFormer and others: of every model whose module has been imported when the block begins, by making a
    model for example. Blocks may be nested; with the last one everything is as before.

        with patch_transformers():
            outputs = model(pixel_values)

    Raises
    ------
    ImportError
        transformers cannot be imported.
    RuntimeError
        No such model has been imported.
    """
    return _TRANSFORMERS.block()


def _in_torchvision() -> list[Change]:
    operators = _imported("patch_torchvision", "torchvision.ops")
    names = {id(getattr(operators, name)): name for name in OF_TORCHVISION}
    return [
        Change(module, attribute, getattr(ours, names[id(value)]))
        for module in _modules("torchvision")
        for attribute, value in vars(module).items()
        if id(value) in names
    ]


def _in_transformers() -> list[Change]:
    _imported("patch_transformers", "transformers")
    changes = []
    for module in _modules("transformers.models"):
        held = vars(module)
        if "multi_scale_deformable_attention" in held:
            changes.append(Change(module, "multi_scale_deformable_attention", _attention))
        if isinstance(held.get("MultiScaleDeformableAttention"), type):
            changes.append(Change(held["MultiScaleDeformableAttention"], "forward", _forward))
        if "multi_scale_deformable_attention_v2" in held:
            changes.append(Change(module, "multi_scale_deformable_attention_v2", _attention_v2))
            own = [kind for kind in held.values() if isinstance(kind, type) and kind.__module__ == module.__name__]
            changes += [Change(kind, CORE, _CORE) for kind in own if issubclass(kind, nn.Module)]
    if not changes:
        raise RuntimeError(
            "patch_transformers: a model with deformable attention must be made before the block, none is imported yet"
        )
    return changes


def _modules(package: str) -> list[ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return [module for name in names if isinstance(module := sys.modules.get(name), ModuleType)]


def _imported(op: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{op}: {name.partition('.')[0]} cannot be imported: {error}") from error


# Deformable attention as models of transformers call it ---------------------------------------------------------------
def _attention(value: Any, value_spatial_shapes: Any, sampling_locations: Any, attention_weights: Any) -> Any:
    return ours.ms_deform_attn(value, value_spatial_shapes, sampling_locations, attention_weights)


def _forward(
    _module: Any,
    value: Any,
    value_spatial_shapes: Any,  # noqa: ARG001
    value_spatial_shapes_list: Any,
    level_start_index: Any,  # noqa: ARG001
    sampling_locations: Any,
    attention_weights: Any,
    im2col_step: Any,  # noqa: ARG001
) -> Any:
    # The list needs no waiting for a device.
    return ours.ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)


def _attention_v2(
    value: Any,
    value_spatial_shapes: Any,
    sampling_locations: Any,
    attention_weights: Any,
    num_points_list: Any,
    method: str = "default",
) -> Any:
    is_discrete = method == "discrete"
    return ours.ms_deform_attn(
        value,
        value_spatial_shapes,
        sampling_locations.detach() if is_discrete else sampling_locations,  # no gradient is not a gradient of zeros
        attention_weights,
        points=num_points_list,
        method="discrete" if is_discrete else "bilinear",
    )


# D-FINE's modules hold the function. A property of their class comes before what they hold, and lets them hold it.
CORE = "ms_deformable_attn_core"
_CORE = property(lambda _: _attention_v2, lambda module, function: vars(module).update({CORE: function}))

_TORCHVISION, _TRANSFORMERS = _Blocks(_in_torchvision), _Blocks(_in_transformers)
