"""Compile a kernel once per dtype and keep it on disk, wherever the machine lets us."""

from __future__ import annotations

import contextlib
import gc
import operator
from collections.abc import Callable, Iterator
from typing import Any

import llvmlite.binding
import numba
from numba import _dynfunc
from numba.core import cgutils, ir
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder, PassManager
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.ir_utils import get_definition, guard
from numba.core.lowering import Lower
from numba.core.typed_passes import NativeLowering, NopythonRewrites
from numba.core.types import none
from numba.core.types.containers import BaseNamedTuple
from numba.core.types.functions import BaseFunction
from numba.core.typing.typeof import typeof
from numba.core.untyped_passes import DeadBranchPrune, InlineClosureLikes

from pydeform import _background
from pydeform.cpu.core.kernel_cache import KernelCache, cache_directory, compiled_once, say_once

_background.hold_at_fork(global_compiler_lock, llvmlite.binding.ffi.lib._lock)


class _KernelCode(JITCodeLibrary):  # type: ignore[misc]
    """LLVM's text of an entry point with the functions that it calls, optimised once, as a whole. Numba would optimise
    before that, too, for its counting of references: no kernel has any, and it takes as long again."""

    def _optimize_functions(self, module: Any) -> None:
        module.data_layout = self.codegen._data_layout

    def _optimize_final_module(self) -> None:
        passes, options = self.codegen._module_pass_manager()
        passes.run(self._final_module, options)

    def finalize(self) -> None:
        called: dict[Any, None] = {}
        self._add_called(called)
        # LLVM leaves out what nobody has called yet: each comes after all that call it.
        self._linking_libraries = list(reversed(called))
        super().finalize()

    def _add_called(self, called: dict[Any, None]) -> None:
        """Adds the functions that it calls, each behind those that it calls itself."""
        for library in self._linking_libraries:
            if library not in called:
                if isinstance(library, _PartOfKernels):
                    library._add_called(called)
                called[library] = None

    def serialize_using_object_code(self) -> tuple[str, str, tuple[bytes, bytes]]:
        """What is kept on disk: machine code, and the names of its functions. Numba would keep their text too, for
        functions that call them. No kernel calls another, and to parse the text is most of the time that loading takes.
        """
        self._ensure_finalized()
        defined = [function.name for function in self._final_module.functions if not function.is_declaration]
        names = llvmlite.binding.parse_assembly("".join(f'@"{name}" = global i8 0\n' for name in defined))
        return self.name, "object", (self._get_compiled_object(), names.as_bitcode())


class _PartOfKernels(_KernelCode):
    """LLVM's text of a function that only kernels call. A kernel takes the text in and optimises it there. So the
    function by itself is neither optimised nor made machine code: that would be a third of the time to compile. Nor has
    it the text of those that it calls, which a kernel takes in once."""

    def finalize(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, _name: str) -> int:
        return 0


