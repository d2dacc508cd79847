"""Machine code of the SIMD primitives for processors that are not at hand, through LLVM alone.

A primitive is a function that emits LLVM code, so it can be put into a function of its own and compiled for any
processor that LLVM knows, in a few milliseconds, without Numba and without running anything.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types

from pydeform.cpu.core import blend, gathered, jit, layout, product, weighted


class Processor(NamedTuple):
    name: str  # of LLVM
    triple: str
    vector_bytes: int

    @property
    def vector(self) -> str:
        """Pattern of a vector register in assembly."""
        return r"\bq\d+\b|\bv\d+" if self.triple.startswith("aarch64") else r"%[xyz]mm\d+"


X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
PROCESSORS = {
    name: Processor(name, triple, width)
    for name, triple, width in (
        ("nehalem", X86, 16),
        ("haswell", X86, 32),
        ("znver3", X86, 32),
        ("skylake-avx512", X86, 64),
        ("sapphirerapids", X86, 64),
        ("znver4", X86, 64),
        ("znver5", X86, 64),
        ("neoverse-n1", ARM, 16),
        ("apple-m1", ARM, 16),
    )
}


class Loop(NamedTuple):
    """What one pass through an innermost loop does."""

    multiply_adds: int
    loads: int  # of a vector, or of a number for all its lanes
    stack_stores: int  # of a vector register

    @property
    def loads_each(self) -> float:
        return self.loads / self.multiply_adds


def primitives(vector_bytes: int, rows: int | None = None) -> SimpleNamespace:
    """Those that exist for vectors of any width, 0: of one lane; `multiply_tile` with other rows than it has."""
    modules = (blend, gathered, layout, weighted)
    found = {name: value for module in modules for name, value in vars(module).items() if hasattr(value, "of_width")}
    made = SimpleNamespace(
        vector_bytes=vector_bytes, **{name: value.of_width(vector_bytes) for name, value in found.items()}
    )
    wide, two, narrow = product.rows_for(vector_bytes)
    made.multiply_wide = product.multiply(wide, product.panel_vectors(vector_bytes), vector_bytes)
    made.multiply_tile = product.multiply(rows or two, 2, vector_bytes)
    made.multiply_narrow = product.multiply(narrow, 1, vector_bytes)
    return made


class _Context:
    """As much of Numba's as primitives ask for."""

    def get_dummy_value(self) -> None:
        return None

    def make_tuple(self, builder: Any, type: Any, values: list[Any]) -> list[Any]:
        return list(values)


@functools.cache
def _know_all_targets() -> None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()


def _lowered(type: Any) -> Any:
    if isinstance(type, types.CPointer):
        return _lowered(type.dtype).as_pointer()
    if isinstance(type, types.BaseTuple):
        items = [_lowered(item) for item in type]
        return ir.ArrayType(items[0], len(items)) if isinstance(type, types.UniTuple) else ir.LiteralStructType(items)
    if isinstance(type, types.Float):
        return ir.FloatType() if type.bitwidth == 32 else ir.DoubleType()
    if type is types.none:
        return ir.IntType(8).as_pointer()
    return ir.IntType(1 if type is types.boolean else type.bitwidth)


def machine_of(processor: Processor) -> Any:
    _know_all_targets()
    target = llvm.Target.from_triple(processor.triple)
    return target.create_target_machine(cpu=processor.name, opt=3, reloc="pic", codemodel="small")


def assembly(primitive: Any, arguments: list[Any], constants: dict[int, int], processor: Processor) -> str:
    """Of the primitive for these Numba types; the kernels call it with constants at some of the places."""
    signature, generate = primitive._defn(None, *arguments)
    machine = machine_of(processor)
    module = ir.Module()
    module.triple, module.data_layout = processor.triple, str(machine.target_data)
    results = ir.PointerType(_lowered(arguments[0].dtype))
    kinds = [_lowered(argument) for argument in signature.args]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [*kinds, results]), name=primitive._name)
    builder = ir.IRBuilder(function.append_basic_block())
    values = [ir.Constant(kind, constants[n]) if n in constants else function.args[n] for n, kind in enumerate(kinds)]
    found = generate(_Context(), builder, signature, values)
    if isinstance(getattr(found, "type", None), ir.ArrayType):
        found = [builder.extract_value(found, n) for n in range(found.type.count)]
    for n, value in enumerate(found if isinstance(found, list) else [found]):
        if value is not None:  # or else nothing of what it is made from would be left
            value = builder.uitofp(value, results.pointee) if value.type == ir.IntType(1) else value
            builder.store(value, builder.gep(function.args[-1], [ir.Constant(ir.IntType(64), n)]))
    builder.ret_void()
    return compiled(str(module), machine)


