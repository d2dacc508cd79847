"""The threads of one block that run PTX, and what each instruction does to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

FLOATS = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "tf32": np.float32, "f32": np.float32, "f64": np.float64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
SHARED = 1024  # address of the dynamic array; up to here hardware keeps some for itself
GLOBAL = 1 << 40
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    **{"eq": np.equal, "ne": lambda a, b: (a < b) | (a > b), "lt": np.less, "le": np.less_equal, "gt": np.greater},
    **{"ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    **{"neu": lambda a, b: ~(a == b) | (a != a), "num": lambda a, b: (a == a) & (b == b)},
    **{"nan": lambda a, b: (a != a) | (b != b), "ltu": lambda a, b: ~(a >= b), "gtu": lambda a, b: ~(a <= b)},
    **{"leu": lambda a, b: ~(a > b), "geu": lambda a, b: ~(a < b)},
}
# Parts of a name without which, or with others beside which, an instruction would do something else.
MODIFIERS = {
    **{name: {"rn", "ftz", "wide", "lo"} for name in ("add", "sub", "mul", "fma", "min", "max")},
    "cvt": {"rn", "rni", "rzi", "rmi", "rpi", "ftz"},
    "atom": {"global", "add", "relaxed", "gpu"},
    "red": {"global", "add", "relaxed", "gpu", "v4"},
    "ld": {"param", "global", "shared", "nc", "v2", "v4"},
    "st": {"global", "shared", "v2", "v4"},
    "ldmatrix": {"sync", "aligned", "m8n8", "x4", "trans", "shared"},
}
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    **{"add": np.add, "sub": np.subtract, "mul": np.multiply, "and": np.bitwise_and, "or": np.bitwise_or},
    **{"xor": np.bitwise_xor, "min": np.fmin, "max": np.fmax},  # of one NaN and a number the number
}
ROUND = {"rmi": np.floor, "rpi": np.ceil, "rni": np.rint, "rzi": np.trunc}


class Unknown(NotImplementedError):
    """An instruction that this module does not know."""


class Instruction(NamedTuple):
    guard: str  # a predicate's name, with ! before it when it must be false; empty: always
    name: list[str]  # cut at its dots
    operands: list[str]


def size_of(kind: str) -> int:
    """In bits, of a type such as s32."""
    return 1 if kind == "pred" else 32 if kind == "tf32" else int(re.sub(r"\D+", "", kind))


class Block:
    """The threads of one block and what they hold. Those that are furthest behind go on, so that all meet again."""

    def __init__(
        self,
        code: Sequence[Instruction],
        labels: dict[str, int],
        memory: Any,
        parameters: dict[str, int],
        number: int,
        grid: int,
        size: int,
    ):
        self.code, self.labels, self.memory, self.parameters, self.size = code, labels, memory, parameters, size
        self.registers: dict[str, np.ndarray[Any, Any]] = {
            "%tid.x": np.arange(size, dtype=np.uint64),
            **{
                name: np.full(size, value, np.uint64)
                for name, value in (("%ctaid.x", number), ("%ntid.x", size), ("%nctaid.x", grid))
            },
        }
        self.place = np.zeros(size, np.int64)
        self.active = np.ones(size, bool)
        self.copies: list[list[tuple[Any, Any, Any]]] = [[]]
        self.products: list[list[Callable[[], None]]] = [[]]
        self.fenced = False

    def run(self) -> None:
        end = len(self.code)
        while (waiting := self.place[self.place < end]).size:
            here = int(waiting.min())
            instruction, self.active = self.code[here], self.place == here
            self.place[self.active] += 1
            if instruction.guard:
                value = self.get(instruction.guard.lstrip("!"), "pred").astype(bool)
                self.active = self.active & (value != instruction.guard.startswith("!"))
            opcode = instruction.name[0]
            if opcode == "bra":
                self.place[self.active] = self.labels[instruction.operands[0]]
            elif opcode in ("ret", "exit"):
                self.place[self.active] = end
            elif self.active.any():
                method = getattr(self, f"do_{opcode}", self.do_binary if opcode in BINARY else None)
                kinds = instruction.name[-2:] if opcode == "cvt" else instruction.name[-1:]
                others = set(instruction.name[1:]) - MODIFIERS.get(opcode, set(instruction.name)) - set(kinds)
                if method is None or others:
                    raise Unknown(".".join(instruction.name))
                method(instruction.name, instruction.operands)
        if any(self.copies) or any(self.products):
            raise RuntimeError("the block ends while copies or products are under way")

    # ---- operands
    def get(self, operand: str, kind: str) -> np.ndarray[Any, Any]:
        """Of all threads, as the type says."""
        bits = size_of(kind)
        if operand in self.registers:
            raw = self.registers[operand]
        elif operand == "pydeform_dynamic_shared":
            raw = np.full(self.size, SHARED, np.uint64)
        elif found := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            raw = np.full(self.size, int(found[1] or found[2], 16), np.uint64)
        elif re.fullmatch(r"-?\d+|-?0x[0-9a-fA-F]+", operand):
            raw = np.full(self.size, int(operand, 0) & (1 << 64) - 1, np.uint64)
        else:
            raise Unknown(f"operand {operand}")
        if kind == "pred":
            return raw
        narrow = raw.astype(UNSIGNED[bits])
        if kind in FLOATS:
            return narrow.view(FLOATS[kind])
        return narrow.view(SIGNED[bits]) if kind[0] == "s" else narrow

    def put(self, operand: str, kind: str, value: Any) -> None:
        if kind == "pred":
            raw = np.asarray(value).astype(np.uint64)
        elif kind in FLOATS:
            raw = np.asarray(value, FLOATS[kind]).view(UNSIGNED[size_of(kind)]).astype(np.uint64)
        else:
            raw = np.asarray(value).astype(UNSIGNED[size_of(kind)]).astype(np.uint64)
        before = self.registers.get(operand, np.full(self.size, 0xA5A5A5A5, np.uint64))
        self.registers[operand] = np.where(self.active, raw, before)

    def address(self, operand: str) -> np.ndarray[Any, Any]:
        base, _, offset = operand.strip("[]").partition("+")
        return self.get(base, "s64") + int(offset or 0)

    def vector(self, operand: str) -> list[str]:
        return [part.strip() for part in operand.strip("{}").split(",")]

    def floats(self, name: list[str], operand: str, kind: str) -> np.ndarray[Any, Any]:
        return flush(self.get(operand, kind)) if "ftz" in name else self.get(operand, kind)

    def put_floats(self, name: list[str], operand: str, kind: str, value: Any) -> None:
        value = np.asarray(value, FLOATS[kind])
        self.put(operand, kind, flush(value) if "ftz" in name else value)

    # ---- moves and memory
    def do_mov(self, name: list[str], operands: list[str]) -> None:
        to, source = operands
        bits = size_of(name[-1])
        if source.startswith("{"):
            parts = self.vector(source)
            each = bits // len(parts)
            value = sum(
                self.get(part, f"u{each}").astype(np.uint64) << np.uint64(i * each) for i, part in enumerate(parts)
            )
            self.put(to, f"u{bits}", value)
        elif to.startswith("{"):
            parts = self.vector(to)
            each = bits // len(parts)
            value = self.get(source, f"u{bits}").astype(np.uint64)
            for i, part in enumerate(parts):
                self.put(part, f"u{each}", value >> np.uint64(i * each))
        else:
            self.put(to, f"u{bits}" if bits > 1 else "pred", self.get(source, f"u{bits}" if bits > 1 else "pred"))

    def do_cvta(self, name: list[str], operands: list[str]) -> None:
        self.put(operands[0], "u64", self.get(operands[1], "u64"))

    def do_ld(self, name: list[str], operands: list[str]) -> None:
        to, bits = self.vector(operands[0]), size_of(name[-1])
        if "param" in name:
            return self.put(to[0], f"u{bits}", np.full(self.size, self.parameters[operands[1].strip("[]")], np.uint64))
        data = self.memory.load(self.address(operands[1])[self.active], bits // 8 * len(to))
        for part, register in zip(data.view(UNSIGNED[bits]).T, to, strict=True):
            self.put(register, f"u{bits}", self.spread(part))

    def do_st(self, name: list[str], operands: list[str]) -> None:
        parts, bits = self.vector(operands[1]), size_of(name[-1])
        values = np.stack([self.get(part, f"u{bits}") for part in parts], axis=-1)
        self.memory.store(
            self.address(operands[0])[self.active], np.ascontiguousarray(values[self.active]).view(np.uint8)
        )

    def spread(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Those of the active threads, with zeros for the others."""
        full = np.zeros(self.size, values.dtype)
        full[self.active] = values
        return full

    def do_atom(self, name: list[str], operands: list[str]) -> None:
        self._add(name, operands[1], [operands[2]], operands[0])

    def do_red(self, name: list[str], operands: list[str]) -> None:
        self._add(name, operands[0], self.vector(operands[1]), None)

    def _add(self, name: list[str], where: str, values: list[str], old: str | None) -> None:
        if "add" not in name or "global" not in name:
            raise Unknown(".".join(name))
        kind = name[-1]
        dtype = np.dtype(FLOATS.get(kind) or UNSIGNED[size_of(kind)])
        addends = [self.get(value, kind) for value in values]
        before = np.zeros(self.size, dtype)
        for thread in np.flatnonzero(self.active):
            for i, addend in enumerate(addends):
                place = self.address(where)[thread : thread + 1] + i * dtype.itemsize
                value = self.memory.load(place, dtype.itemsize).view(dtype)[0]
                before[thread] = value[0]
                total = flush(flush(value) + flush(addend[thread])) if kind == "f32" else value + addend[thread]
                self.memory.store(place, total.reshape(1, 1).view(np.uint8))
        if old:
            self.put(old, f"u{8 * dtype.itemsize}", before.view(UNSIGNED[8 * dtype.itemsize]))

    # ---- arithmetic
    def do_binary(self, name: list[str], operands: list[str]) -> None:
        to, a, b = operands
        kind = name[-1]
        function = BINARY[name[0]]
        if kind in FLOATS:
            self.put_floats(name, to, kind, function(self.floats(name, a, kind), self.floats(name, b, kind)))
        else:
            self.put(to, kind, function(self.get(a, kind), self.get(b, kind)))

    def do_mul(self, name: list[str], operands: list[str]) -> None:
        if "wide" in name:
            to, kind, wide = operands[0], name[-1], name[-1][0] + str(2 * size_of(name[-1]))
            a, b = (self.get(operand, kind).astype(SIGNED[size_of(wide)]) for operand in operands[1:])
            return self.put(to, wide, a * b)
        self.do_binary(name, operands)

    def do_mad(self, name: list[str], operands: list[str]) -> None:
        if "lo" not in name:
            raise Unknown(".".join(name))
        a, b, c = (self.get(operand, name[-1]) for operand in operands[1:])
        self.put(operands[0], name[-1], a * b + c)

    def do_fma(self, name: list[str], operands: list[str]) -> None:
        a, b, c = (self.floats(name, operand, name[-1]).astype(np.longdouble) for operand in operands[1:])
        self.put_floats(name, operands[0], name[-1], (a * b + c).astype(FLOATS[name[-1]]))

    def do_neg(self, name: list[str], operands: list[str]) -> None:
        self.put(operands[0], name[-1], -self.get(operands[1], name[-1]))

    def do_not(self, name: list[str], operands: list[str]) -> None:
        self.put(operands[0], name[-1], self.get(operands[1], name[-1]) ^ (1 if name[-1] == "pred" else -1))

    def do_shl(self, name: list[str], operands: list[str]) -> None:
        self.put(operands[0], name[-1], self.get(operands[1], name[-1]) << self.get(operands[2], name[-1]))

    def do_shr(self, name: list[str], operands: list[str]) -> None:
        self.put(operands[0], name[-1], self.get(operands[1], name[-1]) >> self.get(operands[2], name[-1]))

    def do_bfi(self, name: list[str], operands: list[str]) -> None:
        to, inserted, base, first, length = operands
        place, bits = self.get(first, "u32").astype(np.uint64), self.get(length, "u32").astype(np.uint64)
        mask = ((np.uint64(1) << bits) - np.uint64(1)) << place
        value = self.get(inserted, "u64") << place & mask | self.get(base, "u64") & ~mask
        self.put(to, name[-1], value)

    def do_prmt(self, name: list[str], operands: list[str]) -> None:
        to, a, b, selector = operands
        if name != ["prmt", "b32"]:
            raise Unknown(".".join(name))
        both = self.get(b, "u32").astype(np.uint64) << np.uint64(32) | self.get(a, "u32")
        digits = self.get(selector, "u32").astype(np.uint64)
        result = np.zeros(self.size, np.uint64)
        for i in range(4):
            digit = digits >> np.uint64(4 * i)
            byte = both >> (digit & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            sign = np.where(byte >> np.uint64(7), np.uint64(255), np.uint64(0))
            result |= np.where(digit & np.uint64(8), sign, byte) << np.uint64(8 * i)
        self.put(to, "u32", result)

    def do_setp(self, name: list[str], operands: list[str]) -> None:
        kind = name[-1]
        a, b = (
            self.floats(name, operand, kind) if kind in FLOATS else self.get(operand, kind) for operand in operands[1:3]
        )
        if len(operands) > 3 or name[1] not in COMPARE:
            raise Unknown(".".join(name))
        self.put(operands[0], "pred", COMPARE[name[1]](a, b))

    def do_selp(self, name: list[str], operands: list[str]) -> None:
        to, a, b, which = operands
        kind = f"u{size_of(name[-1])}"
        self.put(to, kind, np.where(self.get(which, "pred") != 0, self.get(a, kind), self.get(b, kind)))

    def do_cvt(self, name: list[str], operands: list[str]) -> None:
        to, source = name[-2:]
        if to in ("f16", "bf16", "f16x2", "bf16x2") and "rn" not in name:
            raise Unknown(".".join(name))
        if to in ("f16x2", "bf16x2"):
            high, low = (narrowed(self.get(operand, source), to[:-2]) for operand in operands[1:])
            return self.put(operands[0], "u32", high.astype(np.uint32) << np.uint32(16) | low)
        value = self.get(operands[1], source)
        if source in FLOATS and "ftz" in name and source == "f32":
            value = flush(value)
        rounding = next((ROUND[part] for part in name if part in ROUND), None)
        if rounding:
            value = rounding(value)
        if to in ("f16", "bf16"):
            return self.put(operands[0], "u16", narrowed(value, to))
        if to in FLOATS:
            return self.put_floats(name if to == "f32" else [], operands[0], to, value.astype(FLOATS[to]))
        if source in FLOATS:  # NaN becomes 0, the rest the nearest there is
            limits = np.iinfo((SIGNED if to[0] == "s" else UNSIGNED)[size_of(to)])
            value = np.clip(np.nan_to_num(value.astype(np.float64)), limits.min, limits.max).astype(np.int64)
        self.put(operands[0], to, value.astype(np.int64) if to[0] == "s" else value)

    # ---- threads together
    def do_bar(self, name: list[str], operands: list[str]) -> None:
        if "sync" not in name:
            raise Unknown(".".join(name))
        if name[1] != "warp" and (self.active != (self.place < len(self.code))).any():
            raise RuntimeError("some threads wait at a barrier and others are elsewhere")

    do_barrier = do_bar

    def do_shfl(self, name: list[str], operands: list[str]) -> None:
        to, source, by, clamp, _ = operands
        lane = np.arange(self.size) % 32
        b, c = self.get(by, "s32"), self.get(clamp, "s32")
        segment, last = c >> 8 & 31, c & 31
        first = lane & segment
        limit = first | (last & ~segment & 31)
        mode = name[2]
        j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment & 31)}[mode]
        inside = j >= limit if mode == "up" else j <= limit
        from_lane = np.where(inside, j, lane) - lane + np.arange(self.size)
        value, _, predicate = to.partition("|")
        if not self.active[from_lane[self.active]].all():
            raise RuntimeError("a shuffle from a thread that takes no part")
        self.put(value, "u32", self.get(source, "u32")[from_lane])
        if predicate:
            self.put(predicate, "pred", inside)

    def do_vote(self, name: list[str], operands: list[str]) -> None:
        if "ballot" not in name:
            raise Unknown(".".join(name))
        votes = (self.get(operands[1], "pred") != 0) & self.active
        bits = votes.reshape(-1, 32) @ (np.uint64(1) << np.arange(32, dtype=np.uint64))
        self.put(operands[0], "u32", np.repeat(bits, 32))

    # ---- copies
    def do_cp(self, name: list[str], operands: list[str]) -> None:
        match name[2]:
            case "cg" if len(operands) == 4:
                to, source, size, read = operands
                if size != "16":
                    raise Unknown(f"cp.async.cg of {size} bytes")
                target, count = self.address(to)[self.active], self.get(read, "s32")[self.active]
                self.memory.store(target, np.full((len(target), 16), 0xFF, np.uint8))
                self.copies[-1].append((target, self.address(source)[self.active], count))
            case "commit_group":
                self.copies.append([])
            case "wait_group":
                while len(self.copies) - 1 > int(operands[0]):
                    for target, source, count in self.copies.pop(0):
                        data = np.zeros((len(target), 16), np.uint8)
                        data[count > 0] = self.memory.load(source[count > 0], 16)
                        data[np.arange(16) >= count[:, None]] = 0
                        self.memory.store(target, data)
            case _:
                raise Unknown(".".join(name))

    def do_fence(self, name: list[str], operands: list[str]) -> None:
        if name[1:] != ["proxy", "async", "shared::cta"]:
            raise Unknown(".".join(name))

    # ---- matrices
    def whole_warps(self) -> int:
        if not self.active.reshape(-1, 32).all(1)[self.active.reshape(-1, 32).any(1)].all():
            raise RuntimeError("a warp's instruction without all of its lanes")
        return self.size // 32

    def do_ldmatrix(self, name: list[str], operands: list[str]) -> None:
        warps, registers = self.whole_warps(), self.vector(operands[0])
        if "x4" not in name or "b16" not in name or len(registers) != 4:
            raise Unknown(".".join(name))
        rows = self.memory.load(self.address(operands[1]), 16).view(np.uint16).reshape(warps, 4, 8, 8)
        if "trans" in name:
            rows = rows.swapaxes(2, 3)
        pairs = np.ascontiguousarray(rows).view(np.uint32).reshape(warps, 4, 32)  # row lane / 4, elements 2 (lane % 4)
        for m, register in enumerate(registers):
            self.put(register, "u32", pairs[:, m].reshape(-1))

    def do_mma(self, name: list[str], operands: list[str]) -> None:
        shape = re.fullmatch(r"m16n8k(\d+)", name[3])
        if name[1:3] != ["sync", "aligned"] or shape is None or name[4:6] != ["row", "col"]:
            raise Unknown(".".join(name))
        warps, depth, types = self.whole_warps(), int(shape[1]), name[6:]
        d, a, b, c = map(self.vector, operands)
        per = 32 // size_of(types[1])  # elements in a register
        A, B, D = np.zeros((warps, 16, depth)), np.zeros((warps, depth, 8)), np.zeros((warps, 16, 8))
        if len(a) * per * 32 != 16 * depth or len(b) * per * 32 != 8 * depth or types[0] != "f32" or types[3] != "f32":
            raise Unknown(".".join(name))
        g, t = np.divmod(np.arange(32), 4)
        for i, register in enumerate(a):  # rows g and g + 8, then the next 4 * per of k
            values = self.elements(register, types[1]).reshape(warps, 32, per)
            for e in range(per):
                A[:, g + 8 * (i % 2), per * t + e + 4 * per * (i // 2)] = values[:, :, e]
        for i, register in enumerate(b):
            values = self.elements(register, types[2]).reshape(warps, 32, per)
            for e in range(per):
                B[:, per * t + e + 4 * per * i, g] = values[:, :, e]
        for i, register in enumerate(c):
            D[:, g + 8 * (i // 2), 2 * t + i % 2] = self.get(register, "f32").reshape(warps, 32)
        D += A @ B
        for i, register in enumerate(d):
            self.put(register, "f32", D[:, g + 8 * (i // 2), 2 * t + i % 2].reshape(-1).astype(np.float32))

    def elements(self, register: str, kind: str) -> np.ndarray[Any, Any]:
        return widened(self.get(register, "u32").view(np.uint8), kind)

    def do_wgmma(self, name: list[str], operands: list[str]) -> None:
        if self.size % 128 or not self.active.all():
            raise RuntimeError("wgmma without all threads of its warpgroups")
        match name[1]:
            case "fence":
                self.fenced = True
            case "commit_group":
                self.products.append([])
            case "wait_group":
                while len(self.products) - 1 > int(operands[0]):
                    for product in self.products.pop(0):
                        product()
            case "mma_async":
                if not self.fenced:
                    raise RuntimeError("wgmma without a fence")
                self.products[-1].append(self.product(name, operands))
            case _:
                raise Unknown(".".join(name))

    def product(self, name: list[str], operands: list[str]) -> Callable[[], None]:
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", name[4])
        to, a_tile, b_tile, add, *flags = operands
        if (
            shape is None
            or self.size != 128
            or name[2:4] != ["sync", "aligned"]
            or name[5] != "f32"
            or flags not in (["1", "1"], ["1", "1", "0", "0"])
        ):
            raise Unknown(".".join(name))
        columns, depth, kind, registers = int(shape[1]), int(shape[2]), name[6], self.vector(to)
        a, b = (self.get(tile, "u64") for tile in (a_tile, b_tile))
        keep = self.get(add, "pred") != 0
        if (
            len(registers) != columns // 2
            or (a != a[0]).any()
            or (b != b[0]).any()
            or depth * size_of(kind) // 8 not in (32, 64)
        ):
            raise Unknown(".".join(name))
        thread = np.arange(128)

        def run() -> None:
            A = widened(self.rows(int(a[0]), 64), kind)[:, :depth]
            B = widened(self.rows(int(b[0]), columns), kind)[:, :depth]
            D = A @ B.T
            for i, register in enumerate(registers):
                row = 16 * (thread // 32) + thread % 32 // 4 + 8 * (i // 2 % 2)
                column = 8 * (i // 4) + 2 * (thread % 4) + i % 2
                before = np.where(keep, self.get(register, "f32").astype(np.float64), 0)
                self.put(register, "f32", (before + D[row, column]).astype(np.float32))

        return run

    def rows(self, descriptor: int, count: int) -> np.ndarray[Any, Any]:
        """32 bytes of each row of a tile, K-major, under the 128-byte swizzle."""
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        if descriptor >> 62 != 1 or descriptor >> 49 & 7 or descriptor >> 48 & 1:
            raise Unknown(f"descriptor {descriptor:x}")
        r = np.arange(count)
        address = start + r // 8 * stride + r % 8 * 128
        chunks = np.stack([address, address + 16], axis=1)
        return self.memory.load(chunks ^ (chunks >> 7 & 7) << 4, 16).reshape(count, 32)


def flush(v: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Denormals to zeros of their sign; of float32 alone, the one type with .ftz."""
    if v.dtype != np.float32:
        return v
    return np.where(np.abs(v) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), v), v)


def narrowed(v: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """The bits of float32 numbers as halves, to the nearest."""
    return np.where(v != v, 0x7FFF, v.astype(FLOATS[kind]).view(np.uint16)).astype(np.uint16)


def widened(data: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Bytes as elements of a product, in float64. tf32 has 10 bits of mantissa: the rest is not looked at."""
    if kind == "tf32":
        return (np.ascontiguousarray(data).view(np.uint32) & 0xFFFFE000).view(np.float32).astype(np.float64)
    return np.ascontiguousarray(data).view(FLOATS[kind]).astype(np.float64)
