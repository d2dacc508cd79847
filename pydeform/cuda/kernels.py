"""Instances of the kernels to compile ahead of any device, for whom, and the registers that each may take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pydeform._grid_geometry import BICUBIC, BILINEAR, NEAREST
from pydeform.cuda.conv.plan import ADJOINT, DEFORMED, PLAIN, data_product, forward_product, weight_product
from pydeform.cuda.core.numbers import C_TYPES
from pydeform.cuda.core.product import Product
from pydeform.cuda.core.source import Code

# A kernel of 256 threads may take 255 registers of a multiprocessor's 65,536; 128 let two blocks run side by side.
CAPABILITIES = {75: ("75",), 80: ("80", "90"), 90: ("90a",)}
EVERY = ("75", "80", "90")
OUTPUTS = (256, 64, 128)  # of a group: for each there is a width of tile


CODES = (
    *(Code("conv"), Code("conv", 1), Code("conv", 3), Code("conv", 2, active=True)),
    *(Code("roi"), Code("roi", surface=True), Code("gather"), Code("grid"), Code("grid", 3)),
)


class Instance(NamedTuple):
    code: Code
    expression: str
    architectures: tuple[str, ...]  # of NVRTC; what is compiled for "90" also serves whatever comes after it
    registers: int  # budget


def instances(code: Code) -> list[Instance]:
    """Kernels that are launched: the widest tiles for every architecture, the narrower ones for one.

    What tells them apart from others is asked in two dimensions, where all are listed. Of the rest there is what needs
    most registers in three, a sample in one, and what an offset of all pixels changes. What other families have of the
    convolutions' kernels, copies and sums, is not listed again.
    """
    found: dict[str, tuple[set[str], int]] = {}
    if code.file == "roi":
        expressions = _of_surface() if code.surface else _roi()
    elif code.file == "gather":
        expressions = _gather()
    elif code.file == "grid":
        expressions = _grid(code.axes)
    elif code.active:
        expressions = _of_active()
    else:
        expressions = _expressions() if code.axes == 2 else _of_axes(code.axes)
    for expression, architectures, registers in expressions:
        if "Wgmma" not in expression:
            architectures = tuple(name.rstrip("a") for name in architectures)
        listed, budget = found.setdefault(expression, (set(), registers))
        found[expression] = listed | set(architectures), max(budget, registers)
    return [
        Instance(code, expression, tuple(sorted(listed, key=_age)), registers)
        for expression, (listed, registers) in found.items()
    ]


def _age(architecture: str) -> tuple[bool, int]:
    return architecture.isdigit(), int(architecture.rstrip("a"))


def _expressions() -> Iterator[tuple[str, tuple[str, ...], int]]:
    for dtype, c in C_TYPES.items():
        yield from _helpers(dtype, c)
        for capability, architectures in CAPABILITIES.items():
            for allow_tf32 in (False, True) if dtype == "float32" else (False,):
                for outputs in OUTPUTS:
                    if outputs != OUTPUTS[0]:
                        architectures = architectures[:1]
                    forward = forward_product(dtype, capability, outputs, allow_tf32)
                    weight = weight_product(dtype, capability, outputs, allow_tf32)
                    narrow = outputs != OUTPUTS[0]  # plain ones have those of deformed ones
                    for reads in (DEFORMED,) if narrow else (DEFORMED, PLAIN, ADJOINT):
                        yield f"forward<{forward.expression}, int, {reads}>", architectures, _budget(forward)
                        yield f"pack_weight<{forward.expression}, int, {reads}>", architectures[:1], 96
                    for reads in (DEFORMED,) if narrow else (DEFORMED, PLAIN):
                        yield f"backward_weight<{weight.expression}, int, {reads}>", architectures, _budget(weight)
                data = data_product(dtype, capability, allow_tf32)
                yield f"pack_weight_columns<{data.expression}, int>", architectures[:1], 96
                for store, some in (("false", CAPABILITIES[capability]), ("true", architectures)):
                    yield f"backward_data<{data.expression}, int, {store}>", some, _budget(data)
    yield from _long()
    yield from _float_offsets()


def _of_axes(axes: int) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Of each kind of product and width of number the kernels with most registers; fewer where samples are small."""
    kinds = (("float16", 90), ("float16", 80), ("float16", 75), ("float32", 90), ("float32", 80), ("float64", 75))
    for dtype, capability in kinds if axes > 2 else (kinds[0], kinds[-1]):
        architectures = CAPABILITIES[capability][-1:]
        forward = forward_product(dtype, capability, OUTPUTS[0], False)
        yield f"forward<{forward.expression}, int, {DEFORMED}>", architectures, _budget(forward)
        weight = weight_product(dtype, capability, OUTPUTS[0], False)
        yield f"backward_weight<{weight.expression}, int, {DEFORMED}>", architectures, _budget(weight)
        data = data_product(dtype, capability, False)
        yield f"backward_data<{data.expression}, int, true>", architectures, _budget(data)
    data = data_product("float16", 90, False)
    yield f"backward_data<{data.expression}, int, false>", ("90a",), _budget(data)
    forward = forward_product("float16", 75, OUTPUTS[0], False)
    yield f"forward<{forward.expression}, int, {ADJOINT}>", ("75",), _budget(forward)
    for c in ("f16", "double") if axes > 2 else ("double",):
        names = [f"{name}_direct<{c}, int, true>" for name in ("forward", "weight")]
        names += [f"input_gradient_direct<{c}, int>", f"backward_data_direct<{c}, int, false>"]
        names += [f"fill_bins<{c}, int>", f"gather_bins<{c}, int>"]
        for name in names:
            yield name, EVERY[-1:], 96


