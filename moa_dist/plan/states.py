"""What a rank holds throughout a step: parameters, gradients, and ZeRO's state of them.

Exact: `tests/distributed/test_memory.py` compares it with DeepSpeed's tensors.

Shapes: W ranks, N that hold the same parameter: W for dense ones, W / P for experts, if P share
them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from torch import nn

from moa_dist.config.run import OptimizerConfig
from moa_dist.config.zero_sizes import DEFAULT_ZERO_SIZES, ZeroSizes
from moa_dist.models.parameter_roles import Role, parameter_roles
from moa_dist.moe.experts import expert_layers
from moa_dist.plan.orthogonalization import Matrices
from moa_dist.plan.predicted_traffic import ALIGNMENT, MASTER_BYTES, Layout, round_up
from moa_dist.plan.terms import Factor, Term, term, total


class Sizes(NamedTuple):
    """Elements of each parameter that one rank holds, in the model's order."""

    dense: tuple[int, ...]
    """Parameters that all ranks hold."""
    experts: tuple[int, ...]
    """Shards of expert tensors, which are padded to the largest."""
    is_matrix: tuple[bool, ...]
    """Whether each of `dense` is a weight matrix of a layer, which Muon updates."""
    dense_matrices: tuple[Matrices, ...]
    """Those of `dense` that are."""
    expert_matrices: tuple[Matrices, ...]
    """Matrices of `experts`."""

    @property
    def whole(self) -> int:
        """Elements of all parameters."""
        return sum(self.dense) + sum(self.experts)


