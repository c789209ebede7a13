"""Checks and measures everything that needs a GPU: numbers, no host waits, times, memory.

    python -m tests.benchmarks.gpu [--device cpu] [--minutes 8]

Needs torch, Triton and the configuration's packages, but no data, network, DeepSpeed or webdataset.
Checks kernels against fp64 arithmetic and times them against a dense layer of equal work; then
times layers, a block and a training step of MoEUT 244M in bf16 against dense ones. Exits with 1 if
a number is wrong. `--device cpu` rehearses it all in small sizes. After `--minutes` (8) it begins
no further table, and names what it has left out.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from moa_dist.bench.measure import Table, Work, as_text, compare
from moa_dist.bench.sections import load_section
from moa_dist.bench.setting import Setting
from moa_dist.config import load_config
from moa_dist.kernels.custom_op import custom_op_experts
from moa_dist.kernels.grouped import grouped_experts
from moa_dist.kernels.grouped_matmul import grouped_matmul_fits
from moa_dist.kernels.routed_experts import kernel_for, routed_experts
from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows, hidden_rows

CONFIGS = Path(__file__).parents[2] / "configs"
Kernel = Callable[[ExpertWeights, Tensor, RowMap], Tensor]
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
"""Bound of the largest deviation, relative to the largest number."""
SHAPES: dict[
    str, tuple[int, ...]
] = {  # name: T, D, E, K, F; F is the hidden width of an FFN, the head width of a projection
    "FFN 44M": (8192, 412, 155, 12, 128),
    "FFN 244M": (8192, 1024, 387, 16, 128),
    "FFN D 512": (8192, 512, 64, 8, 128),
}
REHEARSAL: dict[str, tuple[int, ...]] = {"FFN": (128, 44, 9, 3, 16)}


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, *, gated: bool = False
) -> tuple[ExpertWeights, Tensor, RowMap]:
    """Return a sigma-MoE of random weights, with a tenth of all assignments dropped."""
    T, D, E, K, F = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator) * scale
        return values.to(device, dtype).requires_grad_()

    chosen = torch.rand(T, E, generator=generator).topk(K).indices
    chosen[torch.rand(T, K, generator=generator) < 0.1] = E
    order = chosen.flatten().argsort(stable=True)
    counts = chosen.flatten().bincount(minlength=E + 1)[:E]
    rows = (torch.arange(T * K) // K)[order].to(device)
    weight = torch.rand(T * K, generator=generator).to(device).requires_grad_()
    tokens = Rows.of(rows, T)
    row_map = RowMap(tokens, tokens, counts.to(device), is_dropless=False, weight=weight)
    ups = tuple(draw(E, D, F, scale=D**-0.5) for _ in range(1 + gated))
    return ExpertWeights(draw(E, F, D, scale=F**-0.5), ups, "silu"), draw(T, D), row_map


def sources_of(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> list[Tensor]:
    assert row_map.weight is not None
    return [x, row_map.weight, *experts.tensors()]


def both_passes(kernel: Kernel, experts: ExpertWeights, x: Tensor, row_map: RowMap) -> list[Tensor]:
    y = kernel(experts, x, row_map)
    return [y, *torch.autograd.grad(y, sources_of(experts, x, row_map), y.detach())]


def exact(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> list[Tensor]:
    """Return both passes in fp64, by one product per expert."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_()

    assert row_map.weight is not None
    doubles = ExpertWeights(wide(experts.down), tuple(map(wide, experts.ups)), experts.activation)
    return both_passes(
        grouped_experts, doubles, wide(x), row_map._replace(weight=wide(row_map.weight))
    )


def may_wait(kernel: Kernel, device: torch.device) -> bool:
    """Return whether a kernel may read counts on the host.

    Torch's grouped product does so on GPUs other than those of compute capability 9.0.
    """
    is_fast = device.type != "cuda" or torch.cuda.get_device_capability(device) == (9, 0)
    return kernel is grouped_experts and not is_fast


def kernels_for(experts: ExpertWeights, x: Tensor) -> dict[str, Kernel]:
    """Return all kernels that can run on this device."""
    kernels: dict[str, Kernel] = {"operator": custom_op_experts}
    if grouped_matmul_fits(x, *experts.tensors()):
        kernels["grouped product"] = grouped_experts
    return kernels


