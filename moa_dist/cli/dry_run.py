"""Formats the result of a dry run."""

from __future__ import annotations

from moa_dist.plan.terms import total
from moa_dist.units import short
from moa_dist.verify.dry_run import DryRun


def as_text(result: DryRun) -> str:
    """Return measured next to planned numbers, for people."""
    planned = result.planned
    tensors = planned.states.total + planned.computing
    if result.device == "cpu":
        tensors += planned.host_total
    others = result.world_size - 1
    who = f"rank 0 of {result.world_size:,}"
    if result.mirrored:
        who += f", with {others:,} mirrored ranks: communication took no time"
    memory = "GPU tensors" if result.device == "cuda" else "growth of the process"
    lines = [
        f"dry run   {who}; nothing was written",
        f"step      {result.seconds:.3f} s for {result.sequences} sequences on this rank, "
        f"{short(result.tokens)} tokens on all ranks; loss {result.loss:.3f}",
        f"memory    peak {_gib(result.peak)} ({memory}); planned {_gib(tensors)}",
    ]
    if result.reserved:
        lines.append(
            f"          {_gib(result.reserved)} reserved by the allocator; planned "
            f"{_gib(tensors + planned.margin)}, plus {_gib(total(planned.context))} for the context"
        )
    parts = planned.parts() | planned.states.in_host_memory()
    lines += [
        f"          {name:<12}{_gib(total(of)):>14}" for name, of in parts.items() if total(of)
    ]
    lines += [f"exchange  {part}: {why}" for part, why in result.exchange.items()]
    return "\n".join(lines)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"