def _of_active() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The kernels that add up the offset's gradient."""
    for dtype, capability in (("float16", 90), ("bfloat16", 80), ("float16", 75), ("float32", 80), ("float64", 75)):
        data = data_product(dtype, capability, False)
        yield f"backward_data<{data.expression}, int, false>", CAPABILITIES[capability][-1:], _budget(data)
    for dtype in ("f16", "double"):
        yield f"backward_data_direct<{dtype}, int, false>", EVERY[-1:], 96
        yield f"backward_data_direct<{dtype}, long long, true>", EVERY[-1:], 96
    for sums in ("float", "double"):
        yield f"add_offset_parts<{sums}>", EVERY[-1:], 96


def _long() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """One of each kernel for arrays of more than 2^31 elements."""
    for name in ("to_channels_last", "to_channels_first"):
        yield f"{name}<f16, long long>", EVERY[-1:], 96
    for dtype, capability in (("float32", 80), ("float16", 90), ("float64", 75)):
        architectures = CAPABILITIES[capability][-1:]
        forward = forward_product(dtype, capability, 128, False)
        yield f"forward<{forward.expression}, long long, {DEFORMED}>", architectures, 255
        weight = weight_product(dtype, capability, 128, False)
        yield f"backward_weight<{weight.expression}, long long, {DEFORMED}>", architectures, 255
        data = data_product(dtype, capability, False)
        yield f"backward_data<{data.expression}, long long, true>", architectures, 255


