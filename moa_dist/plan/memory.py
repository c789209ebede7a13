"""Predicts the memory of one rank, part by part.

States are exact (`moa_dist.plan.states`), activations are measured without memory
(`moa_dist.plan.activations`), and the rest are allowances, and called so.

Shapes: W ranks, P that share experts, N that hold the same parameter: W for dense ones, W / P for
experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moa_dist.config.parts import PARTS
from moa_dist.config.run import Config, tokens_per_sample
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES
from moa_dist.models.language_model import LanguageModel
from moa_dist.moe.routed_module import routed_modules
from moa_dist.plan.activations import Activations
from moa_dist.plan.predicted_traffic import MASTER_BYTES, STAGE3_KEPT, Layout
from moa_dist.plan.states import Sizes, States, states
from moa_dist.plan.terms import Term, term, total

_REDUCED_AT_ONCE = 500_000_000
"""Elements that DeepSpeed's bf16 optimizer, used at stage 1, copies per all-reduce."""
CONTEXT = term("CUDA context, NCCL, libraries", ("GiB", 2), ("B", 2**30))
"""Allowance for the CUDA context and libraries."""
FRAGMENTED = 0.1
"""Allowance for fragmentation: share of everything but states that the allocator loses."""

Device = Literal["cuda", "cpu"]


@dataclass(frozen=True)
class Budget:
    """All memory of a rank at its peak."""

    states: States
    """States that persist from step to step."""
    gathered: list[Term]
    """Parameters of other ranks while in use, and gradients before they are reduced."""
    kept: list[Term]
    """Activations kept from forward to backward."""
    working: list[Term]
    """Temporary memory of the largest operation."""
    buffers: list[Term]
    """Communication buffers."""
    updating: list[Term]
    """Temporary memory of the optimizer, after activations are freed."""
    context: list[Term]
    """Memory in use before the first tensor."""
    is_pinned: bool
    """Whether what host memory holds is pinned there."""

    @property
    def computing(self) -> int:
        """Peak on top of states, either while computing or while updating."""
        computing = total([*self.gathered, *self.kept, *self.working, *self.buffers])
        return max(computing, total(self.updating))

    @property
    def margin(self) -> int:
        """Bytes lost to fragmentation."""
        return round(FRAGMENTED * self.computing)

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.states.total + self.computing + self.margin + total(self.context)

    @property
    def host_total(self) -> int:
        """Bytes in the host's memory."""
        return self.states.host_total(is_pinned=self.is_pinned)

    def parts(self) -> dict[str, list[Term]]:
        """Lines by part. Not all exist at the same time, so they may exceed the total."""
        own = {name: lines for name, lines in vars(self).items() if isinstance(lines, list)}
        return self.states.parts() | own