def sizes_of(model: nn.Module, expert_parallel: int) -> Sizes:
    """Return the sizes of a whole `model`, on any device, once its experts are sharded."""
    experts = dict(expert_layers(model))
    named = model.named_parameters()
    dense = {n: p.shape for n, p in named if n.removesuffix(".weight") not in experts}
    roles = parameter_roles(model)
    matrices = [
        Matrices(-(-layer.num_experts // expert_parallel), layer.d_in, layer.d_out)
        for layer in experts.values()
    ]
    return Sizes(
        dense=tuple(shape.numel() for shape in dense.values()),
        experts=tuple(tensor.numel for tensor in matrices),
        is_matrix=tuple(roles[name] is Role.MATRIX for name in dense),
        dense_matrices=tuple(Matrices.of(dense[n]) for n in dense if roles[n] is Role.MATRIX),
        expert_matrices=tuple(matrices),
    )


@dataclass(frozen=True)
class States:
    """Bytes that persist from step to step, as lines for dense and for expert parameters."""

    parameters: list[Term]
    """Parameters in the type that forward and backward compute in."""
    gradients: list[Term]
    """Gradients at their peak within a step."""
    masters: list[Term]
    """ZeRO's fp32 copy of the parameters, which it updates."""
    moments: list[Term]
    """The optimizer's moments."""
    staged: list[Term]
    """Gradients and parameters in host memory, if the optimizer's state is there."""
    offloaded: bool
    """Whether masters, moments and what is staged are in host memory."""
    pinned: tuple[str, ...]
    """Parts that DeepSpeed pins in the memory of a host with GPUs."""

    def parts(self) -> dict[str, list[Term]]:
        """Lines of what the device holds, by name."""
        here = {"parameters": self.parameters, "gradients": self.gradients}
        return here if self.offloaded else here | self._of_optimizer()

    def in_host_memory(self) -> dict[str, list[Term]]:
        """Lines of what the host's memory holds of this rank, by name."""
        return self._of_optimizer() | {"staged": self.staged} if self.offloaded else {}

    def _of_optimizer(self) -> dict[str, list[Term]]:
        return {"masters": self.masters, "moments": self.moments}

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(map(total, self.parts().values()))

    def host_total(self, *, is_pinned: bool) -> int:
        """Return bytes in host memory, where torch rounds what it pins to powers of two.

        An estimate if `is_pinned`: it rounds lines, but buffers are pinned one by one.
        """
        rounded = self.pinned if is_pinned else ()
        return sum(
            1 << (line.value - 1).bit_length() if name in rounded and line.value else line.value
            for name, lines in self.in_host_memory().items()
            for line in lines
        )


def states(
    sizes: Sizes,
    layout: Layout,
    zero_stage: int,
    optimizer: OptimizerConfig,
    zero_sizes: ZeroSizes = DEFAULT_ZERO_SIZES,
) -> States:
    """Return the exact bytes of the fullest rank, as deepspeed 0.19 keeps them."""
    offloaded = optimizer.offload == "host"
    pinned = ("staged",) if zero_stage == 3 else ("masters", "staged")
    result = States([], [], [], [], [], offloaded, pinned)
    element, master = ("B", layout.element_bytes), ("B", MASTER_BYTES)
    for name, numels, num_ranks, num_moments in _groups(sizes, layout, optimizer):
        moments = ("moments", num_moments)
        plain = ("elements", sum(numels))
        if zero_stage == 0:
            result.parameters.append(term(name, plain, element))
            result.gradients.append(term(name, plain, element))
            result.moments.append(term(name, moments, plain, element))
            continue
        padded = ("elements", round_up(sum(numels), ALIGNMENT * num_ranks))
        part = ("elements", padded[1] // num_ranks)
        if zero_stage == 3:
            part = ("elements", sum(-(-numel // num_ranks) for numel in numels))
            small = ("elements", sum(n for n in numels if n <= zero_sizes.persistent))
            result.parameters.append(term(name, part, element))
            result.parameters.append(term(f"{name}, small ones whole", small, element))
        else:
            result.parameters.append(term(name, padded, element))
        match zero_stage, layout.element_bytes:
            case _ if offloaded:
                touched = ("elements", _touched(numels, part[1], num_ranks))
                _add_offloaded(result, layout, zero_stage, name, plain, part, touched)
            case 1, 2:  # kept until the last micro-batch, in both types
                result.gradients.append(term(f"{name} in bf16", plain, element))
                result.gradients.append(term(f"{name} in fp32", padded, master))
            case 1, _:
                result.gradients.append(term(name, plain, master))
            case 2, 4:
                touched = ("elements", _touched(numels, part[1], num_ranks))
                result.gradients.append(term(f"{name} of which it has a part", touched, master))
            case _:
                result.gradients.append(term(name, part, master))
        result.masters.append(term(name, part, master))
        result.moments.append(term(name, moments, part, master))
    if offloaded and zero_stage < 3:
        largest = term(
            "copy of the largest one", ("elements", max((*sizes.dense, *sizes.experts))), element
        )
        result.gradients.append(largest)
        result.staged.append(largest)
    return result


def _add_offloaded(
    held: States,
    layout: Layout,
    zero_stage: int,
    name: str,
    whole: Factor,
    part: Factor,
    touched: Factor,
) -> None:
    """Add gradients, and what is staged in host memory, of parameters that ZeRO partitions.

    `whole` counts the elements of all, `part` those of a rank's partition, and `touched` those of
    parameters of which a rank has a part.
    """
    element, master = ("B", layout.element_bytes), ("B", MASTER_BYTES)
    if zero_stage == 1:
        held.gradients.append(term(name, whole, master))
    if zero_stage < 3 and layout.element_bytes == 2:
        held.gradients.append(term(f"{name}, this rank's part", part, master))
    held.staged.append(term(f"gradients, {name}", part, master))
    match zero_stage, layout.element_bytes:
        case 3, _:
            held.staged.append(term(f"sums of gradients, {name}", part, master))
        case 2, 4 if layout.num_micro_batches > 1:
            held.staged.append(term(f"sums of gradients, {name}", touched, master))
    if zero_stage < 3:
        held.staged.append(term(f"parameters, {name}", part, element))


def _groups(
    sizes: Sizes, layout: Layout, optimizer: OptimizerConfig
) -> Iterator[tuple[str, Sequence[int], int, int]]:
    """Yield what is partitioned together: name, sizes, ranks, and moments per parameter.

    Groups that differ in their decay or learning rate alone count as one.
    """
    ranks, copies = layout.world_size, layout.world_size // layout.expert_parallel
    vectors = [n for n, matrix in zip(sizes.dense, sizes.is_matrix, strict=True) if not matrix]
    matrices = [tensor.numel for tensor in sizes.dense_matrices]
    match optimizer.kind:
        case "muon":
            groups = [
                ("dense", vectors, ranks, 2),
                ("dense matrices", matrices, ranks, 1),
                ("experts", sizes.experts, copies, 1),
            ]
        case kind:
            num = 2 if kind == "adamw" else int(optimizer.momentum > 0)
            groups = [("dense", sizes.dense, ranks, num), ("experts", sizes.experts, copies, num)]
    return (group for group in groups if group[1])


def _touched(numels: Sequence[int], part: int, num_ranks: int) -> int:
    """Count elements of all parameters that overlap a rank's partition, on the fullest rank."""
    ends = list(accumulate(numels))
    most = 0
    for rank in range(min(num_ranks, -(-ends[-1] // part))):
        first, last = bisect_right(ends, rank * part), bisect_left(ends, (rank + 1) * part)
        most = max(most, sum(numels[first : last + 1]))
    return most
