"""Weighted samples of maps, summed for each query and group of channels: attention, DCNv3 and DCNv4, aggregation.

Maps are read as they lie, pixel by pixel with all channels of a group side by side, or from a copy of one group's. Each
sample is located once for all channels of its group, and a corner outside the map is read from a row of zeros. Backward
gives every gradient one owner, so that results are always deterministic. Kernels cite docs/math/gather.md.

Which problem takes which way, and why:

- all forwards (`forward`): a tile of queries is located, then summed query by query and group by group
- the value's gradient (`backward._scatter`): a group's channels, or a block of them where groups are fewer than
  threads need, go through all queries in order, so that no two threads add to one number
- all other gradients (`backward._make_dots`): a tile of queries, as forward
- where pixels are read many times (`plan.apart`), both: a group at a time, from a copy of its pixels, which the caches
  hold, and in backward all its gradients in one walk (`plan.along`; decision 0019)
- groups that share their places (`plan.lists`): without the samples that read nothing, and threads divide pixels
- locations and weights from raw offsets and logits (`given.reference`): made in a thread's tables, tile by tile
- samples of one pixel instead of four corners (`plan.discrete`): the same kernels, with lists of one corner

What they share: `plan` decides, `places` locates.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pydeform._gather_geometry import BILINEAR, DISCRETE
from pydeform.cpu.core import parallel
from pydeform.cpu.core.memory import compute_dtype, contiguous, empty, to_result
from pydeform.cpu.gather.backward import Gradients, gather_backward
from pydeform.cpu.gather.forward import gather
from pydeform.cpu.gather.plan import Given, Needs, Scratch, given_arrays, prepared, threads_for


def forward(arrays: Any, gathering: Any) -> Any:
    g, data = gathering.numbers, arrays.value.dtype
    dtype = compute_dtype(data)
    shape = g.batch, g.queries, g.groups * g.channels
    output = empty(shape, dtype)
    if output.size:
        threads = threads_for(g, 1, g.batch * g.queries)
        _run(gather, gathering, given_arrays(arrays, g, dtype), output, dtype, threads, Needs())
    return to_result(output, data, shape)


def backward(grad_output: Any, arrays: Any, gathering: Any, needs: Any, **_options: bool) -> dict[str, Any]:
    g, data = gathering.numbers, arrays.value.dtype
    dtype, shapes = compute_dtype(data), {name: a.shape for name, a in arrays._asdict().items() if a is not None}
    given = given_arrays(arrays, g, dtype)
    if g.rule == DISCRETE:
        needs = needs - {"locations", "reference"}
    needs_dots = bool(needs - {"value"})

    output = contiguous(grad_output, dtype, (g.batch, g.queries, g.groups * g.channels))
    # Not all numbers have an owner: pixels that nobody reads, samples that are not seen, what fills up a packed row.
    make = empty if output.size and g.rule == BILINEAR and arrays.weights is not None else np.zeros

    def made(make: Any, like: Any, is_needed: bool) -> Any:
        return make(like.shape if is_needed else (0,) * like.ndim, dtype)

    locations = made(make, given.locations, needs_dots)
    grads = Gradients(
        output,
        made(np.zeros, given.value, "value" in needs),
        locations,
        locations if arrays.weights is None else made(make, given.weights, needs_dots),
        None if given.reference is None else made(make, given.reference, needs_dots),
    )
    if grads.output.size:
        threads = threads_for(g, 1 + needs_dots, g.batch * (g.groups * g.channels + g.queries))
        _run(gather_backward, gathering, given, grads, dtype, threads, Needs("value" in needs, needs_dots))
    return {
        name: to_result(grad, getattr(arrays, name).dtype, shapes[name]) if name in needs else None
        for name, grad in grads._asdict().items()
        if name != "output"
    }


def _run(kernel: Any, gathering: Any, given: Given, results: Any, dtype: Any, threads: int, needs: Needs) -> None:
    how = prepared(gathering, dtype, given.reference is not None, needs, threads)
    own = how.workspace.take()
    parallel.run(
        kernel,
        how.key,
        how.threads,
        parallel.new_counters(1),
        given,
        results,
        Scratch(*own),
        how.tables,
        gathering.numbers,
        how.plan,
    )
    how.workspace.give_back(own)