def budget(
    model: LanguageModel,
    sizes: Sizes,
    config: Config,
    layout: Layout,
    activations: Activations,
) -> Budget:
    """Predict the memory of the fullest rank.

    `model`: the whole one, on any device; `sizes` of it; `config` has the layout of `layout`.
    """
    stage = config.parallel.zero_stage
    sequences = -(-config.train.micro_batch * tokens_per_sample(config) // activations.length)
    device: Device = "cpu" if activations.hardware.device_type == "cpu" else "cuda"
    held = states(sizes, layout, stage, config.optimizer)
    updated = ("kept", 2), ("B", total(held.masters) or total(held.parameters))
    return Budget(
        states=held,
        gathered=[
            *_gathered(model, layout),
            *_whole_parameters(sizes, layout, stage),
            *_waiting_gradients(sizes, layout, stage, model),
        ],
        kept=activations.kept(
            sequences,
            recompute=layout.recompute,
            num_ranks=layout.expert_parallel,
            exchanged=[part for part in PARTS if _exchanged(layout, part) == "tokens"],
        ),
        working=activations.working(sequences),
        buffers=_buffers(sizes, layout, stage, device, offloaded=held.offloaded),
        updating=[] if held.offloaded else [term("optimizer's temporaries", *updated)],
        context=[CONTEXT] if device == "cuda" else [],
        is_pinned=device == "cuda",
    )


def _exchanged(layout: Layout, part: str) -> str:
    return str(getattr(layout.exchange, part)) if layout.expert_parallel > 1 else "nothing"


def _gathered(model: LanguageModel, layout: Layout) -> Iterator[Term]:
    """Yield gathered experts and their gradients, which live until their backward pass ends."""
    for part in PARTS:
        if _exchanged(layout, part) == "weights":
            elements = sum(
                layer.num_experts * layer.macs_per_row()
                for _, module in routed_modules(model)
                if module.part == part
                for layer in module.held_expert_layers().values()
            )
            both = ("B", layout.element_bytes + _sum_bytes(layout))
            yield term(f"all experts of {part} and gradients", ("elements", elements), both)


def _sum_bytes(layout: Layout) -> int:
    """Return the size of an element of a gradient while it is summed: over repeats in fp32."""
    return max(layout.element_bytes, MASTER_BYTES if layout.num_repeats > 1 else 0)


def _whole_parameters(sizes: Sizes, layout: Layout, zero_stage: int) -> list[Term]:
    """List what ZeRO 3 keeps gathered, at least the two largest parameters."""
    if zero_stage < 3:
        return []
    of_a_layer = sum(sorted((*sizes.dense, *sizes.experts))[-2:])
    whole = ("elements", max(min(sizes.whole, STAGE3_KEPT), of_a_layer))
    return [term("parameters gathered by ZeRO 3", whole, ("B", layout.element_bytes))]


def _waiting_gradients(
    sizes: Sizes, layout: Layout, zero_stage: int, model: LanguageModel
) -> list[Term]:
    """List gradients that exist before ZeRO reduces them.

    Gradients of a shared layer are summed over its repeats, in fp32 or wider, so none is complete
    before the backward pass nears its end; what is applied once is counted, too. Otherwise they
    arrive layer by layer, except that of a tied embedding, which is summed from head to lookup.
    """
    element = ("B", _sum_bytes(layout))
    if layout.num_repeats > 1:
        once = zero_stage < 2 and layout.num_micro_batches == 1
        if once and not (zero_stage == 1 and layout.element_bytes == 2):
            return []  # they become the gradients that are counted above
        return [term("gradients that wait for all repeats", ("elements", sizes.whole), element)]
    of_a_layer = sum(sorted((*sizes.dense, *sizes.experts))[-2:])
    terms = [term("gradients of a layer", ("elements", of_a_layer), element)]
    if model.head is None:
        table = ("elements", model.embedding.weight.numel())
        wide = ("B", max(layout.element_bytes, MASTER_BYTES))
        terms.append(term("gradient of the tied embedding", table, wide))
    return terms


def _buffers(
    sizes: Sizes, layout: Layout, zero_stage: int, device: Device, *, offloaded: bool
) -> list[Term]:
    bucket = ("elements", DEFAULT_ZERO_SIZES.bucket)
    master = ("B", MASTER_BYTES)
    match zero_stage, layout.element_bytes:
        case 0, _:
            # Gradients in one piece, and in fp64 with their squares: train/zero0.py.
            largest = max(sum(sizes.dense), sum(sizes.experts))
            return [
                term("flat gradients", ("elements", sizes.whole), ("B", layout.element_bytes)),
                term("their squares in fp64", ("elements", largest), ("B", 16)),
            ]
        case 1, 2 if not offloaded:
            copied = ("elements", min(sizes.whole, _REDUCED_AT_ONCE))
            return [term("gradients on their way", copied, master)]
        case 3, _:
            return [term("bucket of gradients", bucket, master)]
    if device == "cpu":
        return [term("bucket of gradients", bucket, master)]
    largest = max((*sizes.dense, *sizes.experts))
    bucket = ("elements", DEFAULT_ZERO_SIZES.overlapped_bucket(largest))
    return [term("buckets of gradients", ("buckets", 2), bucket, master)]
