"""Runs the PTX that NVRTC makes of a kernel: all threads of a block at once, as NumPy arrays.

The strings inside `asm` run nowhere else where there is no GPU. It knows the instructions that core/primitives.cuh and
its conformance kernels come to, each after the PTX manual and not after its twin in C++; of any other it says so. No
weak memory, no time; what is asynchronous happens when it is waited for.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from tests.cuda_emulation.ptx_block import GLOBAL, SHARED, UNSIGNED, Block, Instruction, Unknown

__all__ = ["Kernel", "Unknown", "kernel"]

GAP = 512  # bytes between arrays


def split(operands: str) -> list[str]:
    """At commas outside of braces and brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands)]


class Kernel:
    """One .entry of a PTX text."""

    def __init__(self, text: str, name: str):
        text = re.sub(r"//.*", "", text)
        head, _, rest = text.partition(f".entry {name}(")[2].partition("{")
        if not rest:
            raise KeyError(f"no kernel {name}")
        self.parameters = re.findall(r"\.param[^,)]*?(\w+)(?:\[\d+\])?\s*(?=,|\))", head.partition(")")[0] + ")")
        self.labels: dict[str, int] = {}
        self.code: list[Instruction] = []
        for statement in _body(rest).split(";"):
            statement = statement.strip()
            while found := re.match(r"(\$\w+):\s*|[{}]\s*|\.pragma[^;]*|\.loc[^\n]*\n\s*", statement):
                if found[1]:
                    self.labels[found[1]] = len(self.code)
                statement = statement[found.end() :]
            if statement and not statement.startswith("."):  # a declaration of registers
                guard, opcode, operands = re.fullmatch(
                    r"(?:@(!?%?\w+)\s+)?([\w.:]+)\s*(.*)", statement, re.DOTALL
                ).groups()  # type: ignore[union-attr]
                self.code.append(Instruction(guard or "", opcode.split("."), split(operands)))

    def run(self, grid: int, block: int, arguments: Sequence[Any], shared_mem: int = 0) -> None:
        """Arrays among the arguments are changed in place."""
        memory = Memory([a for a in arguments if isinstance(a, np.ndarray)], shared_mem)
        places = iter(memory.places)
        values = [next(places) if isinstance(a, np.ndarray) else _raw(a) for a in arguments]
        parameters = dict(zip(self.parameters, values, strict=True))
        for number in range(grid):
            memory.shared[:] = 0xFF
            Block(self.code, self.labels, memory, parameters, number, grid, block).run()
        memory.give_back()


def _body(text: str) -> str:
    depth = 1
    for place, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if not depth:
            return text[:place]
    raise ValueError("a brace is missing")


def _raw(scalar: Any) -> int:
    return int(np.asarray(scalar).view(UNSIGNED[8 * scalar.nbytes]))


class Memory:
    """Global and shared. An address is a number in one space for all: what lies where says which memory it is."""

    def __init__(self, arrays: Sequence[np.ndarray[Any, Any]], shared_mem: int):
        self._arrays, self.places, end = arrays, list[int](), GAP
        for a in arrays:
            self.places.append(GLOBAL + end)
            end += -(-a.nbytes // GAP) * GAP + GAP
        self.globals, self.shared = np.full(end, 0xA5, np.uint8), np.zeros(shared_mem, np.uint8)
        self._valid = np.zeros(end, bool)
        for a, place in zip(arrays, self.places, strict=True):
            self.globals[place - GLOBAL :][: a.nbytes] = a.reshape(-1).view(np.uint8)
            self._valid[place - GLOBAL :][: a.nbytes] = True

    def give_back(self) -> None:
        for a, place in zip(self._arrays, self.places, strict=True):
            a.reshape(-1).view(np.uint8)[:] = self.globals[place - GLOBAL :][: a.nbytes]

    def _place(self, address: Any, size: int) -> tuple[np.ndarray[Any, Any], Any]:
        address = np.asarray(address).astype(np.int64)
        if (address % size).any():
            raise ValueError(f"an address is not a multiple of {size}")
        if not address.size or (address >= GLOBAL).all():
            memory, first = self.globals, address - GLOBAL
            inside = ((first >= 0) & (first + size <= len(memory))).all()
            inside = inside and self._valid[first].all() and self._valid[first + size - 1].all()
        else:
            memory, first = self.shared, address - SHARED
            inside = ((first >= 0) & (first + size <= len(memory))).all()
        if not inside:
            raise IndexError("an access out of bounds")
        return memory, first[..., None] + np.arange(size)

    def load(self, address: Any, size: int) -> np.ndarray[Any, Any]:
        """(..., size) bytes."""
        memory, places = self._place(address, size)
        return memory[places]

    def store(self, address: Any, data: np.ndarray[Any, Any]) -> None:
        memory, places = self._place(address, data.shape[-1])
        memory[places] = data


@functools.lru_cache(64)
def kernel(text: str, name: str) -> Kernel:
    return Kernel(text, name)
