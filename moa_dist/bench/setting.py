"""What all sections of the benchmark share: what to measure, where, and modules ready to run."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from moa_dist.bench.measure import Work
from moa_dist.config.run import Config
from moa_dist.distributed.mesh import Mesh
from moa_dist.models.attention import AttentionMask
from moa_dist.models.objective import Batch
from moa_dist.moe.initialize import initialize
from moa_dist.moe.router import Router, Routing

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
"""By `train.precision`."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """What to measure, and where."""

    config: Config
    """Of the model, and of how it would be trained."""
    device: torch.device
    """That of this process."""
    sequences: int
    """Per call."""
    repetitions: int
    """Rounds in which the alternatives take turns."""
    seed: int = 0
    """Of all that is random, the weights apart."""
    run: Path | None = None
    """A trained run of this configuration, whose layers are measured beside new ones."""

    @property
    def tokens(self) -> int:
        """Per call."""
        return self.sequences * self.config.data.sequence_length

    @property
    def device_name(self) -> str:
        """Of its maker."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else platform.processor()

    @property
    def dtype(self) -> torch.dtype:
        """Of parameters and activations."""
        return DTYPES[self.config.train.precision]

    def on(self, mesh: Mesh) -> Config:
        """For an engine whose step takes, of every rank, as many sequences as are measured."""
        sizes = {"micro_batch": self.sequences, "global_batch": self.sequences * mesh.world_size}
        parallel = self.config.parallel.model_copy(update={"expert_parallel": mesh.expert_parallel})
        train = self.config.train.model_copy(update=sizes)
        return self.config.model_copy(update={"parallel": parallel, "train": train})

    def ready(self, module: Module) -> Module:
        """The module with initial weights, where it is to run."""
        initialize(module, seed=0)
        return module.to(self.device, self.dtype).train()

    def vectors(self) -> Tensor:
        """[B, S, D], standard normal."""
        shape = (self.sequences, self.config.data.sequence_length, self.config.model.d_model)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def both_passes(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Work:
        """Forward, [B, S, D] to [B, S, D], and backward to the input and all parameters."""
        x, upstream = self.vectors().requires_grad_(), self.vectors()
        return gradients(lambda: forward(x), [x, *module.parameters()], upstream)

    def attention(self, module: nn.Module) -> Work:
        """Both passes of causal self-attention."""
        mask = AttentionMask(causal=True)
        return self.both_passes(module, lambda x: module(x, x, x, mask).y)

    def feed_forward(self, module: nn.Module) -> Work:
        """Both passes of a feed-forward part."""
        return self.both_passes(module, lambda x: module(x, x, None).y)

    def block(self, module: nn.Module) -> Work:
        """Both passes of a block."""
        return self.both_passes(module, lambda x: module(x, AttentionMask(causal=True)).x)

    def peer(self, module: nn.Module) -> Work:
        """Both passes of another package's feed-forward part, with the weights it has."""
        module.to(self.device, self.dtype).train()

        def forward(x: Tensor) -> Tensor:
            output = module(x)
            y: Tensor = output[0] if isinstance(output, tuple) else output
            return y

        return self.both_passes(module, forward)

    def batch(self) -> Batch:
        """Random tokens for a training step."""
        model = self.config.model
        shape = (self.sequences, self.config.data.sequence_length + 1)
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(model.vocab_size, shape, generator=generator)
        source = tokens[:, 1:] if model.objective == "translation" else None
        return Batch(tokens, source=source).to(self.device)


def gradients(
    forward: Callable[[], Tensor], sources: list[Tensor], upstream: Tensor | None = None
) -> Work:
    """Work that computes `forward()` and the gradients of all sources (upstream ones if None)."""

    def once() -> None:
        y = forward()
        torch.autograd.grad(y, sources, torch.ones_like(y) if upstream is None else upstream)

    return once


class BalancedRouter(nn.Module):
    """A router whose choices are replaced by perfectly even ones; all else costs the same.

    Flatters: a real router's experts get uneven loads.
    """

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    @property
    def num_experts(self) -> int:
        """See `Router.num_experts`."""
        return self.router.num_experts

    def forward(self, x: Tensor, token_mask: Tensor | None = None) -> Routing:
        """See `Router.forward`."""
        routing = self.router(x, token_mask)
        T, G, K = routing.topk_ids.shape
        E, device = self.num_experts // G, routing.topk_ids.device
        ids = torch.arange(T * K, device=device).view(T, 1, K) % E
        return routing._replace(topk_ids=ids + torch.arange(G, device=device)[:, None] * E)


def balance(module: Module) -> Module:
    """Replace all routers in `module` by balanced ones."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Router) and not isinstance(parent, BalancedRouter):
                setattr(parent, name, BalancedRouter(child))
    return module
