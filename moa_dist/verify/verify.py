"""Verifies that this layout, on these machines, trains the same model as one process.

A small copy of the configuration takes single steps in the job's own layout, and rank 0 compares
them with plain torch. Nothing is printed here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.checkpoint.format import MASTER
from moa_dist.config.run import Config, OptimizerConfig
from moa_dist.config.sequence_groups import sequences_per_group
from moa_dist.config.shrink import shrink
from moa_dist.config.zero_sizes import ZeroSizes
from moa_dist.distributed.device import min_device_memory, should_overlap
from moa_dist.distributed.mesh import Mesh
from moa_dist.errors import TrainingError
from moa_dist.models.cross_entropy import NO_TARGET
from moa_dist.models.language_model import meta_model
from moa_dist.models.objective import Batch
from moa_dist.moe.experts import expert_layers
from moa_dist.plan.exchange_choice import decide_exchange
from moa_dist.train.build import build_engine
from moa_dist.train.engine import Engine
from moa_dist.verify.compare import (
    BOUNDS,
    Check,
    compare_bf16,
    compare_gradients,
    compare_step,
    compare_updated_model,
)
from moa_dist.verify.reference import (
    Outcome,
    initial_model,
    input_mask,
    is_clear_of_rounding,
    one_process,
)

_SIZES = ZeroSizes(bucket=300, persistent=0)
"""Small sizes: many buckets, and ZeRO 3 partitions every parameter, as in large models."""
_GRADIENT_RATE = 1024.0
"""SGD learning rate of steps that reveal the gradient: fp32 weights keep more of its digits."""
_EPS = 1e-2
"""Minimum of AdamW's eps: below it, the sign of a pure rounding error decides a step."""
_OTHER_TEXTS = 1000
"""Offset from the seed of target texts to that of their sources."""
_END = 0
"""Token that ends documents, where the run keeps them apart: the most frequent one."""


@dataclass(frozen=True)
class Report:
    """Holds what was run and how it compares; the same on every rank."""

    config: Config
    """The small copy of the configuration."""
    precision: str
    """Precision that the layout computed in, except for the checks of bf16."""
    num_parameters: int
    """Number of parameters of the small copy."""
    real_share: float
    """Share of tokens that are not padding."""
    dropped: int
    """Number of assignments dropped for lack of capacity."""
    idle_experts: int
    """Number of experts that got no token, over all router calls."""
    checks: tuple[Check, ...]
    """All comparisons."""

    @property
    def equal(self) -> bool:
        """Return whether all checks passed."""
        return all(check.equal for check in self.checks)


class _Steps(NamedTuple):
    """Holds the choices that rank 0 broadcasts."""

    seed: int
    """Seed of the data."""
    clip_norm: float
    """Clipping threshold, half of the gradient norm."""


def verify(config: Config, mesh: Mesh, device: torch.device) -> Report:
    """Compare single steps of a small copy of `config` with one process. Collective.

    `config` must fit the mesh. Raises TrainingError if a step cannot be taken.
    """
    memory = min_device_memory(device)
    decided = decide_exchange(config, mesh.world_size, memory, meta_model(config.model)).exchange
    parallel = config.parallel.model_copy(update={"expert_exchange": decided})
    small = shrink(config.model_copy(update={"parallel": parallel}), mesh.world_size)
    precision = "fp64" if small.parallel.zero_stage == 0 else "fp32"
    plan: list[_Steps | None] = [_choose(small, precision) if mesh.rank == 0 else None]
    dist.broadcast_object_list(plan)
    assert plan[0] is not None
    batch = make_batch(small, plan[0].seed)
    own = _own(small)

    def both(
        precision: str, optimizer: OptimizerConfig, lr: float
    ) -> tuple[Outcome, Outcome] | None:
        ours = _in_this_layout(_with(small, precision, optimizer), batch, lr, mesh, device)
        return None if ours is None else (ours, one_process(small, [batch], optimizer, lr))

    plain = both(precision, _sgd(small), _GRADIENT_RATE)
    clipped = both(precision, _sgd(small, plan[0].clip_norm), 1.0)
    updated = both(precision, own, 1.0)
    low = both("bf16", _sgd(small), _GRADIENT_RATE) if config.train.precision == "bf16" else None
    report: list[Report | None] = [None]
    if plain and clipped and updated:  # on rank 0
        bound = BOUNDS[precision]
        checks = [
            *compare_gradients(*plain, bound),
            compare_step("parameters, clipped SGD", *clipped, bound),
            compare_updated_model(*clipped, bound),
            compare_step(f"parameters, {own.kind}", *updated, bound),
        ]
        if low:
            checks += compare_bf16(*low, _expert_names(small))
        report = [_report(small, precision, batch, plain[1], checks)]
    dist.broadcast_object_list(report)
    assert report[0] is not None
    return report[0]


