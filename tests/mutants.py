"""How many small faults the tests notice: change one place of the source at random, run the tests, change it back.

    python -m tests.mutants --area cpu --sample 20         # of cpu, cuda and rest; a fresh seed, which is printed
    python -m tests.mutants --area cuda --seed 7 --sample 50 --jobs 4

Each mutant is one changed token, or one statement left out, in a copy of the repository. The area's tests run until one
fails, those that bear the name of the changed file first. "Survived" are mutants after which every one passes: look at
each, since some change nothing (a bound that is never met, a figure that only speed depends on). Long: every mutant of
a kernel is compiled anew.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import io
import os
import queue
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


class Area(NamedTuple):
    places: str  # where mutants are planted
    backends: str  # that the tests run on
    tests: str  # those that fail soonest first


AREAS = {
    "cpu": Area(
        "pydeform/cpu/**/*.py",
        "cpu",
        "cpu_kernels simd simd_pairs simd_roi conv2d deform_conv2d conv1d conv3d deform_conv1d deform_conv3d "
        "active_conv2d roi dcnv3 dcnv4 ms_deform_attn ms_deform_attn_fused deform_aggregation grid_sample warp "
        "threads roi_limits not_finite properties properties_axes properties_roi properties_gather properties_dcnv "
        "properties_roi_boxes properties_grid affine_grid vectors vectors_axes vectors_roi vectors_gather "
        "vectors_grid cost half waits coordinates kernel_cache cpu_memory layers_kinds runtime background twins "
        "imports",
    ),
    "cuda": Area(
        "pydeform/cuda/**/*.py pydeform/cuda/**/*.cu*",
        "emulated",
        "cuda_copies cuda_plans cuda_direct cuda_gather cuda_gather_family cuda_grid cuda_convolution cuda_axes "
        "cuda_roi cuda_primitives conv2d deform_conv2d conv1d conv3d deform_conv1d deform_conv3d active_conv2d roi "
        "roi_limits ms_deform_attn ms_deform_attn_fused deform_aggregation dcnv3 dcnv4 grid_sample warp not_finite "
        "interop_cuda coordinates properties properties_axes properties_roi properties_gather properties_dcnv "
        "properties_roi_boxes properties_grid affine_grid vectors vectors_axes vectors_roi vectors_gather "
        "vectors_grid cost cuda_device cuda_emulation cuda_names cuda_compile layers_kinds twins imports",
    ),
    "rest": Area(
        "pydeform/*.py pydeform/ops/*.py pydeform/layers/*.py pydeform/testing/*.py",
        "cpu,emulated",
        "errors errors_axes errors_roi errors_gather options analysis optim losses runtime cli viz imports house "
        "types testing layers layers_roi layers_kinds layers_files interop interop_cuda half conv2d deform_conv2d "
        "conv1d conv3d deform_conv1d deform_conv3d active_conv2d roi dcnv3 dcnv4 ms_deform_attn "
        "ms_deform_attn_fused deform_aggregation grid_sample warp affine_grid not_finite layers_grid vectors "
        "vectors_axes vectors_roi vectors_gather coordinates cost background demo",
    ),
}
SWAPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+"} | {
    "and": "or", "or": "and", "True": "False", "False": "True", "min": "max", "max": "min", "&&": "||", "||": "&&",
    "fminf": "fmaxf", "fmaxf": "fminf", "true": "false", "false": "true", "floor": "ceil", "ceil": "floor",
}  # fmt: skip
HUNG = 5  # times as long as the tests take
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
    paths = sorted({path.relative_to(ROOT) for pattern in AREAS[area].places.split() for path in ROOT.glob(pattern)})
    every = [mutant for path in paths for mutant in mutants_of(path)]
    return rng.sample(every, min(count, len(every)))


def tests_of(area: str, path: Path | None) -> list[str]:
    """Of the area, as pytest takes them; first those in whose names words of this path are."""
    words = set() if path is None else set(re.findall(r"[a-z]{3,}", "/".join(path.parts[1:]))) - {"cpu", "cuda", "ops"}
    names = sorted(AREAS[area].tests.split(), key=lambda name: -sum(word in name for word in words))
    return [f"tests/test_{name}.py" for name in names]


class Copy(NamedTuple):
    """A copy of the repository, in which its tests run."""

    folder: Path
    area: str
    limit: float | None  # seconds; after that, tests hang

    def passes(self, mutant: Mutant | None = None) -> bool:
        if mutant is None:
            return self._run(tests_of(self.area, None), tell=True)
        target = self.folder / mutant.path
        original = target.read_text(encoding="utf-8")
        target.write_text(mutant.applied(original), encoding="utf-8")
        try:
            return self._run(tests_of(self.area, mutant.path), tell=False)
        except subprocess.TimeoutExpired:
            return False
        finally:
            target.write_text(original, encoding="utf-8")

    def _run(self, tests: list[str], tell: bool) -> bool:
        """`tell`: what failed."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",  # a file changed twice within a second would look unchanged
            "XDG_CACHE_HOME": str(self.folder.parent / "cache"),
            "PYDEFORM_TEST_BACKENDS": AREAS[self.area].backends,
        }
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=self.limit
        )
        if done.returncode > 1 or (done.returncode and tell):  # 1: a test failed
            print(done.stdout[-2000:], done.stderr[-2000:], file=sys.stderr, flush=True)
        return done.returncode == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--area", choices=list(AREAS), action="append", help="may be given twice (default: all)")
    parser.add_argument("--sample", type=int, default=10, help="mutants of each area (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1 << 32), help="default: a fresh one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at a time (default: every core)")
    parser.add_argument("--list", action="store_true", help="say what would be tried, and try nothing")
    options = parser.parse_args(argv)
    print(f"mutants: seed {options.seed}", flush=True)
    for area in options.area or AREAS:
        found = sample(area, options.sample, options.seed)
        if options.list:
            print(*[described(mutant) for mutant in found], sep="\n")
        elif not _try_all(area, found, options.jobs):
            return 1
    return 0


def described(mutant: Mutant) -> str:
    return mutant.described((ROOT / mutant.path).read_text(encoding="utf-8"))


def _try_all(area: str, found: list[Mutant], jobs: int) -> bool:
    """False where the tests fail with nothing changed: they would say nothing of mutants."""
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        folders = [Path(folder, str(job), "copy") for job in range(jobs)]
        for place in folders:
            ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "*.egg-info")
            shutil.copytree(ROOT, place, ignore=ignored)
        start = time.monotonic()
        print(f"{area}: tests with nothing changed ...", file=sys.stderr, flush=True)
        if not Copy(folders[0], area, None).passes():
            print(f"{area}: tests fail with nothing changed", flush=True)
            return False
        limit = HUNG * (time.monotonic() - start)
        print(f"{area}: they passed in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        free: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for place in folders:
            free.put(place)

        def survives(number: int) -> bool:
            place = free.get()
            start = time.monotonic()
            alive = Copy(place, area, limit).passes(found[number])
            free.put(place)
            end = f"{'SURVIVED' if alive else 'killed'} after {time.monotonic() - start:.0f} s"
            print(f"{area} {number + 1}/{len(found)} {end}: {described(found[number])}", flush=True)
            return alive

        survivors = sum(pool.map(survives, range(len(found))))
    print(f"{area}: {len(found) - survivors} of {len(found)} killed", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
