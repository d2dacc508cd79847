"""Weighted samples of maps on CuPy arrays, summed for each query and group of channels: attention, DCNv3 and DCNv4,
aggregation. One set of kernels; an operator is its table of samples and its geometry.

Maps are read as they lie, nothing is copied, and nothing waits for the device. Kernels cite docs/math/gather.md.

Which problem takes which way, and why:

- all forwards (`launches.launch_teams`, `gather_samples`): a team of lanes has the channels of one group of a query,
  each lane up to 16 bytes of them. Each locates one sample, which so is done once for all channels, and passes it on
- fewer queries than the device has room for (`plan.team_of`): several times as many lanes, which share the samples
- channels or arrays whose alignment does not allow 16 bytes (`plan.bytes_of_load`): narrower loads
- the value's gradient (`gradients.value_gradient`): added by atomics, the fastest, of half types in float32; for who
  asks for the same bits on every run, samples are sorted by pixel and gathered (`gather_cells`), some queries at a time
- gradients of given locations and weights (`gradients.number_gradients`): a team owns them; where several scales or
  groups share a place, as in aggregation, it has that place with all of these
- those of raw offsets and logits (`gradients.fused_gradients`): a block has queries with all groups, whose reference
  points it owns, and keeps what its samples give in shared memory

`plan` decides and needs no device; `core` has what is not about samples: sources, launches, sums.
"""

from __future__ import annotations

from typing import Any

import cupy

from pydeform._gather_geometry import DISCRETE, GatherArrays
from pydeform.cuda.core.copies import contiguous
from pydeform.cuda.gather.gradients import fused_gradients, number_gradients, value_gradient
from pydeform.cuda.gather.launches import Given, launch_teams, table_of
from pydeform.cuda.gather.plan import check_size

OPERATORS = "gathering operators"  # whose errors these are


def forward(arrays: Any, gathering: Any) -> Any:
    check_size(OPERATORS, gathering)
    g = gathering.numbers
    with arrays.value.device:
        given = GatherArrays(*contiguous(*arrays))
        output = cupy.empty((g.batch, g.queries, g.groups * g.channels), given.value.dtype)
        if output.size:
            launch_teams(
                "gather_samples", Given(given, gathering, table_of(gathering, output.dtype)), given.value, output
            )
        return output


def backward(
    grad_output: Any, arrays: Any, gathering: Any, needs: Any, *, deterministic: bool = False, **_options: bool
) -> dict[str, Any]:
    check_size(OPERATORS, gathering)
    if gathering.numbers.rule == DISCRETE:
        needs = needs - {"locations", "reference"}
    with arrays.value.device:
        grad_output, *rest = contiguous(grad_output, *arrays)
        given = GatherArrays(*rest)
        packed = given.weights is None  # and something behind each row, which has no owner
        make = cupy.zeros_like if packed or not grad_output.size else cupy.empty_like
        grads = {
            name: make(array) if name in needs and name != "value" and array is not None else None
            for name, array in given._asdict().items()
        }
        own = Given(given, gathering, table_of(gathering, given.value.dtype))
        if "value" in needs:
            grads["value"] = value_gradient(own, grad_output, deterministic=deterministic)
        locations, reference = grads["locations"], grads["reference"]
        weights = locations if packed else grads["weights"]
        if not grad_output.size or locations is weights is reference is None:
            return grads
        if given.reference is None:
            number_gradients(own, grad_output, locations, weights)
        else:
            fused_gradients(own, grad_output, locations, weights, reference)
        return grads