def _sgd(config: Config, clip_norm: float | None = None) -> OptimizerConfig:
    plain = {"kind": "sgd", "momentum": 0.0, "weight_decay": 0.0, "clip_norm": clip_norm}
    return config.optimizer.model_copy(update=plain)


def _own(config: Config) -> OptimizerConfig:
    return config.optimizer.model_copy(update={"eps": max(config.optimizer.eps, _EPS)})


def _with(config: Config, precision: str, optimizer: OptimizerConfig) -> Config:
    train = config.train.model_copy(update={"precision": precision})
    return config.model_copy(update={"train": train, "optimizer": optimizer})


def _choose(config: Config, precision: str) -> _Steps:
    """Choose data whose routing rounding does not change, before and after the clipped step."""
    for seed in range(100):
        batch = make_batch(config, seed)
        norm = one_process(config, [batch], _sgd(config), 1.0).grad_norms[0]
        if precision == "fp64":
            return _Steps(seed, norm / 2)
        step = one_process(config, [batch], _sgd(config, norm / 2), 1.0)
        if all(
            is_clear_of_rounding(config, batch, parameters, seed)
            for parameters in (step.initial, step.parameters)
        ):
            return _Steps(seed, norm / 2)
    raise TrainingError(
        "in a small copy of this model, rounding decides the choice of experts for all data that "
        "was tried, so layouts need not agree and fp32 cannot be verified; to verify in fp64, set "
        "parallel.zero_stage=0"
    )


def _expert_names(config: Config) -> set[str]:
    return {f"{name}.weight" for name, _ in expert_layers(initial_model(config))}


def _report(
    config: Config, precision: str, batch: Batch, reference: Outcome, checks: list[Check]
) -> Report:
    assert batch.token_mask is not None
    return Report(
        config=config,
        precision=precision,
        num_parameters=sum(p.numel() for p in reference.initial.values()),
        real_share=batch.token_mask.double().mean().item(),
        dropped=sum(int(d.sum()) for d in reference.dropped.values()),
        idle_experts=sum(int((load == 0).sum()) for load in reference.load.values()),
        checks=tuple(checks),
    )


def make_batch(config: Config, seed: int) -> Batch:
    """Build the global batch, ordered by rank: distinct sequences, some of them short."""
    tasks = torch.arange(config.train.global_batch)
    batch = _whole_texts(config, seed).with_tasks(tasks, config.model.num_tasks)
    return batch.in_documents(_END) if config.data.document_attention else batch


def _whole_texts(config: Config, seed: int) -> Batch:
    tokens, token_mask = _texts(config, seed)
    match config.model.objective:
        case "causal":
            return Batch(tokens, token_mask)
        case "masked":
            generator = torch.Generator().manual_seed(seed)
            hidden = token_mask & (torch.rand(tokens.shape, generator=generator) < 0.3)
            return Batch(tokens, token_mask, tokens.masked_fill(~hidden, NO_TARGET))
        case "translation":
            return Batch(tokens, token_mask, None, *_texts(config, seed + _OTHER_TEXTS))


