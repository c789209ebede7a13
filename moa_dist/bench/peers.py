"""Section `peers`: MoE layers of installed packages, in the shape of the configuration's FFN.

Peers run as shipped, with softmax routers, and with a capacity if their dropless mode does not fit
on one rank.
"""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.bench.deepspeed_moe import CAPACITY, deepspeed_moe
from moa_dist.bench.measure import Table, compare
from moa_dist.bench.setting import Setting
from moa_dist.config.feed_forward import DenseFFNConfig, MoEFFNConfig
from moa_dist.distributed.start import init_distributed
from moa_dist.models.kinds import make_feed_forward


def peers(setting: Setting) -> list[Table]:
    """Compare with DeepSpeed's `MoE`, transformers' Mixtral block and plain torch grouped_mm."""
    model = setting.config.model
    if not isinstance(model.ffn, MoEFFNConfig):
        return []
    make = partial(make_feed_forward, d_model=model.d_model, init_scale=1.0)
    chosen = model.ffn.router.experts_per_token(training=True).mean
    dense = DenseFFNConfig(d_ff=chosen * model.ffn.d_expert)
    ours: dict[str, nn.Module] = {
        "dense, equal work": setting.ready(make(dense)),
        "ours": setting.ready(make(model.ffn)),
    }
    grouped = _GroupedMM(model.ffn, model.d_model, chosen)
    others: dict[str, nn.Module] = {"torch grouped_mm": grouped}
    notes = {"torch grouped_mm": "sort, gather, grouped_mm twice, index_add"}
    if find_spec("transformers"):
        others["transformers Mixtral"] = _mixtral(model.ffn, model.d_model, chosen)
        notes["transformers Mixtral"] = "gated: 1.5 times the work"
    with init_distributed(), deepspeed_moe(model.ffn, model.d_model) as theirs:
        others["DeepSpeed MoE"] = theirs
        notes["DeepSpeed MoE"] = f"capacity {CAPACITY}"
        work = {name: setting.feed_forward(layer) for name, layer in ours.items()}
        work |= {name: setting.peer(layer) for name, layer in others.items()}
        rows = compare(
            work,
            setting.device,
            repetitions=setting.repetitions,
            notes=notes,
            modules=ours | others,
        )
    return [Table("peers of the ffn, forward and backward", rows, setting.tokens)]


class _GroupedMM(nn.Module):
    """A straightforward MoE layer on torch's grouped matrix product."""

    def __init__(self, ffn: MoEFFNConfig, d_model: int, chosen: int) -> None:
        super().__init__()
        E, self.top_k = ffn.router.num_experts, chosen
        self.router = nn.Linear(d_model, E, bias=False)
        # grouped_mm needs rows of a multiple of 16 bytes.
        self.width = -(-d_model // 8) * 8
        self.up = nn.Parameter(torch.randn(E, self.width, ffn.d_expert) / self.width**0.5)
        self.down = nn.Parameter(torch.randn(E, ffn.d_expert, self.width) / ffn.d_expert**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer: [B, S, D] -> [B, S, D]."""
        rows = F.pad(x.flatten(0, 1), (0, self.width - x.shape[-1]))
        weight, expert = self.router(x.flatten(0, 1)).sigmoid().topk(self.top_k)
        order = expert.flatten().argsort(stable=True)
        token = order // self.top_k
        counts = expert.flatten().bincount(minlength=len(self.up))
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = F.grouped_mm(rows[token], self.up, offs=ends).relu()
        out = F.grouped_mm(hidden, self.down, offs=ends) * weight.flatten()[order, None]
        return torch.zeros_like(rows).index_add(0, token, out)[:, : x.shape[-1]].view_as(x)


def _mixtral(ffn: MoEFFNConfig, d_model: int, chosen: int) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=d_model,
        intermediate_size=ffn.d_expert,
        num_local_experts=ffn.router.num_experts,
        num_experts_per_tok=chosen,
    )
    block: nn.Module = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=d_model**-0.5)
    return block
