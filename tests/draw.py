"""Which tests `make test` runs of a function with many parameters: each value at least once, in combinations that a
seed draws. The seed is the commit, so that all who test a commit run the same, and the next commit runs others. The
operator is a parameter like any other of a test that several classes inherit.

Plain `pytest` runs all of them, and so does `make test-all`.
"""

from __future__ import annotations

import collections
import heapq
import random
import re
from collections.abc import Sequence
from typing import Any

VARIABLE = "PYDEFORM_TEST_DRAW"


def drawn(ids: Sequence[str], seed: str) -> set[int]:
    """Places of the ids to keep: few that have each value. What words, numbers and names an id has are its values."""
    # What has a slash is one name, to its end. The second "64" of an id is another value than the first.
    values = [set(_numbered(re.findall(r"\w+/[\w.+/-]+|[\w.+]+", name))) for name in ids]
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    kept = set()
    left = set().union(*values)
    # By how many each had of those that were left when last counted. It only loses: who still has as many has most.
    queue = [(-len(values[place]), turn, place) for turn, place in enumerate(order)]
    heapq.heapify(queue)
    while left:
        counted, turn, most = queue[0]
        has = len(values[most] & left)
        if has == -counted:  # of several the first in the seed's order
            kept.add(most)
            left -= values[most]
        heapq.heapreplace(queue, (-len(values[most] & left), turn, most))
    return kept


def _numbered(words: list[str]) -> list[tuple[str, int]]:
    count: collections.Counter[str] = collections.Counter()
    found = []
    for word in words:
        found.append((word, count[word]))
        count[word] += 1
    return found


def split(items: Sequence[Any], seed: str) -> tuple[list[Any], list[Any]]:
    """Those to run, in their order, and the others."""
    functions: dict[str, list[str]] = collections.defaultdict(list)
    for item in items:
        functions[_written_as(item)].append(item.nodeid)
    kept = {names[place] for function, names in functions.items() for place in drawn(names, seed + function)}
    return [i for i in items if i.nodeid in kept], [i for i in items if i.nodeid not in kept]


def _written_as(item: Any) -> str:
    """Where the test's function is written, once for all classes that inherit it; else its name without parameters."""
    function = getattr(item, "function", None)
    return f"{function.__module__}.{function.__qualname__}" if function else item.nodeid.partition("[")[0]
