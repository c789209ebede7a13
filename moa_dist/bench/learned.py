"""Layers of a trained run with the inputs that they get there, hence with realistic loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from moa_dist.bench.measure import Work
from moa_dist.bench.recorder import RecordingDispatcher
from moa_dist.bench.setting import Setting, gradients
from moa_dist.data.batches import held_out_batches
from moa_dist.data.manifest import load_manifest
from moa_dist.data.places import mirror, prepare_texts
from moa_dist.errors import DataError
from moa_dist.evaluate.trained import load_trained
from moa_dist.moe.dispatch import LocalTokenDispatcher
from moa_dist.moe.routed_module import RoutedModule


class Learned(NamedTuple):
    """A trained layer and inputs to call it with."""

    layer: RoutedModule
    """The layer, on the device and in the type of the setting."""
    inputs: tuple[Any, ...]
    """Inputs of its last application to held-out text."""

    def work(self) -> Work:
        """Return both passes of the layer."""
        inputs = {id(x): x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad}
        forward = cast(Callable[..., Any], self.layer)
        sources = [*inputs.values(), *self.layer.parameters()]
        return gradients(lambda: forward(*self.inputs).y, sources)

    def loads(self) -> str:
        """Describe how uneven the expert loads are."""
        recorder = RecordingDispatcher()
        self.layer.dispatcher = recorder
        self.work()()
        self.layer.dispatcher = LocalTokenDispatcher()
        return recorder.fullest()


def learned_layers(setting: Setting, run: Path) -> dict[str, Learned]:
    """Return the parts of the middle layer that have experts, by `attention` and `ffn`.

    Raises DataError if the run or its held-out text does not exist.
    """
    trained = load_trained(run)
    held_out = trained.config.data.held_out
    if not held_out or trained.config.model.objective == "translation":
        raise DataError(f"{run}: learned routers need data.valid, and no translation model")
    prepare_texts(trained.config.data, held_out[:1])
    folder = mirror(trained.config.data, held_out[0])
    batch = next(
        held_out_batches(
            trained.config,
            folder,
            load_manifest(folder),
            rank=0,
            world_size=1,
            micro_batch=setting.sequences,
            task=held_out[0].task,
        )
    ).to(setting.device)
    model = trained.model.to(setting.device, setting.dtype)
    block = model.stack.layers[len(model.stack.layers) // 2]
    given: dict[str, tuple[Any, ...]] = {}
    parts = {
        name: module
        for name, module in (("attention", block.attention), ("ffn", block.ffn))
        if isinstance(module, RoutedModule)
    }
    hooks = [
        module.register_forward_pre_hook(_remember(given, name)) for name, module in parts.items()
    ]
    with torch.no_grad():
        model(*batch.inputs())
    for hook in hooks:
        hook.remove()
    model.train()
    return {name: Learned(module, given[name]) for name, module in parts.items()}


def _remember(given: dict[str, tuple[Any, ...]], name: str) -> Callable[..., None]:
    """Return a hook that stores a module's inputs; the last call wins."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        floats = {id(x): x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}
        # A tensor passed twice, such as queries and keys, stays one leaf.
        leaves = {key: x.detach().clone().requires_grad_() for key, x in floats.items()}
        given[name] = tuple(leaves.get(id(x), x) for x in inputs)

    return hook
