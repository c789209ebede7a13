"""DeepSpeed's own MoE layer, to compare with."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

import deepspeed
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from moa_dist.config.feed_forward import MoEFFNConfig
from moa_dist.train.deepspeed_hooks import disable_shm_comm_jit, ignore_renamed_collectives

CAPACITY = 1.25
"""Capacity factor of the layer; its dropless mode would pad all experts to the fullest one."""


@contextlib.contextmanager
def deepspeed_moe(ffn: MoEFFNConfig, d_model: int, expert_parallel: int = 1) -> Iterator[nn.Module]:
    """Build a layer with the experts of `ffn`, rounded up to a multiple of `expert_parallel`.

    Collective over all ranks. DeepSpeed keeps process groups by name until the end.
    """
    num_experts = -(-ffn.router.num_experts // expert_parallel) * expert_parallel
    with contextlib.redirect_stdout(io.StringIO()):
        disable_shm_comm_jit()
        ignore_renamed_collectives()
        deepspeed.init_distributed(verbose=False)
        layer = MoE(
            d_model,
            _Expert(d_model, ffn.d_expert),
            num_experts=num_experts,
            ep_size=expert_parallel,
            k=ffn.router.experts_per_token(training=True).mean,
            capacity_factor=CAPACITY,
        )
        layer.set_deepspeed_parallelism()
    try:
        yield layer
    finally:
        groups._EXPERT_PARALLEL_GROUP.clear()
        groups._EXPERT_DATA_PARALLEL_GROUP.clear()


class _Expert(nn.Module):
    def __init__(self, d_model: int, d_expert: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_expert, bias=False)
        self.down = nn.Linear(d_expert, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the expert: [..., D] -> [..., D]."""
        down: Tensor = self.down(self.up(x).relu())
        return down