def naive(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    """A straightforward loop over experts, which reads the counts on the host."""
    assert row_map.weight is not None
    y = torch.zeros(row_map.write.num, experts.down.shape[2], dtype=x.dtype, device=x.device)
    start = 0
    for expert, count in enumerate(row_map.counts.tolist()):
        taken = slice(start, start + count)
        rows = x[row_map.read.ids[taken]]
        products = tuple(rows @ up[expert] for up in experts.ups)
        out = hidden_rows(products, experts.activation) @ experts.down[expert]
        weighted = (out * row_map.weight[taken, None]).to(y.dtype)
        y = y.index_add(0, row_map.write.ids[taken], weighted)
        start += count
    return y


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Make anything that lets the host wait for the GPU raise."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def check_numbers(shapes: dict[str, tuple[int, ...]], device: torch.device) -> list[str]:
    """Print a line per kernel; returns what is wrong."""
    wrong = []
    for name, shape in shapes.items():
        for dtype, gated in product((torch.float32, torch.bfloat16), (False, True)):
            case = inputs(shape, dtype, device, gated=gated)
            expected = exact(*case)
            for kind, kernel in kernels_for(*case[:2]).items():
                both_passes(kernel, *case)  # compilation may wait
                with nullcontext() if may_wait(kernel, device) else no_waiting(device):
                    results = both_passes(kernel, *case)
                deviation = max(
                    ((ours.double() - right).abs().max() / right.abs().max()).item()
                    for ours, right in zip(results, expected, strict=True)
                )
                label = f"{name}{', gated' if gated else ''}, {str(dtype)[6:]}, {kind}"
                print(f"  {label:<50} largest deviation {deviation:.1e}", flush=True)
                if not deviation < TOLERANCE[dtype]:
                    wrong.append(f"{label}: {deviation:.1e} > {TOLERANCE[dtype]:.0e}")
    return wrong


def dense_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Work:
    """Return both passes of a dense FFN with equal multiply-accumulates."""
    T, D, _, K, F = shape
    x, up, down = (
        torch.randn(size, device=device).to(dtype).requires_grad_()
        for size in ((T, D), (D, K * F), (K * F, D))
    )

    def once() -> object:
        y = torch.nn.functional.silu(x @ up) @ down
        return torch.autograd.grad(y, [x, up, down], y.detach())

    return once


def time_kernels(
    shapes: dict[str, tuple[int, ...]], device: torch.device, repetitions: int
) -> Iterator[Table]:
    """Time every kernel against a dense FFN of equal work."""
    for name, shape in shapes.items():
        for dtype in (torch.bfloat16, torch.float32):
            case = inputs(shape, dtype, device)
            work: dict[str, Work] = {"dense, equal work": dense_of(shape, dtype, device)}
            kernels = {**kernels_for(*case[:2]), "as chosen": routed_experts, "naive": naive}
            for kind, kernel in kernels.items():
                work[kind] = partial(both_passes, kernel, *case)
            rows = compare(work, device, repetitions=repetitions)
            chosen = kernel_for(*case[:2]).because
            yield Table(f"{name}, {str(dtype)[6:]}", rows, shape[0], [f"chosen: {chosen}"])


def tables(
    shapes: dict[str, tuple[int, ...]], setting: Setting, deadline: float
) -> Iterator[Table | str]:
    """Yield the tables of all sections, or the name of a section that came too late."""
    sections: dict[str, Callable[[], Iterator[Table]]] = {
        "kernels": lambda: time_kernels(shapes, setting.device, setting.repetitions),
        **{name: partial(_section, name, setting) for name in ("step", "layers", "block")},
    }
    for name, begin in sections.items():
        found = begin()
        while time.monotonic() < deadline:
            if (table := next(found, None)) is None:
                break
            yield table
        else:
            yield name


def _section(name: str, setting: Setting) -> Iterator[Table]:
    yield from load_section(name)(setting)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8)
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    device, rehearsal = torch.device(args.device), args.device == "cpu"
    name = "rehearsal on a CPU" if rehearsal else torch.cuda.get_device_name(device)
    print(f"{name}, torch {torch.__version__}")
    shapes, repetitions = (REHEARSAL, 1) if rehearsal else (SHAPES, 9)
    print("\nnumbers against fp64, with host waits forbidden")
    wrong = check_numbers(shapes, device)
    config = (
        load_config(CONFIGS / "small/moeut.yaml", ["data.sequence_length=64"])
        if rehearsal
        else load_config(CONFIGS / "moeut/244m.yaml", ["train.precision=bf16"])
    )
    setting = Setting(config, device, sequences=2 if rehearsal else 8, repetitions=repetitions)
    for table in tables(shapes, setting, deadline):
        text = f"out of time: {table}" if isinstance(table, str) else as_text(table)
        print(f"\n{text}", flush=True)
    print("\n" + ("\n".join(["WRONG NUMBERS:", *wrong]) if wrong else "all numbers are right"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
