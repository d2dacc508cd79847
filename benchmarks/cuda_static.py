"""What can be known of the CUDA kernels without a GPU, as a Markdown table: registers, occupancy, the main loop's SASS.

    python benchmarks/cuda_static.py                      every instance, on each architecture that it names
    python benchmarks/cuda_static.py --architectures 80,90a --match forward

Needs an NVRTC (the extra `dev` brings two; the newest is used). The columns about the main loop need nvdisasm, from
PATH or from the wheel nvidia-cuda-nvdisasm. "blocks" is how many fit on a multiprocessor, and what limits them; shared
memory is counted for one offset group in a tile. The main loop is the innermost one with the most tensor core products
(DFMA or FFMA where there are none); the columns after it count its instructions by kind.
"""

from __future__ import annotations

import argparse
import re
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pydeform.cuda import kernels  # noqa: E402
from pydeform.cuda.conv.plan import Product  # noqa: E402
from pydeform.cuda.core.numbers import C_TYPES, ITEMSIZE  # noqa: E402
from pydeform.cuda.core.source import source  # noqa: E402
from tests.cuda_emulation import nvrtc, sass  # noqa: E402

OPTIONS = ("-std=c++17",)
KILOBYTE = 1024
REGISTERS = 65536  # of a multiprocessor, on all of these
REGISTER_UNIT = 256  # registers are given to warps in this many
WARP_UNIT = 4  # and to this many warps at a time
RESERVED_SHARED = KILOBYTE  # of each block, from sm_80 on
CLASSES = {
    "LDG": re.compile(r"LDG\b(?!STS)"),
    "LDGSTS": re.compile(r"LDGSTS"),
    "LDS": re.compile(r"LDSM?\b"),
    "STS": re.compile(r"STSM?\b"),
    "FP": re.compile(r"[FHD](FMA|ADD|MUL|FMA2|ADD2|MUL2)\b|HFMA2|HADD2|HMUL2"),
    "BAR": re.compile(r"BAR|SYNCS|WARPSYNC"),
}
EIATTR_MAX_THREADS = b"\x04\x05\x0c\x00"  # format "sized", the attribute, 12 bytes: x, y, z


class Multiprocessor(NamedTuple):
    threads: int
    blocks: int
    shared: int  # bytes


MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 * KILOBYTE),
    80: Multiprocessor(2048, 32, 164 * KILOBYTE),
    86: Multiprocessor(1536, 16, 100 * KILOBYTE),
    87: Multiprocessor(1536, 16, 164 * KILOBYTE),
    89: Multiprocessor(1536, 24, 100 * KILOBYTE),
    90: Multiprocessor(2048, 32, 228 * KILOBYTE),
    100: Multiprocessor(2048, 32, 228 * KILOBYTE),
    103: Multiprocessor(2048, 32, 228 * KILOBYTE),
    120: Multiprocessor(1536, 24, 100 * KILOBYTE),
    121: Multiprocessor(1536, 24, 100 * KILOBYTE),
}


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(architecture: str, registers: int, shared: int, threads: int) -> tuple[int, str]:
    """(blocks on one multiprocessor, what allows no more)."""
    number = int(architecture.rstrip("af"))
    machine = MULTIPROCESSORS[number]
    warps = round_up(threads, 32) // 32
    warps_by_registers = REGISTERS // round_up(registers * 32, REGISTER_UNIT) // WARP_UNIT * WARP_UNIT
    limits = {
        "blocks": machine.blocks,
        "threads": machine.threads // (warps * 32),
        "registers": warps_by_registers // warps,
        "shared": machine.shared // max(1, shared + (RESERVED_SHARED if number >= 80 else 0)),
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def dynamic_shared(expression: str) -> int:
    """Bytes that the launch of a kernel of tiles asks for: two stages, and its tables of sampling points."""
    tiles = re.match(r"(\w+)<(\w+)<(\w+), (\d+), (\d+)(?:, (\d+), (\d+))?(.*?)>, (int|long long)", expression)
    if tiles is None or tiles[1] not in ("forward", "backward_weight", "backward_data"):
        return 0
    kernel, kind, c, rows, columns = tiles[1], tiles[2], tiles[3], int(tiles[4]), int(tiles[5])
    dtype = next(name for name, c_type in C_TYPES.items() if c_type == c)
    parts = 2 if "true" in tiles[8] else 1
    product = Product(kind, dtype, rows, columns, int(tiles[6] or 16), int(tiles[7] or columns), parts)
    index = 4 if tiles[9] == "int" else 8
    corner = 4 * (index + max(4, ITEMSIZE[dtype]))  # a sampling point: four places and their weights
    if kernel == "backward_weight":
        return 2 * product.turned_stage_bytes + 3 * product.turned_depth * corner
    if kernel == "backward_data":
        staged = rows * (columns + 8) * max(4, ITEMSIZE[dtype])
        return max(2 * product.stage_bytes, staged) + rows * corner
    return 2 * product.stage_bytes + 3 * rows * corner


def threads_of(cubin: bytes, kernel: str) -> int | None:
    """The block's size that __launch_bounds__ stated, from the section .nv.info.KERNEL of the ELF file."""
    (offset,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, offset + size * index) for index in range(count)]
    for name, _, _, _, place, length in headers:
        start = headers[names][4] + name
        if cubin[start : cubin.index(b"\0", start)] == f".nv.info.{kernel}".encode():
            at = cubin.find(EIATTR_MAX_THREADS, place, place + length)
            if at >= 0:
                x, y, z = struct.unpack_from("<III", cubin, at + 4)
                return int(x * y * z)
    return None


def figures(instance: Any, architecture: str, program: str | None) -> dict[str, Any]:
    toolkit = nvrtc.toolkits()[-1]
    compiled = toolkit.compile(source(instance.code), [instance.expression], architecture, OPTIONS)
    resources, kernel = compiled.kernels[instance.expression], compiled.lowered[instance.expression]
    shared = resources.shared + dynamic_shared(instance.expression)
    row: dict[str, Any] = {
        "kernel": f"`{instance.code.file}, {instance.code.axes} axes: {instance.expression}`",
        "sm": architecture,
        "registers": resources.registers,
        "shared, KB": f"{shared / KILOBYTE:.3g}",
    }
    threads = threads_of(compiled.cubin, kernel)
    if threads:
        blocks, limit = occupancy(architecture, resources.registers, shared, threads)
        row |= {"threads": threads, "blocks": f"{blocks} ({limit})"}
    if program:
        code = sass.disassemble(program, compiled.cubin, kernel)
        loop, product = sass.main_loop(code)
        if loop:
            products = sum(1 for i in loop if i.opcode.partition(".")[0] == product)
            row |= {
                "loop": len(loop),
                "products": f"{products} {product}",
                "per product": f"{len(loop) / products:.1f}",
                **{name: sass.count(loop, pattern) for name, pattern in CLASSES.items()},
            }
        row["all"] = len(code)
    return row


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns)] + [[str(row.get(name, "")) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", help="default: those of each instance")
    parser.add_argument("--match", default="", help="only instances whose expression has this in it")
    options = parser.parse_args()
    if not nvrtc.toolkits():
        raise SystemExit(f"needs one of {', '.join(nvrtc.WHEELS)}")
    program = sass.disassembler()
    wanted = options.architectures and options.architectures.split(",")
    rows = [
        figures(instance, architecture, program)
        for code in kernels.CODES
        for instance in kernels.instances(code)
        if options.match in instance.expression
        for architecture in instance.architectures
        if not wanted or architecture in wanted
    ]
    print(f"{nvrtc.toolkits()[-1]}{'' if program else '; no nvdisasm, so nothing about the main loop'}\n")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
