"""Layers of a trained run, on what they are given there: loads as uneven as they became."""

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
from moa_dist.errors import DataError
from moa_dist.evaluate.trained import load_trained
from moa_dist.moe.dispatch import LocalTokenDispatcher
from moa_dist.moe.routed_module import RoutedModule


class Learned(NamedTuple):
    """A trained layer and what to call it with."""

    layer: RoutedModule
    """In the setting's place and type."""
    inputs: tuple[Any, ...]
    """Of its last application to held-out text."""

    def work(self) -> Work:
        """Both passes."""
        inputs = {id(x): x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad}
        forward = cast(Callable[..., Any], self.layer)
        sources = [*inputs.values(), *self.layer.parameters()]
        return gradients(lambda: forward(*self.inputs).y, sources)

    def loads(self) -> str:
        """How uneven they are."""
        recorder = RecordingDispatcher()
        self.layer.dispatcher = recorder
        self.work()()
        self.layer.dispatcher = LocalTokenDispatcher()
        return recorder.fullest()


def learned_layers(setting: Setting, run: Path) -> dict[str, Learned]:
    """The parts with experts of the middle layer, by `attention` and `ffn`.

    Raises DataError if the run, or the held-out text that it names, is not there.
    """
    trained = load_trained(run)
    if trained.config.data.valid is None or trained.config.model.objective == "translation":
        raise DataError(f"{run}: learned routers are measured on data.valid of one text")
    folder = Path(trained.config.data.valid)
    batch = next(
        held_out_batches(
            trained.config,
            folder,
            load_manifest(folder),
            rank=0,
            world_size=1,
            micro_batch=setting.sequences,
        )
    ).to(setting.device)
    model = trained.model.to(setting.device, setting.dtype)
    block = model.stack.layers[len(model.stack.layers) // 2]
    given: dict[str, tuple[Any, ...]] = {}
    parts = {
        name: module for name, module in block.named_children() if isinstance(module, RoutedModule)
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
    """A hook that keeps what a module is called with; its last call counts."""

    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        floats = {id(x): x for x in inputs if isinstance(x, Tensor) and x.is_floating_point()}
        # One leaf for what is one tensor, such as queries and keys.
        leaves = {key: x.detach().clone().requires_grad_() for key, x in floats.items()}
        given[name] = tuple(leaves.get(id(x), x) for x in inputs)

    return hook
