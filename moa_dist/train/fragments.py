"""Which parts of the model and of the optimizer state this rank owns; for deepspeed 0.19.

Under every ZeRO stage a rank owns flat ranges of parameters: `Fragment` names such a range
in coordinates of the whole, unsharded parameter and views its values, to be read or
overwritten in place. Together the fragments of all ranks are the whole state, whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.checkpoint.format import MASTER
from moa_dist.moe.experts import expert_layers
from moa_dist.train.engine import Engine


@dataclass(frozen=True)
class Fragment:
    """A contiguous range of one tensor."""

    parameter: str
    """Name of the parameter, or buffer, in the model."""
    state: str
    """`master`, or a moment of the optimizer such as `exp_avg`."""
    start: int
    """First element, in the flattened global parameter."""
    view: Tensor
    """1-D view of the live values."""


@dataclass(frozen=True)
class _Piece:
    name: str
    flat: Tensor
    """The tensor that the optimizer knows."""
    offset: int
    """Where the piece begins in it."""
    numel: int
    start: int
    """Where the piece begins in this rank's parameter."""
    replicated: bool
    """Other ranks hold the same piece, and one of them owns it."""


def _pieces(engine: Engine) -> Iterator[_Piece]:
    optimizer = engine.deepspeed.optimizer
    names = {parameter: name for name, parameter in engine.model.named_parameters()}
    match engine.zero_stage:
        case 0:
            for parameter, name in names.items():
                group = engine.mesh.edp_group if name in engine.expert_names else None
                replicated = dist.get_rank(group) != 0
                yield _Piece(name, parameter, 0, parameter.numel(), 0, replicated)
        case 1 | 2:
            if hasattr(optimizer, "bf16_groups"):  # DeepSpeed's own class for bf16 at stage 1
                groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
            else:
                groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
            for parameters, flat in zip(groups, flats, strict=True):
                for parameter in parameters:
                    mapping = parameter._hp_mapping
                    if mapping is not None:  # None: this rank owns nothing of it
                        high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                        yield _Piece(
                            names[parameter], flat, high.start, high.numel, low.start, False
                        )
        case _:
            for parameters, flat in zip(
                optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True
            ):
                offset = 0
                for parameter in parameters:
                    size = parameter.partition_numel()  # equal over ranks, the last one padded
                    start = size * dist.get_rank(parameter.ds_process_group)
                    numel = min(size, parameter.ds_numel - start)
                    if numel > 0:
                        yield _Piece(names[parameter], flat, offset, numel, start, False)
                    offset += size


def fragments(engine: Engine, *, owned_only: bool) -> Iterator[Fragment]:
    """All fragments on this rank; with `owned_only`, each one on exactly one rank."""
    experts = {f"{name}.weight": layer for name, layer in expert_layers(engine.model)}
    for piece in _pieces(engine):
        if owned_only and piece.replicated:
            continue
        start, numel = piece.start, piece.numel
        if layer := experts.get(piece.name):
            size = layer.d_in * layer.d_out
            numel = min(numel, layer.num_local * size - start)  # without what pads the shard
            start += layer.first_expert * size
        if numel <= 0:
            continue
        states = {MASTER: piece.flat.detach()}
        states |= {
            key: value
            for key, value in engine.optimizer.state.get(piece.flat, {}).items()
            if isinstance(value, Tensor) and value.shape == piece.flat.shape
        }
        for state, values in states.items():
            view = values.view(-1).narrow(0, piece.offset, numel)
            yield Fragment(piece.name, state, start, view)
    for name, buffer in engine.model.named_buffers():  # equal on all ranks, rank 0 owns them
        if not owned_only or engine.mesh.rank == 0:
            yield Fragment(name, MASTER, 0, buffer.view(-1))


def global_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer of the whole, unsharded model."""
    shapes = {
        # ZeRO 3 empties a parameter between uses and keeps its shape aside.
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.model.named_parameters()
    }
    for name, layer in expert_layers(engine.model):
        shapes[f"{name}.weight"] = (layer.num_experts, layer.d_in, layer.d_out)
    return shapes | {name: tuple(b.shape) for name, b in engine.model.named_buffers()}


def num_updates(engine: Engine) -> int:
    """Updates made so far, if the optimizer is one that counts them (AdamW), else 0."""
    states = (engine.optimizer.state.get(piece.flat, {}) for piece in _pieces(engine))
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def make_optimizer_state(engine: Engine, num_updates: int) -> None:
    """Create the moments that torch creates in the first step, as after so many updates."""
    for piece in _pieces(engine):
        state: dict[str, Any] = engine.optimizer.state[piece.flat]
        if isinstance(engine.optimizer, torch.optim.AdamW):
            state["step"] = torch.tensor(float(num_updates))
            keys = ["exp_avg", "exp_avg_sq"]
        else:
            keys = ["momentum_buffer"] if engine.optimizer.defaults["momentum"] else []
        for key in keys:
            if key not in state:
                state[key] = torch.zeros_like(piece.flat.detach())


def publish_masters(engine: Engine) -> None:
    """Bring the model's parameters in line with overwritten masters. Collective."""
    optimizer = engine.deepspeed.optimizer
    match engine.zero_stage:
        case 0:
            pass  # the optimizer holds the parameters themselves
        case 1 | 2:
            optimizer.update_lp_params()
        case _:
            for i in range(len(optimizer.fp16_groups)):
                optimizer._reassign_or_swap_out_partitioned_parameters(i)
            # Small ones stay gathered between steps: of those that are, the old values.
            if small := optimizer.persistent_parameters:
                small[0].partition(small)
                small[0].all_gather(small)
