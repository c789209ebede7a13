"""Starts a model with shared layers from a trained one whose layers are all distinct.

Bae et al. 2024 (arXiv 2410.20672, "Relaxed Recursive Transformers"): a shared matrix W starts from
the matrices W_i of the layers that come to share it, and adapters from the best approximation of
low rank to what is left, by a singular value decomposition W_i - W = U S V^T: B = U_r S_r and
A = V_r^T. What an application has of its own starts from its own layer, so that with adapters of
full rank and norms of its own the model computes what it did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moa_dist.config.model import ModelConfig
from moa_dist.errors import Problem
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.sharing import AdaptedLinear, core_layers
from moa_dist.models.stack import LayerStack
from moa_dist.moe.borrowing import named_used_modules

_MAY_DIFFER = {"num_distinct_layers", "sharing", "prelude", "coda"}


class Shared(NamedTuple):
    """A model with shared layers."""

    model: LanguageModel
    """The model, in the type of its source."""
    explained: float | None
    """Share of the squared differences between layers that adapters account for; None without."""


class _Use(NamedTuple):
    """Where a tensor is used."""

    position: int
    """Application of a layer, from 0."""
    name: str
    """Name of the tensor within its layer, in a model without adapters."""


def _stepwise(distinct: int, num_layers: int) -> list[int]:
    """First and last are always among them."""
    return [round(x) for x in torch.linspace(0, num_layers - 1, distinct).double().tolist()]


STARTS: dict[str, Callable[[int, int], list[int]] | None] = {
    "average": None,
    "stepwise": _stepwise,
    "first": lambda distinct, _: list(range(distinct)),
    "last": lambda distinct, num_layers: list(range(num_layers - distinct, num_layers)),
}
"""From numbers of distinct layers and of their applications, the application whose layer each
distinct one starts from; None for the mean over all that share it."""


def problems_of(source: ModelConfig, config: ModelConfig) -> Iterator[Problem]:
    """Yield each reason why `source` cannot be made into a model of `config`."""
    if source.num_repeats > 1:
        yield Problem(
            "layers of the source are shared already; its `model.num_distinct_layers` must be null",
            ("model.num_distinct_layers",),
        )
    if config.num_repeats < 2:
        yield Problem(
            "no layer of the new model is applied twice; set `model.num_distinct_layers` to fewer "
            "than the layers between prelude and coda",
            ("model.num_distinct_layers",),
        )
    may_differ = _MAY_DIFFER if config.prelude_ffn is None else _MAY_DIFFER - {"prelude"}
    for name in ModelConfig.model_fields:
        before, now = getattr(source, name), getattr(config, name)
        if name not in may_differ and before != now:
            now, before = ("null" if value is None else value for value in (now, before))
            text = f"`model.{name}` is {now}, but {before} in the source; make them equal"
            yield Problem(text, (f"model.{name}",), {f"model.{name}": [getattr(source, name)]})


@torch.no_grad()
def share(
    source: LanguageModel, config: ModelConfig, start: str = "average", *, seed: int = 0
) -> Shared:
    """Build a model of `config` from the weights of `source`; `start` is one of `STARTS`.

    `problems_of` must find no problems. Vectors of applications start at zero.
    """
    model = build_model(config, seed=seed).to(source.embedding.weight.dtype)
    state, before = model.state_dict(), source.state_dict()
    for name in state.keys() & before.keys():
        if ".layers." not in name:
            state[name].copy_(before[name])
    squares = torch.zeros(2, dtype=torch.float64)
    for ours, theirs in ((model.encoder, source.encoder), (model.stack, source.stack)):
        if ours is not None and theirs is not None:
            originals = [block.state_dict() for block in map(theirs.block, theirs.plan)]
            _start_shared(ours, config, originals, start)
            squares += _start_adapters(ours, originals)
    left, total = squares.tolist()
    adapted = config.sharing.adapter_rank is not None and total > 0
    return Shared(model.eval(), 1 - left / total if adapted else None)


def _start_shared(
    stack: LayerStack,
    config: ModelConfig,
    originals: Sequence[Mapping[str, Tensor]],
    start: str,
) -> None:
    """Fill everything but adapters and vectors."""
    choose, layers = STARTS[start], core_layers(config)
    chosen = None if choose is None else choose(max(layers) + 1, len(layers))
    for tensor, uses in _uses(stack).items():
        if chosen is not None and len(uses) > 1:
            layer = layers[uses[0].position - config.prelude]
            uses = [_Use(config.prelude + chosen[layer], uses[0].name)]
        values = [originals[position][name].double() for position, name in uses]
        tensor.copy_(torch.stack(values).mean(0))


def _uses(stack: LayerStack) -> dict[Tensor, list[_Use]]:
    """Return where each parameter and buffer is used that the source has, too."""
    uses: dict[Tensor, list[_Use]] = {}
    for position, planned in enumerate(stack.plan):
        block = stack.block(planned)
        modules = dict(named_used_modules(block))
        added: set[nn.Module | None] = {block.vector}
        for module in modules.values():
            if isinstance(module, AdaptedLinear):
                added |= {module.down, module.up}
        for path, module in modules.items():
            if module in added:
                continue
            tensors = (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            )
            for name, tensor in tensors:
                use = _Use(position, f"{path.removesuffix('.shared')}.{name}")
                uses.setdefault(tensor, []).append(use)
    return uses


def _start_adapters(stack: LayerStack, originals: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Fill adapters; returns squared differences [2], those left and all."""
    squares = torch.zeros(2, dtype=torch.float64)
    for position, planned in enumerate(stack.plan):
        for path, module in named_used_modules(stack.block(planned)):
            if not isinstance(module, AdaptedLinear):
                continue
            original = originals[position][f"{path}.weight"].double()
            u, s, v = torch.linalg.svd(original - module.shared.weight.double())
            rank = module.down.out_features
            module.up.weight.copy_(u[:, :rank] * s[:rank])
            module.down.weight.copy_(v[:rank])
            squares += torch.stack([s[rank:].square().sum(), s.square().sum()])
    return squares
