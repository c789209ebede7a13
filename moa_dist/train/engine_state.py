"""Which parts of the model and of the optimizer state this rank owns; for deepspeed 0.19.

Under every ZeRO stage a rank owns flat ranges of parameters. This file alone knows where DeepSpeed
keeps them; checkpoints know it as a `StateSource`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moa_dist.checkpoint.format import MASTER
from moa_dist.checkpoint.state_source import Fragment
from moa_dist.distributed.mesh import Mesh
from moa_dist.models.parameter_roles import Role, parameter_roles
from moa_dist.moe.experts import expert_layers
from moa_dist.train.muon import MatrixPiece, Muon, Partition


@dataclass(frozen=True)
class _Piece:
    name: str
    flat: Tensor
    """The tensor that the optimizer knows."""
    offset: int
    """First element of the piece in `flat`."""
    numel: int
    start: int
    """First element of the piece in this rank's parameter."""
    replicated: bool
    """Whether another rank owns the piece, which this one holds a copy of."""


class OwnedRange(NamedTuple):
    """A range of a tensor that the optimizer knows, of one parameter."""

    parameter: str
    """Name of the parameter."""
    flat: Tensor
    """The tensor."""
    offset: int
    """First element."""
    numel: int
    """Number of elements."""

    def of(self, values: Tensor) -> Tensor:
        """Return the range of a tensor shaped like `flat`, 1-D."""
        return values.reshape(-1).narrow(0, self.offset, self.numel)


