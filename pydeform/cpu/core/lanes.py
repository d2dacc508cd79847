"""Vectors of numbers in LLVM's instructions, as primitives emit them, and primitives that exist for any width of them.

Widths are bytes: 16 for SSE and NEON, 32 for AVX2, 64 for AVX-512. Sums run in one fixed order at a given width, so a
result depends on neither threads nor tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from pydeform.cpu.core.primitive import INT, const, function_of, loop, primitive
from pydeform.cpu.core.simd import VECTOR_BYTES, host_features

LANE = ir.IntType(32)
BITS = ir.IntType(16)


class BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


def bfloat16_bits(builder: Any, number: Any) -> Any:
    """Of float32, one number or a vector of them: what is nearest in bfloat16, ties to even."""
    lanes = getattr(number.type, "count", None)

    def kind(element: Any) -> Any:
        return element if lanes is None else ir.VectorType(element, lanes)

    if "avx512bf16" in host_features():
        return builder.bitcast(builder.fptrunc(number, kind(BFloat())), kind(BITS))

    # Elsewhere LLVM calls a function for that, which not every system has.
    def whole(value: int) -> Any:
        return ir.Constant(kind(LANE), value if lanes is None else [value] * lanes)

    bits = builder.bitcast(number, kind(LANE))
    high = builder.lshr(bits, whole(16))
    is_odd = builder.and_(high, whole(1))
    nearest = builder.lshr(builder.add(builder.add(bits, whole(0x7FFF)), is_odd), whole(16))
    quiet = builder.or_(high, whole(0x40))  # NaN, whatever its last bits are
    return builder.trunc(builder.select(builder.fcmp_unordered("uno", number, number), quiet, nearest), kind(BITS))


def for_any_width(define: Callable[..., Any], *given: Any) -> Any:
    """A primitive for this machine, where `define` takes the bytes of a vector and then what is given before the types;
    `of_width` gives it for other machines, and for 0 with a single lane."""
    made = primitive(define, VECTOR_BYTES, *given)
    made.of_width = lambda vector_bytes: primitive(define, vector_bytes, *given)
    return made


def place_of(builder: Any, index: Any, i: Any) -> Any:
    """index[i], where `index` points to ints of any width."""
    place = builder.load(builder.gep(index, [i]))
    return builder.sext(place, INT) if place.type.width < 64 else place


def in_runs(v: Vectors, vectors: Any, sizes: tuple[int, ...], body: Callable[[list[Any]], None]) -> None:
    """body(where some vectors begin): all `vectors`, as many at a time as `sizes` say, the last of which is 1. So many
    vectors of sums stay in registers, and what all of them take is loaded once for as many."""
    builder, done = v.builder, const(0)
    for size in sizes:
        runs = builder.sdiv(builder.sub(vectors, done), const(size))

        def step(i: Any, _: list[Any], start: Any = done, size: int = size) -> list[Any]:
            first = builder.add(start, builder.mul(i, const(size)))
            body([builder.mul(builder.add(first, const(j)), const(v.lanes)) for j in range(size)])
            return []

        loop(builder, runs, [], step)
        done = builder.add(done, builder.mul(runs, const(size)))


def in_pieces(v: Vectors, channels: Any, sizes: tuple[int, ...], body: Callable[[list[Any], Any, Any], None]) -> None:
    """body(where some vectors begin, load, store): `in_runs` for all channels. The last vector is masked: what lies
    beyond belongs to others, and to another thread."""
    builder, whole = v.builder, v.builder.sdiv(channels, const(v.lanes))
    in_runs(v, whole, sizes, lambda places: body(places, v.load, v.store))
    place = builder.mul(whole, const(v.lanes))
    left = builder.sub(channels, place)
    with builder.if_then(builder.icmp_signed(">", left, const(0))):
        mask = v.first_lanes(left)
        body(
            [place],
            lambda pointer: v.masked_load(pointer, mask),
            lambda value, pointer: v.masked_store(value, pointer, mask),
        )


def shuffle(builder: Any, low: Any, high: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(LANE, len(lanes)), lanes))


def in_lanes(builder: Any, number: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(LANE, 0))
    return shuffle(builder, one, undefined, [0] * lanes)


def transposed(builder: Any, rows: list[Any]) -> list[Any]:
    """As many vectors as each has lanes: lane j of row i becomes lane i of row j, halves of ever smaller squares."""
    rows, n = list(rows), len(rows)
    half = n // 2
    while half:
        low = [j if not j & half else n + j - half for j in range(n)]
        high = [j + half if not j & half else n + j for j in range(n)]
        for i in range(n):
            if not i & half:
                pair = rows[i], rows[i + half]
                rows[i], rows[i + half] = (shuffle(builder, *pair, lanes) for lanes in (low, high))
        half //= 2
    return rows


class Vectors:
    """Emits loads, stores and arithmetic on vectors of one element type."""

    def __init__(self, builder: Any, element: Any, vector_bytes: int) -> None:
        self.builder = builder
        self.element = ir.FloatType() if element == types.float32 else ir.DoubleType()
        self.itemsize = element.bitwidth // 8
        self.lanes = max(vector_bytes // self.itemsize, 1)
        self.type = ir.VectorType(self.element, self.lanes)
        self.zero = ir.Constant(self.type, [0.0] * self.lanes)
        self.minus_zero = ir.Constant(self.type, [-0.0] * self.lanes)  # plus a product is the product, -0 too

    def offset(self, pointer: Any, elements: Any) -> Any:
        return self.builder.gep(pointer, [elements])

    def _as_vector(self, pointer: Any) -> Any:
        return self.builder.bitcast(pointer, self.type.as_pointer())

    def load(self, pointer: Any) -> Any:
        value = self.builder.load(self._as_vector(pointer))
        value.align = self.itemsize
        return value

    def store(self, value: Any, pointer: Any) -> None:
        """The numbers, or what is left of them in bfloat16 where the pointer is one to 16 bits."""
        if pointer.type.pointee == BITS:
            narrow = bfloat16_bits(self.builder, value)
            self.builder.store(narrow, self.builder.bitcast(pointer, narrow.type.as_pointer())).align = 2
            return
        self.builder.store(value, self._as_vector(pointer)).align = self.itemsize

    def splat(self, number: Any) -> Any:
        return in_lanes(self.builder, number, self.lanes)

    def load_splat(self, pointer: Any, i: Any) -> Any:
        """pointer[i] in every lane."""
        return self.splat(self.builder.load(self.offset(pointer, i)))

    def fma(self, x: Any, y: Any, z: Any) -> Any:
        """x * y + z, fused where the machine can."""
        return self.call("fmuladd", [x, y, z])

    def sum(self, vector: Any) -> Any:
        """Sum of the lanes, halves first."""
        width = self.lanes
        while width > 1:
            half = width // 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low = shuffle(self.builder, vector, undefined, list(range(half)))
            high = shuffle(self.builder, vector, undefined, list(range(half, width)))
            vector, width = self.builder.fadd(low, high), half
        return self.builder.extract_element(vector, ir.Constant(LANE, 0))

    def sum_each(self, vectors: list[Any]) -> Any:
        """The sums of the lanes of some vectors, a power of two of them, side by side: the bits of `sum`."""
        width = self.lanes  # of the run of lanes that each has left
        runs = [(vector, [i]) for i, vector in enumerate(vectors)]  # in one vector, and whose they are
        while len(runs) > 1 and width > 1:
            width //= 2
            runs = [self._folded(*pair, width) for pair in zip(runs[::2], runs[1::2], strict=True)]
        sums = [self._summed(vector, width, owners) for vector, owners in runs]
        while len(sums) > 1:
            sums = [self._joined(*pair) for pair in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    def _joined(self, low: Any, high: Any) -> Any:
        return shuffle(self.builder, low, high, list(range(low.type.count + high.type.count)))

    def _folded(self, low: tuple[Any, list[int]], high: tuple[Any, list[int]], width: int) -> tuple[Any, list[int]]:
        """Of runs of 2*width lanes the first halves plus the second halves, of two vectors in one. What is shorter than
        16 bytes does not leave those that it lies in: all else takes x86 longer."""
        (one, of_one), (two, of_two) = low, high
        lanes = one.type.count
        runs = max(16 // self.itemsize // (2 * width), 1) if width * self.itemsize < 16 else lanes // (2 * width)
        starts, owners = [], []
        for first in range(0, lanes // (2 * width), runs):
            for offset, of in ((0, of_one), (lanes, of_two)):
                starts += [offset + 2 * width * run for run in range(first, first + runs)]
                owners += of[first : first + runs]
        halves = ([start + half + i for start in starts for i in range(width)] for half in (0, width))
        return self.builder.fadd(*(shuffle(self.builder, one, two, lanes) for lanes in halves)), owners

    def _summed(self, vector: Any, width: int, owners: list[int]) -> Any:
        """Each run of `width` lanes in one lane, in the order of their owners."""
        builder = self.builder
        while width > 1:
            half = width // 2
            if len(owners) == 1 or width * self.itemsize > 16:  # fewer lanes are faster
                starts = [width * run for run in range(len(owners))]
                halves = ([start + there + i for start in starts for i in range(half)] for there in (0, half))
                vector, width = builder.fadd(*(shuffle(builder, vector, vector, lanes) for lanes in halves)), half
            else:
                swapped = [lane + half if lane % width < half else lane - half for lane in range(vector.type.count)]
                vector = builder.fadd(vector, shuffle(builder, vector, vector, swapped))
                width = half
        step = vector.type.count // len(owners)
        return shuffle(builder, vector, vector, [step * owners.index(i) for i in sorted(owners)])

    def first_lanes(self, count: Any) -> Any:
        """Mask that is true in the first `count` lanes, which is compared in integers of the lanes' own width."""
        integer = ir.IntType(8 * self.itemsize)
        lanes = ir.Constant(ir.VectorType(integer, self.lanes), list(range(self.lanes)))
        most = self.builder.select(self.builder.icmp_signed("<", count, const(self.lanes)), count, const(self.lanes))
        narrow = most if integer.width == 64 else self.builder.trunc(most, integer)
        return self.builder.icmp_signed("<", lanes, in_lanes(self.builder, narrow, self.lanes))

    def masked_load(self, pointer: Any, mask: Any) -> Any:
        arguments = [self._as_vector(pointer), ir.Constant(LANE, self.itemsize), mask, self.zero]
        return self.call("masked.load", arguments, more=f".p0{self._suffix()}")

    def masked_store(self, value: Any, pointer: Any, mask: Any) -> None:
        arguments = [value, self._as_vector(pointer), ir.Constant(LANE, self.itemsize), mask]
        self.call("masked.store", arguments, ir.VoidType(), f".p0{self._suffix()}")

    def gather(self, pointer: Any, places: Any, mask: Any) -> Any:
        """pointer[places], ints of 32 bits, where the mask is true; elsewhere zeros, and pointer[0] may be read."""
        if self.lanes * self.itemsize < 64:
            found = self._one_by_one(pointer, self.element, self._safe(places, mask))
            return self.builder.select(mask, found, self.zero)
        # One pointer and many steps is what processors know, and what llvmlite does not.
        addresses = self.offset(pointer, const(0))
        addresses.indices, addresses.type = [places], ir.VectorType(pointer.type, self.lanes)
        addresses = self.builder.bitcast(addresses, ir.VectorType(self.element.as_pointer(), self.lanes))
        arguments = [addresses, ir.Constant(LANE, 4), mask, self.zero]
        return self.call("masked.gather", arguments, more=f".v{self.lanes}p0f{8 * self.itemsize}")

    def gather_numbered(self, pointer: Any, numbers: Any) -> Any:
        """pointer[n] for each of the ints of 32 bits that `numbers` points to, and zeros for those with a sign, without
        which they are places that may be read."""
        builder = self.builder
        places = builder.load(builder.bitcast(numbers, ir.VectorType(LANE, self.lanes).as_pointer()))
        places.align = 4
        exists = builder.icmp_signed(">=", places, ir.Constant(places.type, [0] * self.lanes))
        if self.lanes * self.itemsize >= 64:
            return self.gather(pointer, places, exists)
        found = []
        for lane in range(self.lanes):  # loaded again, which is faster than taking it out of the vector
            number = builder.load(builder.gep(numbers, [const(lane)]))
            found.append(builder.zext(builder.and_(number, LANE(2**31 - 1)), INT))
        return builder.select(exists, self._one_by_one(pointer, self.element, found), self.zero)

    def gather_pairs(self, pointer: Any, places: Any, mask: Any) -> list[Any]:
        """pointer[places] and pointer[places + 1] where the mask is true; elsewhere anything, and the first two may be
        read. Two floats of 32 bits come as one of 64: half as much to gather."""
        builder, lanes = self.builder, self.lanes
        if self.itemsize == 8:
            following = builder.add(places, ir.Constant(places.type, [1] * lanes))
            return [self.gather(pointer, at, mask) for at in (places, following)]
        if lanes < 16:
            pairs = self._one_by_one(pointer, ir.DoubleType(), self._safe(places, mask))
            low = high = builder.bitcast(pairs, ir.VectorType(self.element, 2 * lanes))
            return [shuffle(builder, low, high, list(range(first, 2 * lanes, 2))) for first in (0, 1)]
        wide, halves = Vectors(builder, types.float64, lanes * 4), []
        for start in (0, lanes // 2):
            half = list(range(start, start + lanes // 2))
            some, there = (shuffle(builder, vector, vector, half) for vector in (places, mask))
            halves.append(builder.bitcast(wide.gather(pointer, some, there), self.type))
        low, high = halves
        return [shuffle(builder, low, high, list(range(first, 2 * lanes, 2))) for first in (0, 1)]

    def _safe(self, places: Any, mask: Any) -> list[Any]:
        """Each lane's place; 0 where the mask is false."""
        builder = self.builder
        safe = builder.select(mask, places, ir.Constant(places.type, [0] * self.lanes))
        return [builder.sext(builder.extract_element(safe, ir.Constant(LANE, lane)), INT) for lane in range(self.lanes)]

    def _one_by_one(self, pointer: Any, element: Any, places: list[Any]) -> Any:
        """A load of an `element` for each lane. AVX2's instruction for that takes longer, and where there is none LLVM
        makes a branch for each lane."""
        builder = self.builder
        found = ir.Constant(ir.VectorType(element, self.lanes), ir.Undefined)
        for lane, place in enumerate(places):
            value = builder.load(builder.bitcast(builder.gep(pointer, [place]), element.as_pointer()))
            value.align = self.itemsize
            found = builder.insert_element(found, value, ir.Constant(LANE, lane))
        return found

    def _suffix(self) -> str:
        return f"v{self.lanes}f{8 * self.itemsize}"

    def call(self, name: str, arguments: list[Any], result: Any = None, more: str = "") -> Any:
        """LLVM's function of this name; its result is a vector, unless another type is given."""
        kinds = [argument.type for argument in arguments]
        full = f"llvm.{name}.{self._suffix()}{more}"
        return self.builder.call(function_of(self.builder, full, result or self.type, kinds), arguments)
