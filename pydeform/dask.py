"""Operators on dask arrays: every function of `pydeform` that has a backward, and its backward, under its own name.

Arrays are dask's or NumPy's, results are dask's, and nothing is computed until they are. Work is divided along the axes
that results are apart on: images or boxes, and queries of attention; other axes become one chunk. The gradient of an
array that several parts of a result need is a sum over these parts, each rounded to its dtype, in float32 at least, by
a tree whose form follows from the chunks alone: for given chunks it has the same bits, whatever computes it and in
whatever order.

Convolutions, `dcnv3`, `dcnv4` and `warp` also divide images. Where samples are moved, `max_offset` says by how many
pixels of the input at most, along any axis. Tasks read that much around what they compute, and one that meets a longer
finite offset raises a ValueError that names its block. The rest is as in `pydeform.tiling`.

>>> import dask.array as da
>>> import numpy as np
>>> import pydeform.dask
>>> images, weight = da.ones((4, 2, 32, 32), chunks=(2, 2, 16, 16)), np.ones((3, 2, 3, 3))
>>> offset = da.full((4, 18, 32, 32), 0.5, chunks=(2, 18, 16, 16))
>>> y = pydeform.dask.deform_conv2d(images, offset, weight, padding=1, max_offset=1)
>>> y.chunks
((2, 2), (3,), (16, 16), (16, 16))
>>> float(y[0, 0, 5, 5].compute())
18.0
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from pydeform import tiling
from pydeform._arrays import wide_dtype
from pydeform._operators import Operator, operators
from pydeform.tiling import Tile

Labels = tuple[str, ...]  # of an array's axes, as `dask.array.blockwise` has them
SPLIT_EVERY = 2  # arrays that a step of a tree adds
# Of one image, results of other queries need nothing but the first array in common.
WITH_QUERIES = ("ms_deform_attn", "ms_deform_attn_fused", "deform_aggregation")


def _apart(operator: Operator, key: str) -> Labels:
    """First axes of an array, that divide it as they divide results: "batch", which may be boxes, and "query"."""
    if key in operator.shared:
        return ()
    return ("batch", "query") if operator.name in WITH_QUERIES and key != operator.arrays[0] else ("batch",)


def _labels(operator: Operator, key: str, ndim: int) -> Labels:
    own = _apart(operator, key)
    return own + tuple(f"{key} {axis}" for axis in range(len(own), ndim))


class _Call:
    """One call: its arrays as dask's, checked against each other, and how images are divided."""

    def __init__(self, operator: Operator, op: str, given: dict[str, Any]):
        self.operator, self.op = operator, op
        self.max_offset = given.pop("max_offset", None)
        names = [key for key in ("grad_output", *operator.arrays) if key in given]
        self.arrays = {key: _as_dask(op, key, given.pop(key)) for key in names}
        self.options = given
        nothing, options = operator.without_batch(op, self.arrays, given)
        is_backward = "grad_output" in self.arrays
        self.empty = (operator.backward if is_backward else operator.forward)(**nothing, **options)
        self.of_forward = {key: self.arrays[key] for key in operator.arrays}
        self.out = tuple(operator.result_shape(self.of_forward, {key: given[key] for key in operator.options}))
        self.tiles = self._tiles() if operator.name in tiling.TILED else np.full((1,), None)

    def _tiles(self) -> Any:
        """An array of `Tile`, or of None where an image is one."""
        whole = np.full((1,) * (len(self.out) - 2), None)
        of_image = self.operator.of_image
        of_images = {key: a for key, a in self.arrays.items() if a is not None and key not in self.operator.shared}
        divided = [key for key, a in of_images.items() if math.prod(of_image(a.numblocks)) != 1]
        if self.max_offset is None:
            if divided and tiling.moved_by(self.operator):
                raise ValueError(
                    f"{self.op}: {divided[0]} must have one chunk along the axes of an image where max_offset is not "
                    f"stated, got chunks {of_image(self.arrays[divided[0]].chunks)}"
                )
            if not divided:
                return whole
        options = {key: self.options[key] for key in self.operator.options}
        plan = tiling.plan(self.operator, self.op, self.of_forward, options, self.max_offset)
        edges = [_slices(sizes) for sizes in self._chunks_of_images(of_images, plan)]
        tiles = np.full(tuple(map(len, edges)), None)
        for index in np.ndindex(tiles.shape):
            tiles[index] = plan.tile(tuple(parts[i] for parts, i in zip(edges, index, strict=True)))
        return tiles

    def _chunks_of_images(self, arrays: dict[str, Any], plan: tiling.Plan) -> Sequence[tuple[int, ...]]:
        """Of the result: those of the array of its size that has most, or else where the input's come out."""
        of_image = self.operator.of_image
        of_result = [of_image(array.chunks) for key, array in arrays.items() if key != "input"]
        most = max(of_result, key=lambda chunks: math.prod(map(len, chunks)), default=())
        if math.prod(map(len, most)) > 1:
            return most
        chunks = []
        for sizes, out, stride in zip(of_image(arrays["input"].chunks), plan.out, plan.stride, strict=True):
            edges = sorted({min(edge // stride, out) for edge in (0, *itertools.accumulate(sizes[:-1]))} | {out})
            chunks.append(tuple(b - a for a, b in itertools.pairwise(edges)))
        return chunks

    def compute(self, tile: Tile | None) -> Any:
        """A dask array with a block for each chunk of images or boxes, and queries: what the operator gives there."""
        parts = {key: self._part(key, array, tile) for key, array in self.arrays.items() if array is not None}
        pairs = [item for key, part in parts.items() for item in (part, _labels(self.operator, key, part.ndim))]
        divided = _apart(self.operator, "grad_output")
        function = functools.partial(
            _compute, self.operator.name, self.op, tuple(parts), self.options, tile, self.max_offset
        )
        like = self.arrays[self.operator.arrays[0]]
        meta = da.utils.meta_from_array(like, len(divided), dtype=like.dtype)
        return da.blockwise(function, divided, *pairs, meta=meta, token=self.op)

    def _part(self, key: str, array: Any, tile: Tile | None) -> Any:
        """What a tile needs, in one chunk along axes that are not divided."""
        if tile is not None and key not in self.operator.shared:
            array = array[tiling.index(self.operator, tile.part_of(key))]
        return array.rechunk(dict.fromkeys(range(len(_apart(self.operator, key)), array.ndim), -1))


def _as_dask(op: str, key: str, array: Any) -> Any:
    if array is None:
        return None
    if isinstance(array, np.ndarray):
        return da.from_array(array, chunks=-1)
    if not isinstance(array, da.Array):
        raise TypeError(
            f"{op}: {key} must be a dask or NumPy array, got {type(array).__module__}.{type(array).__name__}"
        )
    if any(math.isnan(size) for size in array.shape):
        raise ValueError(f"{op}: {key} must have a known shape, got {array.shape}: call its compute_chunk_sizes()")
    return array


def _slices(sizes: Iterable[int]) -> list[slice]:
    edges = [0, *itertools.accumulate(sizes)]
    return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]  # a filter may have left a chunk empty


def _sizes(parts: Iterable[slice]) -> list[int]:
    return [part.stop - part.start for part in parts]


def _only(block: Any) -> Any:
    """The array in the nested lists that stand for axes that a result does not have."""
    while isinstance(block, list):
        (block,) = block
    return block


def _compute(
    name: str, op: str, keys: tuple[str, ...], options: dict[str, Any], tile: Tile | None, max_offset: Any, *blocks: Any
) -> Any:
    """A task."""
    operator = operators()[name]
    arrays = dict.fromkeys(operator.arrays) | {key: _only(block) for key, block in zip(keys, blocks, strict=True)}
    is_backward = "grad_output" in arrays
    if tile is None:
        batch = next(
            array.shape[0] for key, array in arrays.items() if array is not None and key not in operator.shared
        )
        options = operator.for_batch(options, batch)
        result = (operator.backward if is_backward else operator.forward)(**arrays, **options)
        return result._asdict() if is_backward else result
    tiling.check_offset(op, operator, arrays, options, max_offset, tile)
    return (tiling.backward_of_tile if is_backward else tiling.forward_of_tile)(operator, arrays, options, tile)


def _pick(key: str | None, new_axes: int, block: Any) -> Any:
    """One of the arrays that a task gave."""
    array = block if key is None else block[key]
    return array if new_axes == 0 else array[(None,) * new_axes].astype(wide_dtype(array.dtype))


def _picked(call: _Call, computed: Any, key: str | None, shape: Sequence[int], dtype: Any) -> Any:
    """An array of a task's results. Axes that it is not divided along come first, with one entry for each part."""
    operator, divided = call.operator, _apart(call.operator, "grad_output")
    own = _labels(operator, key or "grad_output", len(shape))
    missing = tuple(label for label in divided if label not in own)
    meta = da.utils.meta_from_array(computed, len(missing + own), dtype=wide_dtype(dtype) if missing else dtype)
    return da.blockwise(
        functools.partial(_pick, key, len(missing)),
        missing + own,
        computed,
        divided,
        new_axes={label: size for label, size in zip(own, shape, strict=True) if label not in divided},
        adjust_chunks=dict.fromkeys(missing, lambda _: 1),
        meta=meta,
        token=f"{call.op}-{key or 'result'}",
    )


def _forward(operator: Operator, op: str, given: dict[str, Any]) -> Any:
    call = _Call(operator, op, given)
    parts = np.empty(call.tiles.shape, object)
    for index in np.ndindex(parts.shape):
        tile = call.tiles[index]
        shape = call.out if tile is None else operator.with_image(call.out, _sizes(tile.output))
        parts[index] = _picked(call, call.compute(tile), None, shape, call.empty.dtype)
    return _joined(operator, parts)


def _backward(operator: Operator, op: str, given: dict[str, Any]) -> Any:
    call = _Call(operator, op, given)
    computed = np.empty(call.tiles.shape, object)
    for index in np.ndindex(computed.shape):
        computed[index] = call.compute(call.tiles[index])
    grads = {
        key: None if grad is None else _gradient(call, computed, key, grad.dtype)
        for key, grad in call.empty._asdict().items()
    }
    return operator.grads(**grads)


def _gradient(call: _Call, computed: Any, key: str, dtype: Any) -> Any:
    array = call.arrays[key]
    parts = np.empty(computed.shape, object)
    for index in np.ndindex(parts.shape):
        tile = call.tiles[index]
        shape = array.shape
        if tile is not None and key not in call.operator.shared:
            shape = call.operator.with_image(shape, _sizes(tile.part_of(key)))
        parts[index] = _picked(call, computed[index], key, shape, dtype)
    missing = tuple(range(parts.flat[0].ndim - array.ndim))
    if missing:
        terms = da.concatenate(list(parts.flat)) if parts.size > 1 else parts.flat[0]
        return terms.sum(missing, dtype=terms.dtype, split_every=SPLIT_EVERY).astype(dtype)
    if key == "input" and call.tiles.flat[0] is not None:
        return _overlaid(call, array, list(zip(call.tiles.flat, parts.flat, strict=True)), dtype)
    return _joined(call.operator, parts)


def _joined(operator: Operator, parts: Any) -> Any:
    """One array of those that lie side by side in the axes of an image."""
    nested = parts.reshape(operator.with_image((1,) * (parts.ndim + 2), parts.shape))
    return parts.flat[0] if parts.size == 1 else da.block(nested.tolist())


def _overlaid(call: _Call, array: Any, parts: list[tuple[Tile, Any]], dtype: Any) -> Any:
    """The sum of arrays that lie over parts of the image, chunk by chunk of `array`, in the order of the tiles."""
    operator = call.operator
    edges = [_slices(sizes) for sizes in operator.of_image(array.chunks)]
    chunks = np.empty(tuple(map(len, edges)), object)
    batch = parts[0][1].chunks[0]
    for index in np.ndindex(chunks.shape):
        box = [places[i] for places, i in zip(edges, index, strict=True)]
        places, pieces = [], []
        for tile, part in parts:
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(tile.input, box, strict=True)]
            if all(both.start < both.stop for both in common):
                inside = (
                    slice(both.start - a.start, both.stop - a.start) for both, a in zip(common, tile.input, strict=True)
                )
                pieces.append(part[tiling.index(operator, tuple(inside))])
                place = tuple(slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, box, strict=True))
                places.append(tiling.index(operator, place))
        shape = operator.with_image(array.shape, _sizes(box))[1:]
        if not pieces:  # no tap reaches it
            chunks[index] = da.zeros((array.shape[0], *shape), chunks=(batch, *((n,) for n in shape)), dtype=dtype)
            continue
        own, *others = (_labels(operator, f"input {i}", array.ndim) for i in range(len(pieces) + 1))
        chunks[index] = da.blockwise(
            functools.partial(_overlay, shape, tuple(places), dtype),
            own,
            *itertools.chain(*zip(pieces, others, strict=True)),
            new_axes=dict(zip(own[1:], shape, strict=True)),
            meta=pieces[0]._meta,
            token="overlay",
        )
    return _joined(operator, chunks)


def _overlay(shape: tuple[int, ...], places: Sequence[tuple[slice, ...]], dtype: Any, *blocks: Any) -> Any:
    """A task."""
    pieces = list(map(_only, blocks))
    total = np.zeros_like(pieces[0], wide_dtype(dtype), shape=(pieces[0].shape[0], *shape))
    for piece, place in zip(pieces, places, strict=True):
        total[place] += piece
    return total.astype(dtype)


_DOC = "`pydeform.{}` of dask arrays: see `pydeform.dask`."
for _operator in operators().values():
    _more = {"max_offset": None} if _operator.name in tiling.TILED and tiling.moved_by(_operator) else {}
    globals()[_operator.name] = tiling.adapted(_operator, False, _forward, _DOC, **_more)
    globals()[f"{_operator.name}_backward"] = tiling.adapted(_operator, True, _backward, _DOC, **_more)

__all__ = [name for key in operators() for name in (key, f"{key}_backward")]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
