"""Dispatch over ranks equals dispatch on one, for values and all gradients, on real ranks.

Every rank routes tokens of its own. The reference runs each rank's tokens through all experts
in this process; expert gradients are summed over ranks.
"""

from dataclasses import dataclass
from itertools import chain, pairwise, product
from math import comb
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.distributed.comm_group import CommGroup
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.distributed.traffic import TrafficCounter
from moa_dist.kernels.row_map import ExpertWeights
from moa_dist.moe.all_to_all import AllToAllTokenDispatcher
from moa_dist.moe.dispatch import Dispatcher, LocalPlan, LocalTokenDispatcher
from moa_dist.moe.experts import shard_starts
from moa_dist.moe.router import Routing
from tests.kernels.rows import assert_sorted_by_row
from tests.moe.routings import draw, random_routing

LEVELS = ("token", "group", "slot")
PROJECTIONS = list(product(LEVELS, LEVELS, (True, False)))
D_IN, D_OUT = 4, 3


@dataclass(frozen=True)
class Case:
    """A routing on each of several ranks."""

    tokens: tuple[int, ...]
    """Of each rank."""
    num_groups: int
    experts_per_group: int
    top_k: int
    drop: float = 0.0
    only_experts: int | None = None
    """Choose among the first few experts alone."""

    @property
    def num_experts(self) -> int:
        return self.num_groups * self.experts_per_group

    def num_rows(self, level: str, rank: int) -> int:
        G, K = self.num_groups, self.top_k
        return self.tokens[rank] * {"token": 1, "group": G, "slot": G * K}[level]

    def routing(self, rank: int) -> Routing:
        choose_from = self.only_experts or self.experts_per_group
        return random_routing(
            self.tokens[rank], self.num_groups, choose_from, self.top_k, drop=self.drop, seed=rank
        )

    def owners(self, rank: int) -> Tensor:
        """[T, G, K] rank of each assignment's expert."""
        num_ranks = len(self.tokens)
        shards = pairwise(shard_starts(self.num_experts, num_ranks))
        owner = [r for r, (first, stop) in enumerate(shards) for _ in range(first, stop)]
        return torch.tensor(owner)[self.routing(rank).topk_ids]


class Outcome(NamedTuple):
    """One projection on one rank."""

    y: Tensor
    grad_x: Tensor
    grad_experts: Tensor
    grad_weights: Tensor | None


def project_all(
    case: Case, rank: int, dispatcher: Dispatcher, experts: Tensor
) -> tuple[list[Outcome], list[int]]:
    """All projections through one plan, and its counts."""
    routing = case.routing(rank)
    plan = dispatcher.plan(routing, case.num_experts)
    outcomes = []
    for read, write, weighted in PROJECTIONS:
        x = draw(case.num_rows(read, rank), D_IN, seed=10 + rank).requires_grad_()
        y = plan.run_and_combine(
            ExpertWeights(experts), plan.dispatch(x, read), read, write, weighted=weighted
        ).wait()
        sources = (x, experts, *([routing.topk_weights] if weighted else []))
        upstream = draw(*y.shape, seed=20 + rank)
        gradients = torch.autograd.grad(y, sources, upstream, retain_graph=True)
        outcomes.append(Outcome(y.detach(), *gradients, *([] if weighted else [None])))
    local = plan if isinstance(plan, LocalPlan) else plan.local
    return outcomes, local.counts.tolist()


def all_experts(case: Case) -> Tensor:
    return draw(case.num_experts, D_IN, D_OUT, seed=99)


def my_experts(case: Case, rank: int) -> slice:
    num_ranks = len(case.tokens)
    return slice(*shard_starts(case.num_experts, num_ranks)[rank : rank + 2])


def comm_group(overlap: bool = False) -> CommGroup:
    """To all ranks of the pool."""
    return CommGroup(dist.group.WORLD, "layer", TrafficCounter(), CommTimer(), overlap)


def on_rank(case: Case, overlap: bool = False) -> tuple[list[Outcome], list[int]]:
    """Runs on every rank of a pool."""
    rank = dist.get_rank()
    experts = all_experts(case)[my_experts(case, rank)].requires_grad_()
    return project_all(case, rank, AllToAllTokenDispatcher(comm_group(overlap)), experts)


