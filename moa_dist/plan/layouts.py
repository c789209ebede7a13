"""Ranks all layouts of a run on a cluster by predicted memory and step time.

Layouts differ in expert parallelism, ZeRO stage, micro-batch and exchange; each recomputes what it
must to fit. Model, global batch and precision stay, so all layouts train the same model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

from moa_dist.config.checks import check_fields
from moa_dist.config.optimization_checks import can_offload
from moa_dist.config.parts import PARTS
from moa_dist.config.recompute import Recompute
from moa_dist.config.run import Config, ExpertExchangeConfig
from moa_dist.distributed.traffic import TrafficKey, TrafficVolume
from moa_dist.kernels.hardware import Hardware
from moa_dist.models.counts import ELEMENT_BYTES, Counts, count_model
from moa_dist.models.language_model import LanguageModel, meta_model
from moa_dist.moe.sharding import EXCHANGES
from moa_dist.plan.activations import Activations, activations_of
from moa_dist.plan.cluster import Cluster
from moa_dist.plan.exchange_choice import expected_traffic, layout_of
from moa_dist.plan.memory import Budget, budget
from moa_dist.plan.recomputation import Choice, Cost, choose, recompute_name, recompute_options
from moa_dist.plan.states import Sizes, sizes_of
from moa_dist.plan.terms import total
from moa_dist.plan.time import Assumptions, RowBytes, StepTime, row_bytes, step_time

_STATES = {"masters": "fp32 masters", "moments": "optimizer moments"}


@dataclass(frozen=True)
class Planned:
    """A layout with its predictions."""

    config: Config
    """The configuration in this layout."""
    memory: Budget
    """Predicted memory of a rank."""
    time: StepTime
    """Predicted time of a step."""
    recomputation: Choice | None = None
    """Why it recomputes what it does; None if that was given."""

    @property
    def name(self) -> str:
        """The layout in one line."""
        parallel, train = self.config.parallel, self.config.train
        exchange = parallel.expert_exchange
        exchanged = "" if parallel.expert_parallel == 1 else _exchange_name(self.config, exchange)
        again = ", recompute" if train.recompute else ""
        if train.recompute and train.recompute is not True:
            again += f" {recompute_name(train.recompute)}"
        host = ", optimizer in host memory" if self.config.optimizer.offload == "host" else ""
        return (
            f"ep {parallel.expert_parallel}, ZeRO {parallel.zero_stage}, "
            f"micro-batch {train.micro_batch}{again}{host}{exchanged}"
        )

    @property
    def overrides(self) -> list[str]:
        """Overrides that select this layout."""
        parallel, train = self.config.parallel, self.config.train
        found = [
            f"parallel.expert_parallel={parallel.expert_parallel}",
            f"parallel.zero_stage={parallel.zero_stage}",
            f"train.micro_batch={train.micro_batch}",
            f"train.recompute={recompute_name(train.recompute)}",
        ]
        if self.config.optimizer.offload != "none":
            found.append(f"optimizer.offload={self.config.optimizer.offload}")
        if parallel.expert_parallel > 1:
            found += [
                f"parallel.expert_exchange.{part}={getattr(parallel.expert_exchange, part)}"
                for part in self.config.model.routed_parts()
            ]
        return found


def _exchange_name(config: Config, exchange: ExpertExchangeConfig) -> str:
    kinds = {part: getattr(exchange, part) for part in config.model.routed_parts()}
    if len(set(kinds.values())) == 1:
        return f", {next(iter(kinds.values()))} exchanged"
    return "".join(f", {part} {kind}" for part, kind in kinds.items())


class Planner:
    """Plans layouts of one run; caches what layouts have in common."""

    def __init__(self, config: Config, cluster: Cluster, assumed: Assumptions) -> None:
        self.config, self.cluster, self.assumed = config, cluster, assumed
        self._sizes: dict[int, Sizes] = {}
        self._flows: dict[tuple[object, ...], dict[TrafficKey, TrafficVolume]] = {}

    @cached_property
    def model(self) -> LanguageModel:
        """The whole model, on the meta device."""
        return meta_model(self.config.model)

    @cached_property
    def counts(self) -> Counts:
        """Counts of the model."""
        return count_model(self.model, self.config.data.sequence_length)

    @cached_property
    def _rows_moved(self) -> RowBytes:
        element, length = ELEMENT_BYTES[self.config.train.precision], self.counts.sequence_length
        return row_bytes(self.model, element, length)

    @cached_property
    def _activations(self) -> Activations:
        return activations_of(self.config, Hardware("cuda"))

    def plan(self, config: Config) -> Planned:
        """Predict a layout that fits the number of GPUs and whose exchange is decided."""
        layout = layout_of(config, self.cluster.num_gpus, config.parallel.expert_exchange)
        ep = layout.expert_parallel
        if ep not in self._sizes:
            self._sizes[ep] = sizes_of(self.model, ep)
        sizes = self._sizes[ep]
        memory = budget(self.model, sizes, config, layout, self._activations)
        time = step_time(
            config,
            self.counts,
            self._rows_moved,
            layout,
            self._traffic(config),
            sizes,
            self.cluster,
            self.assumed,
        )
        return Planned(config, memory, time)

    def fit(self, config: Config) -> Planned:
        """Predict a layout with the cheapest recomputation that fits, or the smallest if none does.

        The configured recomputation is ignored.
        """
        planned: dict[Recompute, Planned] = {}

        def cost_of(recompute: Recompute) -> Cost:
            train = config.train.model_copy(update={"recompute": recompute})
            found = planned[recompute] = self.plan(config.model_copy(update={"train": train}))
            return Cost(found.memory.total, found.time.seconds)

        choice = choose(recompute_options(config), cost_of, self.cluster.gpu.memory)
        return replace(planned[choice.recompute], recomputation=choice)

    def _traffic(self, config: Config) -> dict[TrafficKey, TrafficVolume]:
        """Predict expert traffic, which does not depend on ZeRO."""
        parallel, train = config.parallel, config.train
        exchange = parallel.expert_exchange
        key = (parallel.expert_parallel, train.micro_batch, train.recompute, repr(exchange))
        if key not in self._flows:
            self._flows[key] = expected_traffic(config, self.cluster.num_gpus, exchange, self.model)
        return self._flows[key]

    def candidates(self, base: Config) -> Iterator[Config]:
        """Yield every layout of `base` that can run, without recomputation."""
        world_size, train = self.cluster.num_gpus, base.train
        per_rank = train.global_batch // world_size
        routed = base.model.routed_parts()
        for ep, stage in product(_divisors(world_size), range(4)):
            exchanges = product(EXCHANGES, repeat=len(routed) if ep > 1 else 0)
            for kinds in exchanges:
                exchange = dict.fromkeys(PARTS, "tokens") | dict(zip(routed, kinds, strict=False))
                for micro_batch in _divisors(per_rank):
                    config = with_layout(base, ep, stage, micro_batch, False, exchange)
                    if not check_fields(config) and not _accumulates_in_vain(config, per_rank):
                        yield config

    def ranked(self) -> tuple[list[Planned], list[str]]:
        """Return layouts that fit, fastest first, and why no layout of an (ep, ZeRO) fits.

        Equally fast ones are ordered by fewer micro-batches, since launching a kernel takes time
        that is not predicted, then by lower ZeRO stage. If none fits, the layouts are those with
        the optimizer's state in host memory.
        """
        fitting, reasons = self._ranked(self.config)
        if reasons and not fitting and can_offload(self.config):
            there = self.config.optimizer.model_copy(update={"offload": "host"})
            fitting, _ = self._ranked(self.config.model_copy(update={"optimizer": there}))
        return fitting, reasons

    def _ranked(self, base: Config) -> tuple[list[Planned], list[str]]:
        fitting: list[Planned] = []
        smallest: dict[tuple[int, int], Planned] = {}
        for config in self.candidates(base):
            planned = self.fit(config)
            if planned.memory.total <= self.cluster.gpu.memory:
                fitting.append(planned)
            parallel = config.parallel
            key = (parallel.expert_parallel, parallel.zero_stage)
            best = smallest.get(key)
            if best is None or planned.memory.total < best.memory.total:
                smallest[key] = planned
        fitting.sort(key=_rank)
        memory = self.cluster.gpu.memory
        reasons = [
            f"{planned.name}: {why_too_much(planned.memory, memory)}"
            for planned in smallest.values()
            if planned.memory.total > memory
        ]
        return fitting, reasons


def with_layout(
    config: Config,
    expert_parallel: int,
    zero_stage: int,
    micro_batch: int,
    recompute: Recompute,
    exchange: dict[str, str],
) -> Config:
    """Return the run in another layout, without checking it."""
    parallel = config.parallel.model_copy(
        update={
            "expert_parallel": expert_parallel,
            "zero_stage": zero_stage,
            "expert_exchange": ExpertExchangeConfig.model_validate(exchange),
        }
    )
    train = config.train.model_copy(update={"micro_batch": micro_batch, "recompute": recompute})
    return config.model_copy(update={"parallel": parallel, "train": train})


def _rank(planned: Planned) -> tuple[float, int, int]:
    config = planned.config
    return planned.time.seconds, -config.train.micro_batch, config.parallel.zero_stage


def _accumulates_in_vain(config: Config, per_rank: int) -> bool:
    """Return whether it accumulates although `global_batch` balance needs one forward per step."""
    routers = config.model.routers().values()
    whole = any(router.balance.scope == "global_batch" for router in routers)
    return whole and config.train.micro_batch != per_rank


def why_too_much(memory: Budget, available: int) -> str:
    """Explain in a sentence what takes the most memory."""
    parts = {name: total(lines) for name, lines in memory.parts().items()}
    name, largest = max(parts.items(), key=lambda part: part[1])
    names = _STATES | {"kept": "activations", "working": "passing activations"}
    of_all = f"{_gib(memory.total)} of which {_gib(largest)} are {names.get(name, name)}"
    excess = _gib(memory.total - available)
    return f"{of_all}, for a GPU of {_gib(available)}: {excess} too much"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.1f} GiB"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
