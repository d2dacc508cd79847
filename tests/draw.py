"""Which tests `make test` runs of a function with many parameters: each value at least once, in combinations that a
seed draws. The seed is the commit, so that all who test a commit run the same, and the next commit runs others.

Plain `pytest` runs all of them, and so does `make test-all`.
"""

from __future__ import annotations

import collections
import random
import re
from collections.abc import Sequence
from typing import Any

VARIABLE = "PYDEFORM_TEST_DRAW"


def drawn(ids: Sequence[str], seed: str) -> set[int]:
    """Places of the ids to keep. What words, numbers and names an id has are its values."""
    order = list(range(len(ids)))
    random.Random(seed).shuffle(order)
    seen: set[tuple[str, int]] = set()
    kept = set()
    for place in order:
        # The second "64" of an id is another value than the first.
        values = set(_numbered(re.findall(r"[\w.+]+", ids[place])))
        if values - seen or not values:
            kept.add(place)
            seen |= values
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
    functions: dict[str, list[Any]] = collections.defaultdict(list)
    for item in items:
        functions[item.nodeid.partition("[")[0]].append(item)
    kept = set()
    for name, of_function in functions.items():
        ids = [item.nodeid.partition("[")[2].removesuffix("]") for item in of_function]
        kept |= {of_function[place].nodeid for place in drawn(ids, seed + name)}
    return [i for i in items if i.nodeid in kept], [i for i in items if i.nodeid not in kept]
