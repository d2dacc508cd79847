"""How many small faults the tests notice: change one place of the source at random, run the tests, change it back.

    python -m tests.mutants --area cpu --sample 20         # of cpu, cuda and rest; a fresh seed, which is printed
    python -m tests.mutants --area cuda --seed 7 --sample 50

Each mutant is one changed token, or one statement left out, in a copy of the repository. "Survived" are those after
which every test still passes: look at each, since some change nothing (a bound that is never met, a figure that only
speed depends on). Long: every mutant of a kernel is compiled anew.
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import random
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
# Where the mutants of an area are planted, and the tests that are run, those that fail soonest first.
AREAS = {
    "cpu": (
        "pydeform/cpu/*.py",
        "cpu_kernels simd simd_roi conv2d deform_conv2d roi threads cpu_memory roi_limits properties properties_roi "
        "vectors vectors_roi cost kernel_cache",
    ),
    "cuda": (
        "pydeform/cuda/*.py pydeform/cuda/*.cu*",
        "cuda_convolution cuda_direct cuda_gather cuda_roi cuda_plans conv2d deform_conv2d roi roi_limits "
        "cuda_primitives interop_cuda properties_roi cost",
    ),
    "rest": (
        "pydeform/*.py pydeform/ops/*.py pydeform/layers/*.py",
        "errors errors_roi analysis layers layers_roi optim losses testing interop runtime cli viz imports house "
        "conv2d deform_conv2d roi vectors vectors_roi cost",
    ),
}
SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+"} | {
    "and": "or", "or": "and", "True": "False", "False": "True", "min": "max", "max": "min", "&&": "||", "||": "&&",
    "fminf": "fmaxf", "fmaxf": "fminf", "true": "false", "false": "true", "floor": "ceil", "ceil": "floor",
}  # fmt: skip
LIMIT = 900  # seconds of the tests of one mutant
CUDA_TOKEN = re.compile(
    r"//.*|/\*.*?\*/|\"[^\"\n]*\"|\w+|<<=|>>=|<<|>>|->|\+\+|--|[-+*/<>=!&|]=|&&|\|\||[^\w\s]", re.DOTALL
)
# A call, or an assignment to what is declared elsewhere, on a line of its own.
CUDA_STATEMENT = re.compile(r"^ +(?=\S)((?!return\b|static_assert|PYDEFORM_|(?:const )?[\w:<>]+[*&]* (?:const )?[*&]?\w)(?:[\w:]+(?:<[^;\n]*>)?\([^;{}\n]*\)|[\w.\[\]() +*]*[\w\])] [-+*]?= [^;{}\n]*);)$", re.MULTILINE)  # fmt: skip  # noqa: E501


class Mutant(NamedTuple):
    path: Path
    start: int  # in the text
    end: int
    new: str

    def applied(self, text: str) -> str:
        return text[: self.start] + self.new + text[self.end :]

    def described(self, text: str) -> str:
        line = text.count("\n", 0, self.start) + 1
        old = text[self.start : self.end].strip()
        context = text.splitlines()[line - 1].strip()
        return f"{self.path}:{line}: {old!r} -> {self.new.strip()!r} in: {context[:100]}"


def mutants_of(path: Path) -> Iterator[Mutant]:
    text = (ROOT / path).read_text(encoding="utf-8")
    tokens = _python_tokens(text) if path.suffix == ".py" else _cuda_tokens(text)
    for start, word, before in tokens:
        if word in SWAPS and not (word in "+-*" and before in ("(", "[", ",", "=", "return", ":", "*", "")):
            yield Mutant(path, start, start + len(word), SWAPS[word])
        elif word.isdecimal() and len(word) < 5:
            yield Mutant(path, start, start + len(word), str(int(word) + 1))
    yield from _left_out(path, text)


def _python_tokens(text: str) -> Iterator[tuple[int, str, str]]:
    """(place, token, token before); no text, no comments, nothing of a signature or an import."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    before, skip = "", False
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.string in ("def", "import", "class", "@"):
            skip = True
        if token.type == tokenize.NEWLINE:
            skip, before = False, ""
        elif token.type in (tokenize.OP, tokenize.NAME, tokenize.NUMBER):
            if not skip:
                yield starts[token.start[0] - 1] + token.start[1], token.string, before
            before = token.string


def _cuda_tokens(text: str) -> Iterator[tuple[int, str, str]]:
    before = ""
    for match in CUDA_TOKEN.finditer(text):
        word = match[0]
        if word[:2] in ("//", "/*") or word[0] == '"':
            continue
        line = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if not line.lstrip().startswith("#") and "template" not in line and "__launch_bounds__" not in line:
            yield match.start(), word, before
        before = word


def _left_out(path: Path, text: str) -> Iterator[Mutant]:
    """Statements that do something but declare nothing: without a declaration nothing compiles."""
    if path.suffix != ".py":
        for match in CUDA_STATEMENT.finditer(text):
            yield Mutant(path, match.start(1), match.end(1), ";")
        return
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    encoded = text.encode()
    for node in ast.walk(ast.parse(text)):
        does = isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
        stores = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript | ast.Attribute)
        if does or stores:
            ends = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
            start, end = (len(encoded[:place].decode()) for place in ends)
            yield Mutant(path, start, end, "pass")


def sample(area: str, count: int, seed: int) -> list[Mutant]:
    """Places are drawn evenly from all lines of the area's files."""
    rng = random.Random(f"{area} {seed}")
    paths = sorted({path.relative_to(ROOT) for pattern in AREAS[area][0].split() for path in ROOT.glob(pattern)})
    every = [mutant for path in paths for mutant in mutants_of(path)]
    return rng.sample(every, min(count, len(every)))


def survives(mutant: Mutant, copy: Path, tests: str, environment: dict[str, str]) -> bool:
    target = copy / mutant.path
    original = target.read_text(encoding="utf-8")
    target.write_text(mutant.applied(original), encoding="utf-8")
    files = [f"tests/test_{name}.py" for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *files]
    try:
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, timeout=LIMIT)
        return done.returncode == 0
    except subprocess.TimeoutExpired:
        return False  # hangs: noticed
    finally:
        target.write_text(original, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--area", choices=list(AREAS), action="append", help="may be given twice (default: all)")
    parser.add_argument("--sample", type=int, default=10, help="mutants of each area (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="default: a fresh one")
    parser.add_argument("--list", action="store_true", help="say what would be tried, and try nothing")
    options = parser.parse_args(argv)
    print(f"mutants: seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "__pycache__", ".*_cache", "build", "*.egg-info", "demo_output"
        )
        shutil.copytree(ROOT, copy, ignore=ignored)
        environment = {**os.environ, "XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": str(copy)}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a file changed twice within a second would look unchanged
        for area in options.area or AREAS:
            _run_area(area, options, copy, environment)
    return 0


def _run_area(area: str, options: argparse.Namespace, copy: Path, environment: dict[str, str]) -> None:
    found = sample(area, options.sample, options.seed)
    killed = 0
    for number, mutant in enumerate(found, 1):
        said = mutant.described((ROOT / mutant.path).read_text(encoding="utf-8"))
        if options.list:
            print(said)
            continue
        start = time.monotonic()
        alive = survives(mutant, copy, AREAS[area][1], environment)
        killed += not alive
        end = "SURVIVED" if alive else "killed"
        print(f"{area} {number}/{len(found)} {end} after {time.monotonic() - start:.0f} s: {said}", flush=True)
    if not options.list:
        print(f"{area}: {killed} of {len(found)} killed", flush=True)


if __name__ == "__main__":
    sys.exit(main())
