"""Compiles for GPUs that are not here what shipped configurations launch, and prints it as JSON.

    python -m tests.kernels.ahead_of_time 90 moeut/244m.yaml ... > kernels.json

The kernels' own code launches them on tensors without data; launches are recorded instead, and
every distinct specialization is compiled once. Triton brings the assembler that this needs.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from moa_dist.config import load_config
from moa_dist.kernels import (
    triton_fused,
    triton_gradients,
    triton_products,
    triton_sums,
    triton_tiles,
)
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows
from moa_dist.models.language_model import LanguageModel
from moa_dist.moe.routed_module import RoutedModule, RoutedProjection, routed_modules

CONFIGS = Path(__file__).parents[2] / "configs"
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
MODULES = (triton_gradients, triton_products, triton_sums, triton_tiles)
TYPES = {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32"}
DEVICE = "meta"
_INSTRUCTION = re.compile(r"^\s*/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", re.MULTILINE)
"""After its address and perhaps a condition."""


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments that it is specialized on."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    """Argument and type; `constexpr` for constants."""
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What the assembler says about one specialization."""

    kernel: str
    widths: tuple[int | None, int | None]
    tile: tuple[int, int, int] | None
    """Rows, columns and depth of a product's tile."""
    flop_per_byte: float | None
    """Work per byte that a tile loads."""
    registers: int
    stack: int
    """Bytes per thread; more than 0 if registers were spilled."""
    shared: int
    """Bytes per program."""
    instructions: list[str]


class Recorder:
    """Stands in for a kernel and records how it is launched."""

    def __init__(self, kernel: JITFunction, launches: dict[Launch, JITFunction]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> "Recorder":
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
        signature, constants = {}, {}
        for parameter in self.kernel.params:
            value = given[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            elif value is None or parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            else:
                signature[parameter.name] = "i32"
        parts = (tuple(part.items()) for part in (signature, constants, options))
        self.launches[Launch(self.kernel.__name__, *parts)] = self.kernel


def kernels_of(module: ModuleType) -> dict[str, JITFunction]:
    """All kernels that a module launches; functions within kernels have public names."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.startswith("_")
    }


def record(capability: tuple[int, int], configs: list[str]) -> dict[Launch, JITFunction]:
    """Both passes of all routed projections of these configurations, in bf16."""
    launches: dict[Launch, JITFunction] = {}
    for module in MODULES:
        for name, kernel in kernels_of(module).items():
            setattr(module, name, Recorder(kernel, launches))
    for module in (triton_tiles, triton_products):
        module.capability_of = lambda x: capability
    for name in configs:
        config = load_config(CONFIGS / name)
        with torch.device(DEVICE):
            model = LanguageModel(config.model)
        num_tokens = config.train.micro_batch * config.data.sequence_length
        for _, module in routed_modules(model):
            for projection in module.routed_projections():
                launch(module, projection, num_tokens)
    return launches


def launch(module: RoutedModule, projection: RoutedProjection, num_tokens: int) -> None:
    router = module.router_of(projection)
    G, K = router.num_groups, router.config.top_k
    num = {"token": num_tokens, "group": num_tokens * G, "slot": num_tokens * G * K}
    layers = module.expert_layers()

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=DEVICE)

    *ups, down = (
        empty(layers[name].num_experts, layers[name].d_in, layers[name].d_out)
        for name in projection.experts
    )
    index = empty(num["slot"], dtype=torch.int64)
    row_map = RowMap(
        read=Rows(index, index, None, num[projection.read]),
        write=Rows(index, index, None, num[projection.write]),
        counts=empty(router.num_experts, dtype=torch.int64),
        is_dropless=True,
        weight=empty(num["slot"], dtype=torch.float32) if projection.weighted else None,
    )
    activation = getattr(getattr(module, "config", None), "activation", "relu")
    experts = ExpertWeights(down, tuple(ups), activation)
    x = empty(num[projection.read], projection.d_in)
    y, saved = triton_fused.forward(experts, x, row_map)
    triton_fused.backward(y, experts, x, row_map, saved)


def compiled(launches: dict[Launch, JITFunction], architecture: int) -> Iterator[Compiled]:
    for case, kernel in launches.items():
        names = kernel.arg_names
        attributes = {
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in case.signature
            if kind.startswith("*")
        }
        source = ASTSource(
            fn=kernel,
            signature=dict(case.signature),
            constexprs={(names.index(name),): value for name, value in case.constants},
            attrs=attributes,
        )
        target = GPUTarget("cuda", architecture, 32)
        binary = triton.compile(source, target=target, options=dict(case.options))
        yield assembled(case, binary)


def assembled(case: Launch, binary: Any) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        resources = run("cuobjdump", "--dump-resource-usage", file.name)
        code = run("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+).*?STACK:(\d+)", resources)
    assert found is not None
    constants = dict(case.constants)
    tile = None
    if "DEPTH" in constants:
        tile = tuple(constants[name] for name in ("ROWS", "COLUMNS", "DEPTH"))
    return Compiled(
        kernel=case.kernel,
        widths=(constants.get("WIDTH_IN"), constants.get("WIDTH_OUT", constants.get("WIDTH"))),
        tile=tile,
        flop_per_byte=tile and triton_tiles.Shape(*tile, 0, 0).flop_per_byte(2),
        registers=int(found[1]),
        stack=int(found[2]),
        shared=binary.metadata.shared,
        instructions=sorted(
            set(re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+ )?([A-Z][\w.]*)", code, re.M))
        ),
    )


def run(tool: str, *arguments: str) -> str:
    command = [str(TOOLS / tool), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    architecture, *configs = sys.argv[1:]
    launches = record(divmod(int(architecture), 10), configs)
    print(json.dumps([asdict(result) for result in compiled(launches, int(architecture))]))


if __name__ == "__main__":
    main()