CASES = {
    "even experts": Case((6, 6), 1, 6, 2),
    "uneven experts, heads": Case((6, 5), 3, 3, 2),
    "dropped": Case((9, 7), 2, 5, 3, drop=0.4),
    "all dropped": Case((4, 3), 2, 3, 2, drop=1.0),
    "one rank without tokens": Case((7, 0), 2, 5, 2),
    "no tokens at all": Case((0, 0), 1, 4, 2),
    "all tokens to one rank": Case((6, 5), 1, 8, 3, only_experts=4),
    "four ranks": Case((3, 8, 0, 5), 2, 7, 3, drop=0.2),
    "four ranks, all to one": Case((5, 0, 4, 3), 1, 14, 2, only_experts=3),
    "fewer experts than ranks": Case((3, 4, 2, 5), 1, 3, 2),
}


@pytest.mark.parametrize("overlap", [False, True], ids=["blocking", "overlapped"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_local_dispatch(pools, case, overlap):
    """All pairs of levels, weighted or not, as trips of one plan."""
    num_ranks = len(case.tokens)
    results = pools(num_ranks).run(on_rank, case, overlap)
    experts = all_experts(case).requires_grad_()
    references = [project_all(case, r, LocalTokenDispatcher(), experts) for r in range(num_ranks)]
    for i, projection in enumerate(PROJECTIONS):
        ours, theirs = ([outcomes[i] for outcomes, _ in side] for side in (results, references))
        for ours_r, theirs_r in zip(ours, theirs, strict=True):
            for name in ("y", "grad_x", "grad_weights"):
                torch.testing.assert_close(
                    getattr(ours_r, name),
                    getattr(theirs_r, name),
                    rtol=1e-12,
                    atol=1e-12,
                    msg=lambda m, name=name, p=projection: f"{name} of {p}: {m}",
                )
        # An expert's gradient already sums over ranks: that is what all-to-all's backward does.
        torch.testing.assert_close(
            torch.cat([outcome.grad_experts for outcome in ours]),
            sum(outcome.grad_experts for outcome in theirs),
            rtol=1e-12,
            atol=1e-12,
        )
    counts = [sum(per_rank) for per_rank in zip(*(c for _, c in references), strict=True)]
    assert list(chain(*(c for _, c in results))) == counts


def exchanged_rows(case: Case) -> dict[str, tuple[list[int], list[int]]]:
    """Runs on every rank of a pool: rows sent to and received from each rank, by level."""
    rank = dist.get_rank()
    plan = AllToAllTokenDispatcher(comm_group()).plan(case.routing(rank), case.num_experts)
    for rows in (*plan.local.rows.values(), *(route.rows for route in plan.routes.values())):
        assert_sorted_by_row(rows)
    return {level: (row_map.sent, row_map.received) for level, row_map in plan.routes.items()}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_row_travels_once_per_destination_rank(pools, case):
    """However many of that rank's experts it goes to; dropped assignments do not travel."""
    num_ranks = len(case.tokens)
    results = pools(num_ranks).run(exchanged_rows, case)
    for level in LEVELS:
        for rank in range(num_ranks):
            kept, owners = case.routing(rank).keep_mask, case.owners(rank)
            if kept is None:
                kept = torch.ones_like(owners, dtype=torch.bool)
            row = torch.arange(case.num_rows(level, rank))
            row = row.view(*owners.shape[: {"token": 1, "group": 2, "slot": 3}[level]])
            row = row.reshape(*row.shape, *[1] * (3 - row.dim())).expand_as(owners)
            pairs = set(zip(owners[kept].tolist(), row[kept].tolist(), strict=True))
            expected = [sum(owner == r for owner, _ in pairs) for r in range(num_ranks)]
            sent, received = results[rank][level]
            assert sent == expected
            assert received == [results[r][level][0][rank] for r in range(num_ranks)]


def test_sending_once_saves_most_rows_of_many_choices(pools):
    """16 of 64 experts on 4 ranks: nearly every token goes to every rank, once, not 4 times."""
    case = Case((200,) * 4, 1, 64, 16)
    results = pools(4).run(exchanged_rows, case)
    missed = comb(48, 16) / comb(64, 16)
    for rank in results:
        share = sum(rank["token"][0]) / (200 * 16)
        assert share == pytest.approx(4 * (1 - missed) / 16, abs=0.002)
        assert sum(rank["slot"][0]) == 200 * 16


def test_shards_are_contiguous_and_differ_by_one_at_most():
    for num_experts, num_ranks in product(range(1, 20), range(1, 7)):
        starts = shard_starts(num_experts, num_ranks)
        sizes = [stop - start for start, stop in pairwise(starts)]
        assert (starts[0], starts[-1]) == (0, num_experts)
        assert max(sizes) - min(sizes) <= 1
