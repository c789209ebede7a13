"""The routed operations of the models, with random inputs, and the plainest way to compute them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moa_dist.kernels.row_map import ExpertWeights, RowMap, Rows, hidden_rows

D, FF, HEADS = 6, 4, 3


@dataclass(frozen=True)
class Use:
    """One of the routed operations of the models."""

    d_in: int
    d_out: int
    read: str
    write: str
    num_ups: int = 0
    weighted: bool = True


USES = {
    "sigma-MoE": Use(D, D, "token", "token", num_ups=1),
    "gated MoE": Use(D, D, "token", "token", num_ups=2),
    "MoA queries": Use(D, FF, "token", "slot", weighted=False),
    "MoA outputs": Use(FF, D, "slot", "token"),
    "SwitchHead values": Use(D, FF, "token", "group"),
    "SwitchHead outputs": Use(FF, D, "group", "token"),
}
TOKENS, DROPPED = 5, 2


def inputs(
    use: Use, counts: list[int], dtype: torch.dtype = torch.float64
) -> tuple[ExpertWeights, Tensor, RowMap, list[Tensor]]:
    """Draw experts, rows, a row map, and the list of all that has a gradient.

    Some rows are neither read nor written, and the last assignments have no expert, as when
    tokens are dropped.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype).requires_grad_()

    E, A = len(counts), sum(counts) + DROPPED
    num_rows = {"token": TOKENS, "group": TOKENS * HEADS, "slot": A + 2}

    def rows(level: str) -> Rows:
        index = torch.randint(num_rows[level], (A,), generator=generator)
        if level == "slot":
            index = torch.randperm(A + 2, generator=generator)[:A]
        return Rows.of(index, num_rows[level])

    x = draw(num_rows[use.read], use.d_in)
    weight = draw(A, dtype=torch.promote_types(dtype, torch.float32)) if use.weighted else None
    ups = tuple(draw(E, use.d_in, FF) for _ in range(use.num_ups))
    down = draw(E, FF if ups else use.d_in, use.d_out)
    row_map = RowMap(
        read=rows(use.read),
        write=rows(use.write),
        counts=torch.tensor(counts),
        is_dropless=False,
        weight=weight,
    )
    sources = [x, down, *ups, *([] if weight is None else [weight])]
    return ExpertWeights(down, ups, "silu"), x, row_map, sources


def one_at_a_time(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
    expert_of = [e for e, count in enumerate(row_map.counts.tolist()) for _ in range(count)]
    y = [x.new_zeros(experts.down.shape[2])] * row_map.write.num
    for a, e in enumerate(expert_of):
        row = x[row_map.read.ids[a]]
        if experts.ups:
            row = hidden_rows(tuple(row @ up[e] for up in experts.ups), experts.activation)
        row = row @ experts.down[e]
        write = int(row_map.write.ids[a])
        y[write] = y[write] + (row if row_map.weight is None else row_map.weight[a] * row)
    return torch.stack(y)


def gradients(y: Tensor, sources: list[Tensor]) -> tuple[Tensor, ...]:
    upstream = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return torch.autograd.grad(y, sources, upstream, materialize_grads=True)