def _float_offsets() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Of the kernels for float32 offsets beside half types, which only read and write these another way, a sample."""
    for dtype, capability in (("float16", 90), ("bfloat16", 80), ("float16", 75)):
        architectures = CAPABILITIES[capability][-1:]
        forward = forward_product(dtype, capability, OUTPUTS[0], False)
        yield f"forward<{forward.expression}, int, {DEFORMED}, float>", architectures, _budget(forward)
        weight = weight_product(dtype, capability, OUTPUTS[0], False)
        yield f"backward_weight<{weight.expression}, int, {DEFORMED}, float>", architectures, _budget(weight)
        data = data_product(dtype, capability, False)
        for store in ("false", "true"):
            yield f"backward_data<{data.expression}, int, {store}, float>", architectures, _budget(data)
    names = [f"{name}_direct<bf16, int, true, float>" for name in ("forward", "weight", "backward_data")]
    for name in (*names, "backward_data_direct<bf16, int, false, float>", "gather_bins<bf16, int, float>"):
        yield name, EVERY[-1:], 96


def _helpers(dtype: str, c: str) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Kernels without tiles, the same on every architecture."""
    names = [f"to_channels_last<{c}, int>", f"to_channels_first<{c}, int>", f"sum_slices<{c}, int>"]
    names += [f"sum_weight<{c}, int>", f"bias_gradient<{c}, int>", f"convert<{c}, int>"]
    names += [f"add_parts<{c}>"]
    names += [f"{name}_direct<{c}, int, {moved}>" for name in ("forward", "weight") for moved in ("true", "false")]
    names += [f"backward_data_direct<{c}, int, {store}>" for store in ("false", "true")]
    names += [f"{name}<{c}, int>" for name in ("count_samples", "fill_bins", "gather_bins")]
    names += ["sort_bins<int>", f"input_gradient_direct<{c}, int>"]
    for name in names:
        yield name, EVERY if dtype == "float16" else EVERY[-1:], 96


def _roi() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Nothing in them depends on the architecture, so the two main ones stand for all on each. Of sums in float three
    blocks of 256 threads shall fit, or two."""
    for dtype, c in C_TYPES.items():
        wide = dtype == "float64"
        newest = EVERY[-1:]
        yield f"pool_bins<{c}, int>", EVERY, 168 if wide else 80
        yield f"bin_gradients<{c}, int>", newest, 96 if wide else 80
        yield f"input_gradient<{c}, int, 0>", EVERY, 255 if wide else 128
        for largest in (1, 2):
            yield f"input_gradient<{c}, int, {largest}>", newest, 255 if wide else 128
        for name in ("pool_direct", "bin_gradients_direct", "box_bounds", "offset_gradient", "mask_gradient"):
            yield f"{name}<{c}, int>", EVERY[:1] if dtype == "float16" else newest, 128 if wide else 96
        for points in ("false", "true"):
            yield f"pool_largest<{c}, int, {points}>", newest, 96
        for name in ("edge_gradients", "edge_gradients_direct", "edge_gradients_of_largest", "box_gradient"):
            yield f"{name}<{c}, int>", newest, 168 if wide else 128
        own = ", float" if c in ("f16", "bf16") else ""  # turned boxes are as sums are
        yield f"turn_boxes<{c}>", newest, 64
        yield f"turned_bounds<{c}>", newest, 64
        yield f"pool_turned<{c}, int>", newest, 255 if wide else 128
        yield f"pool_turned_direct<{c}, int>", newest, 128
        yield f"input_gradient<{c}, int, 3{own}>", newest, 255 if wide else 128
    # Boxes and offsets in float32 beside a half type, one or both.
    yield "turn_boxes<bf16, float>", EVERY[-1:], 64
    yield "pool_bins<f16, int, float>", EVERY[-1:], 80
    yield "pool_bins<bf16, int, float, float>", EVERY[-1:], 80
    yield "bin_gradients<bf16, int, float, float>", EVERY[-1:], 80
    for reads in ("0", "1", "2"):
        yield f"input_gradient<bf16, int, {reads}, float, float>", EVERY[-1:], 128
    direct = ("pool_direct<bf16, int", "bin_gradients_direct<bf16, int", "box_bounds<bf16, int")
    for name in (*direct, "pool_largest<bf16, int, false", "pool_largest<bf16, int, true"):
        yield f"{name}, float, float>", EVERY[-1:], 96
    for name in ("edge_gradients", "edge_gradients_direct", "edge_gradients_of_largest", "box_gradient"):
        yield f"{name}<bf16, int, float>", EVERY[-1:], 128
    for c in ("f16", "double"):
        for name in ("pool_bins<{}, long long>", "bin_gradients<{}, long long>", "input_gradient<{}, long long, 0>"):
            yield name.format(c), EVERY[-1:], 255 if c == "double" else 128


def _of_surface() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The kernels that prroi_pool has, in few types: others differ in what they load."""
    for c in ("double", "float", "f16"):
        wide, newest = c == "double", EVERY[-1:]
        yield f"pool_bins<{c}, int>", newest, 168 if wide else 80
        yield f"input_gradient<{c}, int, 0>", newest, 255 if wide else 128
        for name in ("pool_direct", "box_bounds"):
            yield f"{name}<{c}, int>", newest, 128 if wide else 96
        for name in ("edge_gradients", "edge_gradients_direct"):
            yield f"{name}<{c}, int>", newest, 168 if wide else 128


