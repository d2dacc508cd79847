"""Show on stderr how far a loop has come: a bar on a terminal that has tqdm, at most some ten lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")
LINES = 10


def progress(items: Sequence[Item], what: str, label: Callable[[Item], str] = str) -> Iterator[Item]:
    """The items; `what` names the loop, `label` the one at work."""
    if find_spec("tqdm") is None or not sys.stderr.isatty():
        for number, item in enumerate(items, 1):
            if number == 1 or number * LINES // len(items) > (number - 1) * LINES // len(items):
                print(f"{what} {number}/{len(items)}: {label(item)}", file=sys.stderr, flush=True)
            yield item
        return
    from tqdm import tqdm

    with tqdm(total=len(items), desc=what, file=sys.stderr) as bar:
        for item in items:
            bar.set_postfix_str(label(item))
            yield item
            bar.update()
