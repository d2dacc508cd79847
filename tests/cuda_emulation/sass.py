"""The machine code of a compiled kernel, as nvdisasm prints it. Neither a GPU nor a driver is needed."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

PRODUCTS = re.compile(r"[A-Z0-9]*MMA\b")


class Instruction(NamedTuple):
    opcode: str
    operands: str


@functools.cache
def disassembler() -> str | None:
    found = shutil.which("nvdisasm")
    if found is None:
        with suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.files("nvidia-cuda-nvdisasm") or []
            found = next((str(file.locate()) for file in files if file.name == "nvdisasm"), None)
    return found


def disassemble(program: str, cubin: bytes, kernel: str) -> list[Instruction]:
    """Every instruction has 16 bytes, so that its address is 16 times its place in the list."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "-json", file.name], capture_output=True, text=True, check=True)
    _, functions = json.loads(done.stdout)
    (function,) = [entry for entry in functions if entry["function-name"] == kernel]
    return [Instruction(i["opcode"], i.get("operands", "")) for i in function["sass-instructions"]]


def loops(code: list[Instruction]) -> Iterator[list[Instruction]]:
    """From each target of a backward branch to the branch."""
    for index, instruction in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)$", instruction.operands)
        if instruction.opcode.startswith("BRA") and target and int(target[1], 16) < 16 * index:
            yield code[int(target[1], 16) // 16 : index + 1]


def count(code: list[Instruction], pattern: re.Pattern[str]) -> int:
    return sum(1 for instruction in code if pattern.match(instruction.opcode))


def main_loop(code: list[Instruction]) -> tuple[list[Instruction], str]:
    """(the innermost loop with the most products, the products' opcode)."""
    for pattern in (PRODUCTS, re.compile(r"DFMA"), re.compile(r"FFMA")):
        having = [loop for loop in loops(code) if count(loop, pattern)]
        innermost = [a for a in having if not any(len(b) < len(a) and _within(b, a) for b in having)]
        if innermost:
            loop = max(innermost, key=lambda loop: count(loop, pattern))
            names = Counter(i.opcode.partition(".")[0] for i in loop if pattern.match(i.opcode))
            return loop, names.most_common(1)[0][0]
    return [], ""


def _within(inner: list[Instruction], outer: list[Instruction]) -> bool:
    """By identity: equal instructions occur in many places."""
    return any(item is inner[0] for item in outer)
