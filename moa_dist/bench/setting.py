"""The setting that all sections share: what to measure, where, and modules ready to run."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moa_dist.bench.measure import Work
from moa_dist.config.run import Config
from moa_dist.distributed.mesh import Mesh
from moa_dist.models.mask import AttentionMask
from moa_dist.models.objective import Batch
from moa_dist.moe.initialize import initialize
from moa_dist.moe.router import Router, Routing

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
"""torch types by `train.precision`."""

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """What to measure, and where."""

    config: Config
    """Configuration of the model and its training."""
    device: torch.device
    """Device of this process."""
    sequences: int
    """Sequences per call."""
    repetitions: int
    """Rounds, in which alternatives take turns."""
    seed: int = 0
    """Seed of everything random except weights."""
    run: Path | None = None
    """A trained run of this configuration, whose layers are measured next to new ones."""

    @property
    def tokens(self) -> int:
        """Tokens per call."""
        return self.sequences * self.config.data.sequence_length

    @property
    def device_name(self) -> str:
        """The device's model name."""
        is_cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if is_cuda else platform.processor()

    @property
    def dtype(self) -> torch.dtype:
        """Type of parameters and activations."""
        return DTYPES[self.config.train.precision]

    def on(self, mesh: Mesh) -> Config:
        """Return the configuration for an engine whose micro-batch is what a call measures."""
        sizes = {"micro_batch": self.sequences, "global_batch": self.sequences * mesh.world_size}
        parallel = self.config.parallel.model_copy(update={"expert_parallel": mesh.expert_parallel})
        train = self.config.train.model_copy(update=sizes)
        return self.config.model_copy(update={"parallel": parallel, "train": train})

    def ready(self, module: Module) -> Module:
        """Initialize a module and move it to the device in the setting's type."""
        initialize(module, seed=0)
        return module.to(self.device, self.dtype).train()

    def vectors(self) -> Tensor:
        """Draw inputs [B, S, D] from a standard normal distribution."""
        shape = (self.sequences, self.config.data.sequence_length, self.config.model.d_model)
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def both_passes(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> Work:
        """Return work: forward [B, S, D] -> [B, S, D], backward to the input and all parameters."""
        x, upstream = self.vectors().requires_grad_(), self.vectors()
        return gradients(lambda: forward(x), [x, *module.parameters()], upstream)

    def attention(self, module: nn.Module) -> Work:
        """Return both passes of causal self-attention."""
        mask = AttentionMask(causal=True)
        return self.both_passes(module, lambda x: module(x, x, x, mask).y)

    def feed_forward(self, module: nn.Module) -> Work:
        """Return both passes of a feed-forward part."""
        return self.both_passes(module, lambda x: module(x, x, None).y)

    def block(self, module: nn.Module) -> Work:
        """Return both passes of a block."""
        return self.both_passes(module, lambda x: module(x, AttentionMask(causal=True)).x)

    def peer(self, module: nn.Module) -> Work:
        """Return both passes of another package's feed-forward part, with its own weights."""
        module.to(self.device, self.dtype).train()

        def forward(x: Tensor) -> Tensor:
            output = module(x)
            y: Tensor = output[0] if isinstance(output, tuple) else output
            return y

        return self.both_passes(module, forward)

    def batch(self) -> Batch:
        """Draw random tokens for a training step."""
        model = self.config.model
        shape = (self.sequences, self.config.data.sequence_length + 1)
        generator = torch.Generator().manual_seed(self.seed)
        tokens = torch.randint(model.vocab_size, shape, generator=generator)
        source = tokens[:, 1:] if model.objective == "translation" else None
        batch = Batch(tokens, source=source)
        return batch.with_tasks(torch.arange(self.sequences), model.num_tasks).to(self.device)


def gradients(
    forward: Callable[[], Tensor], sources: list[Tensor], upstream: Tensor | None = None
) -> Work:
    """Return work that computes `forward()` and the gradients of all sources.

    The gradient of the output is `upstream`, or ones if it is None.
    """

    def once() -> None:
        y = forward()
        torch.autograd.grad(y, sources, torch.ones_like(y) if upstream is None else upstream)

    return once


def balance(module: Module) -> Module:
    """Make all routers in `module` choose perfectly balanced experts; returns the module.

    A router still does its own work, so only the loads differ. The result is optimistic: with a
    real router, experts have uneven loads.
    """
    for router in module.modules():
        if isinstance(router, Router):
            router.register_forward_hook(_balanced)
    return module


def _balanced(router: Router, inputs: tuple[Any, ...], routing: Routing) -> Routing:
    """Replace a router's choices: a forward hook."""
    T, G, K = routing.topk_ids.shape
    E, device = router.num_experts // G, routing.topk_ids.device
    ids = torch.arange(T * K, device=device).view(T, 1, K) % E
    return routing._replace(topk_ids=ids + torch.arange(G, device=device)[:, None] * E)
