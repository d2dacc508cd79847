"""Show on stderr how far a loop has come: with tqdm where it is installed, else one line a step."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import TypeVar

Item = TypeVar("Item")


def progress(items: Sequence[Item], what: str, label: Callable[[Item], str] = str) -> Iterator[Item]:
    """The items; `what` names the loop, `label` the one at work."""
    if find_spec("tqdm") is None:
        for number, item in enumerate(items, 1):
            print(f"{what} {number}/{len(items)}: {label(item)}", file=sys.stderr, flush=True)
            yield item
        return
    from tqdm import tqdm

    with tqdm(total=len(items), desc=what, file=sys.stderr) as bar:
        for item in items:
            bar.set_postfix_str(label(item))
            yield item
            bar.update()