def compiled(text: str, machine: Any) -> str:
    """Assembly of LLVM's text."""
    parsed = llvm.parse_assembly(text)
    tuning = llvm.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = True
    passes = llvm.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(parsed, passes)
    return str(machine.emit_assembly(parsed))


@contextlib.contextmanager
def _unoptimised() -> Iterator[list[str]]:
    """Gets LLVM's text of each kernel that is compiled meanwhile, before anything is done for this machine."""
    texts: list[str] = []
    optimise = jit._KernelCode._optimize_final_module
    jit._KernelCode._optimize_final_module = lambda library: texts.append(str(library._final_module))
    try:
        yield texts
    finally:
        jit._KernelCode._optimize_final_module = optimise


def text_of_kernel(function: Callable[..., None], arguments: list[Any]) -> str:
    """LLVM's text of a kernel for these Numba types, and for any processor if its vectors have so many lanes on all."""
    with _unoptimised() as texts:
        jit.Kernel(function).call.compile(tuple(arguments))
    return re.sub(r'target (triple|datalayout) = ".*"\n', "", texts[-1])


def assembly_of_kernel(text: str, processor: Processor) -> str:
    machine = machine_of(processor)
    head = f'target datalayout = "{machine.target_data}"\ntarget triple = "{processor.triple}"\n'
    parts = re.findall(r"^(\S+):(.*?)\.size\s+\1", compiled(head + text, machine), re.MULTILINE | re.DOTALL)
    return "".join(body for name, body in parts if "cpython" not in name)  # not what unpacks Python's arguments


def loops(text: str, processor: Processor) -> list[Loop]:
    """The innermost ones that work on vectors."""
    lines = [re.split(r"\s#|\s//", line)[0].rstrip() for line in text.splitlines()]
    labels = {match[1]: n for n, line in enumerate(lines) if (match := re.match(r"(\.L\w+):", line))}
    spans = []
    for n, line in enumerate(lines):
        target = re.match(r"\s+(?:j\w+|b|b\.\w+|cbn?z\s+\w+,|tbn?z\s+\w+, #\w+,)\s+(\.L\w+)$", line)
        if target and labels.get(target[1], n) < n:
            spans.append((labels[target[1]], n))
    innermost = [(a, b) for a, b in spans if not any((c, d) != (a, b) and a <= c and d <= b for c, d in spans)]
    # Where it does not keep the stack's place, %rbp is a register as any other.
    stack = "%rsp|%rbp" if any(re.match(r"\s+movq\s+%rsp, %rbp$", line) for line in lines) else "%rsp"
    return [loop for a, b in innermost if (loop := _described(lines[a : b + 1], processor, stack)) is not None]


def _described(lines: list[str], processor: Processor, stack: str) -> Loop | None:
    if not any(re.search(processor.vector, line) for line in lines):
        return None
    if processor.triple == ARM:
        multiply_adds = sum(bool(re.match(r"\s+fml[as]\s", line)) for line in lines)
        targets = [line.split("[")[0] for line in lines if re.match(r"\s+ld", line)]
        loads = sum(len(re.findall(processor.vector + r"|\b[sd]\d+\b", target)) for target in targets)
        stores = sum(bool(re.match(r"\s+st[rpu]\w*\s+q", line)) and "[sp" in line for line in lines)
        return Loop(multiply_adds, loads, stores)
    multiply_adds = sum(
        "vfm" in line or "vfnm" in line or "vdpbf16ps" in line or line.lstrip().startswith("mulp") for line in lines
    )
    # In what is AT&T's order the target comes last: memory anywhere before it is read.
    loads = sum(bool(re.search(r"\(%.*\).*,\s*%[xyz]mm\d+", line)) for line in lines)
    stores = sum(bool(re.search(rf"%[xyz]mm\d+, -?\d*\((?:{stack})\)", line)) for line in lines)
    return Loop(multiply_adds, loads, stores)
