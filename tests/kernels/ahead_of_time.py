"""Compiles for GPUs that are not here what shipped configurations launch, and prints a table.

    python -m tests.kernels.ahead_of_time --gpu 90 [--config moeut/244m] [--kernel _product]

Every distinct specialization is compiled once, for all configurations by default. Triton brings the
assembler that this needs, and keeps what it has compiled in its cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from moa_dist.kernels.triton_tiles import Shape
from tests.config.test_shipped_configs import CONFIGS, SHIPPED
from tests.kernels.specializations import Specialization, specializations, target_of

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
REGISTERS = 65536
"""32-bit registers of a multiprocessor, on every GPU that we compile for."""
BYTES = {"*bf16": 2, "*fp32": 4}
_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", re.MULTILINE)
"""After its address and perhaps a condition."""


@dataclass(frozen=True)
class Compiled:
    """What the assembler says about one specialization."""

    kernel: str
    config: str
    """The first configuration that launches it."""
    type: str
    """Of its first operand."""
    widths: tuple[int | None, int | None]
    constants: dict[str, Any]
    """Those beyond widths and the tile of a product."""
    tile: tuple[int, int, int] | None
    """Rows, columns and depth of a product's tile."""
    num_products: int
    """Products whose tiles share the operand on the left."""
    num_epilogue_operands: int
    """Tiles of other results that the product is combined with in registers, or pairs that it is
    a sum of: more than one leaves fewer registers for its own result."""
    flop_per_byte: float | None
    """Work per byte that a tile loads."""
    warps: int
    registers: int
    """Per thread."""
    stack: int
    """Bytes per thread; more than 0 if registers were spilled."""
    shared: int
    """Bytes per program."""
    instructions: list[str]

    @property
    def programs(self) -> int:
        """Programs that registers leave room for on a multiprocessor."""
        return REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)


def compiled(case: Specialization, config: str, capability: tuple[int, int]) -> Compiled:
    binary = triton.compile(case.source, target=target_of(capability), options=case.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        resources = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", resources)
    assert found is not None
    constants = dict(case.constants)
    widths = constants.pop("WIDTH_IN", None), constants.pop("WIDTH_OUT", constants.get("WIDTH"))
    type_of_rows = next(iter(case.source.signature.values()))
    tile, intensity = None, None
    # An operand that is not given is a constant: None.
    num_products = 2 if case.name == "_hidden_products" and "gate" not in constants else 1
    second = {"_product": "more_left", "_hidden_gradients": "inner_gate"}.get(case.name)
    if "DEPTH" in constants:
        rows, columns, depth = (constants.pop(name) for name in ("ROWS", "COLUMNS", "DEPTH"))
        tile = rows, columns, depth
        shape = Shape(rows, columns * num_products, depth, 0, 0)
        intensity = shape.flop_per_byte(BYTES[type_of_rows])
    return Compiled(
        kernel=case.name,
        config=config,
        type=type_of_rows.removeprefix("*"),
        widths=widths,
        constants={name: value for name, value in constants.items() if value is not None},
        tile=tile,
        num_products=num_products,
        num_epilogue_operands=2 if second and second not in constants else 1,
        flop_per_byte=intensity,
        warps=case.options["num_warps"],
        registers=int(found[1]),
        stack=int(found[2]),
        shared=binary.metadata.shared,
        instructions=sorted(set(_INSTRUCTION.findall(code))),
    )


def run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def compile_all(
    paths: list[Path], kernels: list[str] | None, capability: tuple[int, int], num_workers: int
) -> Iterator[Compiled]:
    """Compile what these configurations launch, with the names of the kernels if given."""
    found: dict[Specialization, str] = {}
    for path in paths:
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        for case in specializations(path, capability):
            if kernels is None or case.name in kernels:
                found.setdefault(case, name)
    global _compile  # inherited by workers, since Triton's kernels cannot be sent to them
    cases = list(found.items())

    def _compile(number: int) -> Compiled:
        return compiled(*cases[number], capability)

    with multiprocessing.get_context("fork").Pool(num_workers) as pool:
        yield from pool.imap(_call, range(len(cases)))


def _call(number: int) -> Compiled:
    result: Compiled = _compile(number)
    return result


def row(kernel: Compiled) -> str:
    """Describe a kernel in one line of the table."""
    widths = " -> ".join(str(width) for width in kernel.widths if width is not None)
    tile = "" if kernel.tile is None else " x ".join(map(str, kernel.tile))
    intensity = "" if kernel.flop_per_byte is None else f"{kernel.flop_per_byte:.0f}"
    opcodes = {name.split(".")[0] for name in kernel.instructions}
    tensor_cores = {name for name in opcodes if name.endswith("MMA")}
    return (
        f"{kernel.kernel:18} {kernel.type:4} {widths:13} {tile:14} {kernel.warps:5} "
        f"{kernel.registers:9} {kernel.stack:5} {kernel.shared / 1024:6.1f} {kernel.programs:8} "
        f"{intensity:>6} {' '.join(sorted(tensor_cores)):9} {len(kernel.instructions):4} "
        f"{kernel.config}"
    )


HEADER = (
    f"{'kernel':18} {'type':4} {'widths':13} {'tile':14} warps registers stack    KiB "
    f"programs FLOP/B {'products':9} ops. first configuration"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", type=int, default=90, help="compute capability, such as 90")
    parser.add_argument("--config", nargs="*", help="such as moeut/244m; all shipped by default")
    parser.add_argument("--kernel", nargs="*", help="such as _product; all by default")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    paths = [CONFIGS / f"{name}.yaml" for name in args.config] if args.config else SHIPPED
    results = compile_all(paths, args.kernel, divmod(args.gpu, 10), args.workers)
    if args.json:
        print(json.dumps([asdict(kernel) for kernel in results]))
        return
    print(HEADER)
    found = []
    for kernel in results:
        print(row(kernel), flush=True)  # as it comes, since all of them take minutes
        found.append(kernel)
    worst = max(kernel.registers for kernel in found)
    spilled = sum(kernel.stack > 0 for kernel in found)
    print(f"{len(found)} specializations for sm_{args.gpu}: {worst} registers at most, ", end="")
    print(f"{spilled} with a stack, {max(k.shared for k in found) / 1024:.0f} KiB at most")


if __name__ == "__main__":
    main()
