"""Measures what a forward keeps for the backward pass, tensor by tensor, through autograd's hooks.

It runs on the meta device, where tensors have shapes but no memory, and knows no kind of attention,
FFN or router. It assumes fused attention, the expert kernel of the planned device, no padding, and
routers that choose evenly.

Shapes: B sequences of S tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from moa_dist.kernels.hardware import Hardware
from moa_dist.kernels.routed_experts import kernel_for
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.models.block import Block
from moa_dist.models.halting import HaltingState
from moa_dist.models.language_model import LanguageModel, LanguageModelOutput
from moa_dist.models.objective import Batch, objective
from moa_dist.models.state import LayerState
from moa_dist.moe.dispatch import Dispatcher, LocalTokenDispatcher
from moa_dist.moe.routed_module import routed_modules
from moa_dist.moe.router import Routing
from moa_dist.plan.even_dispatch import EvenDispatcher

_LAYER = re.compile(r"\w+\.layers\.\d+\.")
INPUT, BETWEEN = "input", "between parts"
SHARED, LOGITS, LOSS = "shared by layers", "logits", "loss"
"""Names of tensors that belong to no module of a layer."""


class Saved(NamedTuple):
    """A tensor that is kept for the backward pass."""

    where: str
    """Name of the module that first saved it, or one of the names above."""
    shape: torch.Size
    """Shape of its whole storage."""
    element_bytes: int
    """Bytes per element."""


def measure_saved(
    model: LanguageModel,
    sequences: int,
    length: int,
    hardware: Hardware,
    num_ranks: int = 1,
    *,
    recompute_experts: bool = False,
) -> list[Saved]:
    """List what a forward on [sequences, length] tokens keeps besides parameters and buffers.

    `model` must be on the meta device; `hardware` is the planned one. Rows go to experts on
    `num_ranks` ranks, which may keep nothing of the products in experts.
    """
    recorder = _Recorder(model)

    def kernel(experts: ExpertWeights, x: Tensor, row_map: RowMap) -> Tensor:
        row_map = row_map._replace(recompute=recompute_experts)
        with recorder.inside("experts"):
            return kernel_for(experts, x, hardware).run(experts, x, row_map)

    here = num_ranks == 1
    _dispatch_by(model, LocalTokenDispatcher(kernel) if here else EvenDispatcher(num_ranks, kernel))
    with (
        recorder.following(model),
        saved_tensors_hooks(recorder.save, lambda tensor: tensor),
        _FusedAttention(hardware),
    ):
        _forward(model, sequences, length)
    return list(recorder.saved.values())


def measure_choices(model: LanguageModel, sequences: int, length: int) -> list[Saved]:
    """List what layers that are recomputed keep of their routers, on any hardware."""
    recorder = _Recorder(model)
    _dispatch_by(model, LocalTokenDispatcher())
    with recorder.following(model), torch.no_grad():
        _forward(model, sequences, length)
    return recorder.choices


def _dispatch_by(model: LanguageModel, dispatcher: Dispatcher) -> None:
    for _, module in routed_modules(model):
        module.dispatcher = dispatcher


def _forward(model: LanguageModel, sequences: int, length: int) -> None:
    tokens = torch.zeros(sequences, length, dtype=torch.int64, device="meta")
    source = tokens.clone() if model.encoder is not None else None
    batch = Batch(tokens, targets=tokens, source=source)
    objective(model, batch.with_tasks(tokens[:, 0], model.config.num_tasks))


def _first_of_parts(model: LanguageModel) -> Iterator[tuple[str, str]]:
    """Yield a layer and the module that takes what comes from the part before it."""
    for layer, block in model.named_modules():
        if isinstance(block, Block):
            yield layer, f"{layer}.ffn" if block.placement == "post" else f"{layer}.ffn_norm"
            if block.cross is not None:
                yield layer, f"{layer}.cross"


class _Recorder:
    """Records saved tensors by the module that is running."""

    def __init__(self, model: LanguageModel) -> None:
        self.saved: dict[UntypedStorage, Saved] = {}
        self.choices: list[Saved] = []
        self._running = [LOSS]
        kept_anyway = (*model.parameters(), *model.buffers())
        self._kept_anyway = {tensor.untyped_storage() for tensor in kept_anyway}
        self._first = {name: f"{layer}.{BETWEEN}" for layer, name in _first_of_parts(model)}

    def save(self, tensor: Tensor) -> Tensor:
        """Record a tensor, unless its storage has been recorded."""
        self._note(tensor, self._running[-1])
        return tensor

    def choose(self, choice: Iterable[Tensor | None]) -> None:
        """Record the choices of a router, or which tokens have halted."""
        where = f"{self._running[-1]}: choices"
        self.choices += [
            Saved(where, part.shape, part.element_size()) for part in choice if part is not None
        ]

    def _note(self, tensor: Tensor, where: str) -> None:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        if storage in self._kept_anyway or storage in self.saved or not storage.nbytes():
            return
        whole = tensor.numel() * size == storage.nbytes()
        shape = tensor.shape if whole else torch.Size([storage.nbytes() // size])
        self.saved[storage] = Saved(where, shape, size)

    def _name_here(self, name: str) -> str:
        """Name a module that is called: one that a layer borrows from another by its borrower."""
        caller = self._running[-1]
        layer = _LAYER.match(caller)
        if layer is None or name.startswith(layer[0]):
            return name
        return f"{caller}.{name.rpartition('.')[2]}"

    def _hand_on(self, state: Iterable[Tensor | None], where: str) -> None:
        """Attribute a state to the layer that takes it, though the one before may have saved it."""
        for tensor in state:
            if tensor is not None:
                self.saved.pop(tensor.untyped_storage(), None)
                self._note(tensor, where)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Attribute what runs meanwhile to a part of the running module."""
        self._running.append(f"{self._running[-1]}.{name}")
        yield
        self._running.pop()

    @contextmanager
    def following(self, model: LanguageModel) -> Iterator[None]:
        """Track which module is running."""

        def enter(name: str, module: Any, inputs: tuple[Any, ...]) -> None:
            self._running.append(self._name_here(name or LOSS))
            if isinstance(module, Block):
                x, *others = tree_leaves(inputs)
                self._note(x, f"{name}.{INPUT}")
                for argument in inputs:
                    if isinstance(argument, LayerState):
                        self._hand_on(tree_leaves(argument), f"{name}.{INPUT}")
                for other in others:  # such as a decoder's source
                    if isinstance(other, Tensor):
                        self._note(other, SHARED)
            elif name in self._first:
                self._note(inputs[0], self._first[name])

        def leave(output: Any) -> None:
            if isinstance(output, Routing):
                self.choose(output.choice())
            elif isinstance(output, HaltingState):
                self.choose((output.choice(),))
            self._running.pop()
            if isinstance(output, LanguageModelOutput):
                self._note(output.logits, LOGITS)

        with ExitStack() as hooks:
            for name, module in model.named_modules():
                entering = module.register_forward_pre_hook(
                    lambda module, inputs, name=name: enter(name, module, inputs)
                )
                leaving = module.register_forward_hook(lambda _m, _inputs, output: leave(output))
                hooks.enter_context(entering)
                hooks.enter_context(leaving)
            yield


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by the fused kernel, which saves no scores.

    It saves the same as CUDA's fused kernels, which do not support fp64.
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self._takes_fp64 = hardware.device_type == "cpu"

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention and (
            self._takes_fp64 or args[0].dtype != torch.float64
        ):
            func = _fused_attention
        return func(*args, **(kwargs or {}))


def _fused_attention(
    q: Tensor, k: Tensor, v: Tensor, *, enable_gqa: bool = False, **options: Any
) -> Tensor:
    result, _ = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **options)
    return result