class EngineState:
    """The engine's `StateSource`: which parts of model and optimizer this rank holds."""

    def __init__(
        self,
        deepspeed: Any,
        optimizer: torch.optim.Optimizer,
        mesh: Mesh,
        device: torch.device,
        zero_stage: int,
    ) -> None:
        """`deepspeed` is DeepSpeed's engine, which wraps `optimizer` and a sharded model."""
        self._deepspeed, self._optimizer = deepspeed, optimizer
        self._model, self._mesh, self._zero_stage = deepspeed.module, mesh, zero_stage
        self._experts = {f"{name}.weight": layer for name, layer in expert_layers(self._model)}
        self.device = device

    def fragments(self, *, owned_only: bool) -> Iterator[Fragment]:
        """Iterate over all fragments on this rank; with `owned_only`, each is on one rank only."""
        for piece in self._pieces():
            if owned_only and piece.replicated:
                continue
            start, numel = piece.start, self._real_numel(piece)
            if numel <= 0:
                continue
            if layer := self._experts.get(piece.name):
                start += layer.first_expert * layer.d_in * layer.d_out
            states = {MASTER: piece.flat.detach()}
            states |= {
                key: value
                for key, value in self._optimizer.state.get(piece.flat, {}).items()
                if isinstance(value, Tensor) and value.shape == piece.flat.shape
            }
            for state, values in states.items():
                view = values.view(-1).narrow(0, piece.offset, numel)
                yield Fragment(piece.name, state, start, view)
        for name, buffer in self._model.named_buffers():  # equal on all ranks, rank 0 owns them
            if not owned_only or self._mesh.rank == 0:
                yield Fragment(name, MASTER, 0, buffer.view(-1))

    def owned_ranges(self) -> Iterator[OwnedRange]:
        """Yield the ranges of the optimizer's tensors that no other rank owns."""
        for piece in self._pieces():
            if not piece.replicated and (numel := self._real_numel(piece)) > 0:
                yield OwnedRange(piece.name, piece.flat, piece.offset, numel)

    def _real_numel(self, piece: _Piece) -> int:
        """Count the elements of a piece, without those that pad a shard of experts."""
        layer = self._experts.get(piece.name)
        if layer is None:
            return piece.numel
        return min(piece.numel, layer.num_local * layer.d_in * layer.d_out - piece.start)

    def global_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter and buffer of the whole, unsharded model."""
        shapes = {
            # ZeRO 3 empties a parameter between uses and keeps its shape aside.
            name: tuple(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in self._model.named_parameters()
        }
        for name, layer in self._experts.items():
            shapes[name] = (layer.num_experts, layer.d_in, layer.d_out)
        return shapes | {name: tuple(b.shape) for name, b in self._model.named_buffers()}

    def num_updates(self) -> int:
        """Count the updates made so far; 0 for an optimizer that does not count (SGD)."""
        states = (self._optimizer.state.get(piece.flat, {}) for piece in self._pieces())
        return max((int(state["step"]) for state in states if "step" in state), default=0)

    def make_optimizer_state(self, num_updates: int) -> None:
        """Create the moments that torch creates in its first step, as if after so many updates."""
        for piece in self._pieces():
            state: dict[str, Any] = self._optimizer.state[piece.flat]
            by_muon = isinstance(self._optimizer, Muon) and piece.name in self._matrices()
            if by_muon or self._optimizer.defaults.get("momentum"):
                keys = ["momentum_buffer"]
            elif isinstance(self._optimizer, torch.optim.AdamW):
                fused = self._optimizer.defaults["fused"]  # such kernels count on their device
                device = piece.flat.device if fused else torch.device("cpu")
                state["step"] = torch.tensor(float(num_updates), device=device)
                keys = ["exp_avg", "exp_avg_sq"]
            else:
                keys = []
            for key in keys:
                if key not in state:
                    state[key] = torch.zeros_like(piece.flat.detach())

    def matrix_partitions(self) -> Iterator[Partition]:
        """Yield what ZeRO made of every group of parameters, for an update of whole matrices."""
        if self._zero_stage == 0:
            return
        names, shapes = self._names(), self._matrices()
        pieces: dict[Tensor, list[MatrixPiece]] = defaultdict(list)
        for piece in self._pieces():
            if shape := shapes.get(piece.name):
                pieces[piece.flat].append(
                    MatrixPiece(piece.name, shape, piece.offset, piece.start, piece.numel)
                )
        for parameters, flat in self._partitioned_groups():
            is_expert = names[parameters[0]] in self._experts
            yield Partition(flat, pieces[flat], self._mesh.edp_group if is_expert else None)

    def _matrices(self) -> dict[str, tuple[int, int]]:
        """Return rows and columns of all weight matrices of layers, by name."""
        roles = parameter_roles(self._model)
        return {
            name: (shape[-2], shape[-1])
            for name, shape in self.global_shapes().items()
            if roles.get(name) is Role.MATRIX
        }

    def publish_masters(self) -> None:
        """Bring the model's parameters in line with overwritten masters. Collective."""
        optimizer = self._deepspeed.optimizer
        match self._zero_stage:
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

    def _pieces(self) -> Iterator[_Piece]:
        match self._zero_stage:
            case 0:
                return self._whole_parameters()
            case 1 | 2:
                return self._partitions()
            case _:
                return self._partitions_of_zero_3()

    def _whole_parameters(self) -> Iterator[_Piece]:
        for name, parameter in self._model.named_parameters():
            group = self._mesh.edp_group if name in self._experts else None
            replicated = dist.get_rank(group) != 0
            yield _Piece(name, parameter, 0, parameter.numel(), 0, replicated)

    def _partitioned_groups(self) -> Iterator[tuple[Sequence[Any], Tensor]]:
        """Yield parameters that ZeRO partitions together, and this rank's flat partition."""
        optimizer = self._deepspeed.optimizer
        if self._zero_stage == 3:
            groups, flats = optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat
        elif hasattr(optimizer, "bf16_groups"):  # DeepSpeed's own class for bf16 at stage 1
            groups, flats = optimizer.bf16_groups, optimizer.fp32_groups_flat_partition
        else:
            groups, flats = optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
        return zip(groups, flats, strict=True)

    def _partitions(self) -> Iterator[_Piece]:
        names = self._names()
        for parameters, flat in self._partitioned_groups():
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is not None:  # None: this rank owns nothing of it
                    high, low = mapping.hp_fragment_address, mapping.lp_fragment_address
                    name = names[parameter]
                    yield _Piece(name, flat, high.start, high.numel, low.start, False)

    def _partitions_of_zero_3(self) -> Iterator[_Piece]:
        names = self._names()
        for parameters, flat in self._partitioned_groups():
            offset = 0
            for parameter in parameters:
                size = parameter.partition_numel()  # equal over ranks, the last one padded
                start = size * dist.get_rank(parameter.ds_process_group)
                numel = min(size, parameter.ds_numel - start)
                if numel > 0:
                    yield _Piece(names[parameter], flat, offset, numel, start, False)
                offset += size

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self._model.named_parameters()}