class _Lower(Lower):  # type: ignore[misc]
    """Without what only debuggers read: for the size of each variable, LLVM would parse a text of its own."""

    def alloca_lltype(self, name: str, lltype: Any, **_: Any) -> Any:
        return cgutils.alloca_once(self.builder, lltype, name=name)

    def storevar(self, value: Any, name: str, **_: Any) -> None:
        super().storevar(value, name)


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerKernel(NativeLowering):  # type: ignore[misc]
    """Numba's last step, into code that is optimised once."""

    _name = "lower_kernel"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _KernelCode(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPartOfKernels(NativeLowering):  # type: ignore[misc]
    """Numba's last step, without what would make the function callable from Python."""

    _name = "lower_part_of_kernels"
    lowering_class = _Lower

    def run_pass(self, state: Any) -> bool:
        state.library = _PartOfKernels(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags.no_compile = True
        super().run_pass(state)
        state.library._ensure_finalized()
        description, name = state.cr.fndesc, state.func_id.func_name
        # Kernels find the text by this function, which has no code of its own.
        function = _dynfunc.make_function(description.lookup_module(), name, "", 0, state.cr.env, (state.library,))
        state.targetctx.insert_user_function(function, description, [state.library])
        state["cr"] = state.cr._replace(cfunc=function)
        return True


@register_pass(mutates_CFG=True, analysis_only=False)
class _PruneAbsent(DeadBranchPrune):  # type: ignore[misc]
    """Leaves out what stands under `x is None`, or `is not None`, where x is an argument, or a field of an argument,
    whose type decides the answer. Numba itself does so only for arguments that are None."""

    _name = "prune_absent"

    def run_pass(self, state: Any) -> bool:
        for block in state.func_ir.blocks.values():
            for assign in block.find_insts(ir.Assign):
                decided = _decided(state, assign.value)
                if decided is not None:
                    answer = ir.Const(decided, assign.loc)
                    definitions = state.func_ir._definitions[assign.target.name]
                    definitions[definitions.index(assign.value)] = answer
                    assign.value = answer
        return bool(super().run_pass(state))


def _decided(state: Any, value: Any) -> bool | None:
    """What a comparison with None will always give; None if that is not known."""
    if not isinstance(value, ir.Expr) or value.op != "binop" or value.fn not in (operator.is_, operator.is_not):
        return None
    left, right = (guard(get_definition, state.func_ir, side) for side in (value.lhs, value.rhs))
    if not (isinstance(right, ir.Const) and right.value is None):
        return None
    fields = []
    while isinstance(left, ir.Expr) and left.op == "getattr":
        fields.append(left.attr)
        left = guard(get_definition, state.func_ir, left.value)
    if not isinstance(left, ir.Arg):
        return None
    type = state.args[left.index]
    for field in reversed(fields):
        if not isinstance(type, BaseNamedTuple):
            return None
        type = type[type.fields.index(field)]
    return (type == none) == (value.fn is operator.is_)


# Steps of Numba that find nothing in kernels, which have no closures and no expressions of whole arrays.
_NOT_NEEDED = (InlineClosureLikes, NopythonRewrites)


def _pipeline(name: str, state: Any, lowering: Any) -> list[Any]:
    ours = {NativeLowering: lowering, DeadBranchPrune: _PruneAbsent}
    usual = DefaultPassBuilder.define_nopython_pipeline(state).passes
    steps = PassManager(name)
    steps.passes = [(ours.get(step, step), why) for step, why in usual if step not in _NOT_NEEDED]
    steps.finalize()
    return [steps]


class _CompilerOfKernels(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        return _pipeline("kernel", self.state, _LowerKernel)


class _CompilerOfParts(CompilerBase):  # type: ignore[misc]
    def define_pipelines(self) -> list[Any]:
        return _pipeline("part_of_kernels", self.state, _LowerPartOfKernels)


# Without Numba's runtime: kernels allocate nothing, and their callers hold all arrays, so nobody needs to count who
# uses them, by atomic additions in the midst of loops.
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "_nrt": False, "no_cfunc_wrapper": True}
_OPTIONS_OF_PARTS = {**_OPTIONS, "no_cpython_wrapper": True, "pipeline_class": _CompilerOfParts}


def inline(function: Callable[..., Any]) -> Any:
    """A function called by kernels; compiled into them, and callable from nowhere else."""
    return numba.njit(**_OPTIONS_OF_PARTS)(function)


def inline_always(function: Callable[..., Any]) -> Any:
    """`inline`, forced, for a small step in a hot loop: a call that LLVM leaves there copies its arrays and records
    word by word, which takes longer than the step."""
    return numba.njit(forceinline=True, **_OPTIONS_OF_PARTS)(function)


_waiting: dict[Any, tuple[Kernel, Any, tuple[Any, ...]]] | None = None


@contextlib.contextmanager
def listing() -> Iterator[dict[Any, tuple[Kernel, Any, tuple[Any, ...]]]]:
    """Kernels that are called in this context do not run. For each that is not compiled yet, the dict gets the kernel
    and the arguments of its `prepare`."""
    global _waiting
    _waiting = {}
    try:
        yield _waiting
    finally:
        _waiting = None


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Compiling makes many objects, nearly none of them garbage: looking for it takes a tenth of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


_resolved: dict[Any, Any] = {}


@contextlib.contextmanager
def _calls_resolved_once() -> Iterator[None]:
    """What `a + b` is for some types, Numba looks up among dozens of candidates, always anew: a tenth of the time."""
    usual = BaseFunction.get_call_type

    def get_call_type(self: Any, context: Any, args: Any, kws: Any) -> Any:
        key = context, id(self), len(self.templates), args, tuple(kws.items())
        if key not in _resolved:
            _resolved[key] = usual(self, context, args, kws), self  # an id is unique as long as its object lives
        return _resolved[key][0]

    BaseFunction.get_call_type = get_call_type  # type: ignore[method-assign]
    try:
        yield
    finally:
        BaseFunction.get_call_type = usual  # type: ignore[method-assign]


class Kernel:
    """An entry point: a Numba function that runs without the GIL, compiled at its first call for a dtype."""

    def __init__(self, function: Callable[..., Any]) -> None:
        if numba.config.DISABLE_JIT:
            raise RuntimeError("pydeform computes in kernels that Numba compiles, which NUMBA_DISABLE_JIT forbids")
        self.call = numba.njit(pipeline_class=_CompilerOfKernels, **_OPTIONS)(function)
        self._compiled: dict[Any, Callable[..., None]] = {}

    def prepare(self, key: Any, arguments: tuple[Any, ...]) -> Callable[..., None] | None:
        """What to call for arguments of these types, compiled or loaded from disk. `key` stands for the types: where it
        is known, the arguments are not looked at. None: nothing is to be called, kernels are only listed."""
        if _waiting is not None:
            if key not in self._compiled:
                _waiting.setdefault((self, key), (self, key, arguments))
            return None
        if key not in self._compiled:
            _background.complete(lambda: self._compile(key, arguments), self._say_compiling)
        return self._compiled[key]

    def _compile(self, key: Any, arguments: tuple[Any, ...]) -> None:
        if key in self._compiled:  # by another thread, meanwhile
            return
        function = self.call.py_func
        folder = cache_directory()
        # Kernels of others (tests, say) are not kept: nobody would see an edit in their sources.
        if not self._compiled and folder is not None and function.__module__.startswith("pydeform."):
            self.call._cache = KernelCache(function, folder)
        types = tuple(typeof(argument) for argument in arguments)
        # Under the lock that forks wait for.
        with global_compiler_lock, compiled_once(folder, f"{function.__qualname__} {types}"):
            with _collector_paused(), _calls_resolved_once():
                self._compiled[key] = self.call.compile(types)

    def count_of_compiled(self) -> int:
        """For how many types this process has compiled it, rather than loaded it."""
        return sum(self.call.stats.cache_misses.values())

    def _say_compiling(self) -> None:
        # Looked at as they are now: another thread, which compiles, adds to them. An OrderedDict's own iterator looks
        # each key up, in Python, where threads may change.
        misses, ready = tuple(self.call.stats.cache_misses), tuple(dict.keys(self.call.overloads))
        if set(misses) - set(ready):  # not loading, nor waiting for another kernel
            where = cache_directory()
            kept = f"kept in {where}" if where else "not kept: no writable cache folder"
            say_once(f"compiling kernels for this machine ({kept})")