def _texts(config: Config, seed: int) -> tuple[Tensor, Tensor]:
    """Draw tokens and their mask, both [N, sequence length + 1].

    Frequencies decrease as in language. No token occurs twice in a group of sequences, or in a
    sequence if the vocabulary is too small for that: two equal tokens could tie, and rounding would
    decide which of them is dropped for lack of capacity.
    """
    generator = torch.Generator().manual_seed(seed)
    N, length = config.train.global_batch, config.data.sequence_length + 1
    frequency = 1 / torch.arange(1.0, config.model.vocab_size + 1).pow(4)
    group = sequences_per_group(config.model)
    if group * length > config.model.vocab_size:
        group = 1
    drawn = group * length
    tokens = torch.multinomial(
        frequency.expand(N // group, -1),
        drawn,
        replacement=drawn > config.model.vocab_size,
        generator=generator,
    ).view(N, length)
    lengths = torch.randint(1, 2 * length, (N,), generator=generator).clamp(max=length)
    lengths[0] = length
    if N > 1:
        lengths[-1] = 0  # a sequence of padding only
    return tokens, torch.arange(length) < lengths[:, None]


def _in_this_layout(
    config: Config, batch: Batch, lr: float, mesh: Mesh, device: torch.device
) -> Outcome | None:
    """Take one engine step over all ranks and gather the outcome on rank 0."""
    exchange = config.parallel.expert_exchange
    overlap = should_overlap(config.parallel.overlap, dist.get_backend())
    engine = build_engine(config, mesh, device, exchange, overlap=overlap, zero_sizes=_SIZES)
    micro_batches = _micro_batches(batch, mesh, config.train.micro_batch)
    initial = _owned(engine)
    logits = _logits(engine, micro_batches)
    result = engine.step(micro_batches, lr)
    mine = {
        "initial": initial,
        "logits": logits,
        "loss": result.loss,
        "aux_losses": result.aux_losses,
        "grad_norm": result.grad_norm,
        "load": {call: r.load.cpu() for call, r in result.routing.items()},
        "dropped": {call: r.dropped.cpu() for call, r in result.routing.items()},
        "parameters": _owned(engine),
        "logits_after": _logits(engine, micro_batches),
    }
    engine.close()
    everyone: list[Any] | None = [None] * mesh.world_size if mesh.rank == 0 else None
    dist.gather_object(mine, everyone)
    return None if everyone is None else _joined(config, everyone)


def _micro_batches(batch: Batch, mesh: Mesh, size: int) -> list[Batch]:
    """Split off this rank's contiguous share, so that groups of sequences stay together."""
    share = batch.num_sequences // mesh.world_size
    begin = mesh.rank * share
    return [batch.rows(slice(first, first + size)) for first in range(begin, begin + share, size)]


def _logits(engine: Engine, batches: Iterable[Batch]) -> Tensor:
    """Compute the logits of this rank's real tokens, [T, V]."""
    engine.deepspeed.eval()
    results = []
    with torch.no_grad():
        for batch in (batch.to(engine.device) for batch in batches):
            logits = engine.deepspeed(*batch.inputs()).logits
            results.append(logits[input_mask(batch)].cpu())
    return torch.cat(results)


def _owned(engine: Engine) -> list[tuple[str, int, Tensor]]:
    return [
        (f.parameter, f.start, f.view.cpu().clone())
        for f in engine.state.fragments(owned_only=True)
        if f.state == MASTER
    ]


def _joined(config: Config, everyone: list[dict[str, Any]]) -> Outcome:
    """Join the outcomes of all ranks; losses are equal on every rank by construction."""

    def over_sites(key: str) -> dict[Any, Tensor]:
        return {call: sum(rank[key][call] for rank in everyone) for call in everyone[0][key]}

    def whole(key: str) -> dict[str, Tensor]:
        result = {
            name: torch.full_like(tensor, math.nan)
            for name, tensor in initial_model(config).state_dict().items()
        }
        for name, start, values in (piece for rank in everyone for piece in rank[key]):
            result[name].view(-1)[start : start + len(values)] = values
        return result

    return Outcome(
        initial=whole("initial"),
        logits=torch.cat([rank["logits"] for rank in everyone]),
        loss=everyone[0]["loss"],
        aux_losses=everyone[0]["aux_losses"],
        load=over_sites("load"),
        dropped=over_sites("dropped"),
        grad_norms=tuple(rank["grad_norm"] for rank in everyone),
        parameters=whole("parameters"),
        logits_after=torch.cat([rank["logits_after"] for rank in everyone]),
    )