def _gather() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Nothing in them depends on the architecture but how halves are rounded and sums are added, so the two main ones
    stand for all on each. Forward four blocks of 256 threads shall fit, backward two."""
    newest = EVERY[-1:]
    yield "fill_table", newest, 64
    for dtype, c in C_TYPES.items():
        wide, half = dtype == "float64", c in ("f16", "bf16")
        yield f"gather_samples<{c}, int, 16>", EVERY, 128 if wide else 64
        yield f"number_gradients<{c}, int, 16>", EVERY, 168 if wide else 128
        some = EVERY if c == "f16" else newest
        yield f"scatter_samples<{c}, int, {8 if wide or half else 16}>", some, 128 if wide else 64
        yield f"fused_gradients<{c}, int, 16>", some, 168 if wide else 128
        for name in ("count_points", "fill_cells", "softmax_sums", "gather_cells"):
            yield f"{name}<{c}, int>", newest, 128 if wide else 80
    # Channels that do not fill 16 bytes.
    for types in ("f16, int, 8", "f16, int, 2", "bf16, int, 4", "float, int, 8", "float, int, 4", "double, int, 8"):
        for name in ("gather_samples", "number_gradients", "fused_gradients"):
            yield f"{name}<{types}>", newest, 168 if types.startswith("double") else 128
    # Places in float32 beside a half type, and more numbers than an int counts.
    for name, size in (("gather_samples", 16), ("scatter_samples", 8), ("fused_gradients", 16)):
        yield f"{name}<f16, int, {size}, float, float>", newest, 128
        yield f"{name}<bf16, int, {size}, float>", newest, 128
        yield f"{name}<double, long long, {size}>", newest, 168
        yield f"{name}<f16, long long, {size}>", newest, 128
    yield "number_gradients<bf16, int, 16, float>", newest, 128
    for name, index in (("gather_cells", "int"), ("fill_cells", "int"), ("gather_cells", "long long")):
        yield f"{name}<bf16, {index}, float, float>", newest, 96
    yield "gather_cells<double, long long>", newest, 128


def _grid(axes: int) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Nothing in them depends on the architecture. Bilinear ones of every type, and each kernel with most registers: in
    a plane bicubic. Of what is read forward four blocks of 256 threads shall fit, backward two."""
    newest = EVERY[-1:]
    if axes == 2:
        for c in C_TYPES.values():
            yield f"sample_points<{c}, int, {BILINEAR}>", EVERY, 128 if c == "double" else 64
            yield f"point_gradients<{c}, int, {BILINEAR}>", EVERY, 128
    most = BICUBIC if axes == 2 else BILINEAR
    for types in (f"float, int, {most}", f"double, long long, {most}"):
        for name in ("sample_points", "scatter_points"):
            yield f"{name}<{types}>", newest, 128 if types.startswith("double") else 64
        yield f"point_gradients<{types}>", newest, 128
        for name in ("count_taps", "fill_taps", "gather_taps"):
            yield f"{name}<{types}>", newest, 80
    # Half types beside a grid in float32.
    for name in ("sample_points", "scatter_points", "point_gradients", "fill_taps"):
        yield f"{name}<bf16, int, {NEAREST}, float>", newest, 64


def _budget(product: Product) -> int:
    """Narrow tiles of 16-bit types leave room for a third block of 128 threads, or for half of a second of 256."""
    return 168 if product.dtype in ("float16", "bfloat16") and (product.kind, product.columns) == ("Mma", 64) else 255
