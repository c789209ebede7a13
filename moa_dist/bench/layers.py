"""Sections `layers` and `block`: experts against dense parts, and where a layer's time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moa_dist.bench.dense import equal_work
from moa_dist.bench.measure import Table, Work, compare
from moa_dist.bench.recorder import Recorded, RecordingDispatcher
from moa_dist.bench.setting import Setting, balance, gradients
from moa_dist.kernels.grouped import add_up, gather, grouped_experts, multiply
from moa_dist.kernels.routed_experts import kernel_for, routed_experts
from moa_dist.kernels.row_map import ExpertWeights, RowMap
from moa_dist.models.block import Block
from moa_dist.models.kinds import make_attention, make_feed_forward
from moa_dist.moe.dispatch import LocalTokenDispatcher
from moa_dist.moe.routed_module import RoutedModule
from moa_dist.moe.router import Router

if TYPE_CHECKING:
    from moa_dist.bench.learned import Learned

Kernel = Callable[[ExpertWeights, Tensor, RowMap], Tensor]


def layers(setting: Setting) -> list[Table]:
    """Measure the attention and the FFN of the configuration, as far as they have experts."""
    model = setting.config.model
    dense = equal_work(model, setting.config.data.sequence_length)
    learned = {} if setting.run is None else _learned(setting, setting.run)
    tables = []
    if model.attention.routers:
        attention = partial(make_attention, d_model=model.d_model, init_scale=1.0)
        tables += _layer(
            "attention",
            setting,
            setting.attention,
            partial(attention, model.attention),
            attention(dense.attention),
            learned.get("attention"),
        )
    if model.ffn.routers:
        ffn = partial(make_feed_forward, d_model=model.d_model, init_scale=1.0)
        tables += _layer(
            "ffn",
            setting,
            setting.feed_forward,
            partial(ffn, model.ffn),
            ffn(dense.ffn),
            learned.get("ffn"),
        )
    return tables


def _learned(setting: Setting, run: Path) -> dict[str, Learned]:
    # Imported here, because the rest needs neither a tokenizer nor DeepSpeed.
    from moa_dist.bench.learned import learned_layers

    return learned_layers(setting, run)


def _layer(
    title: str,
    setting: Setting,
    work_of: Callable[[nn.Module], Work],
    make: Callable[[], nn.Module],
    dense: nn.Module,
    learned: Learned | None,
) -> list[Table]:
    layer = setting.ready(make())
    assert isinstance(layer, RoutedModule)
    modules: dict[str, nn.Module] = {
        "dense, equal work": setting.ready(dense),
        "experts, random router": layer,
        "experts, even loads": balance(setting.ready(make())),
    }
    work = {name: work_of(module) for name, module in modules.items()}
    notes = []
    if learned:
        name = "experts, learned router"
        modules[name], work[name] = learned.layer, learned.work()
        notes.append(f"learned router: {learned.loads()}")
    rows = compare(work, setting.device, repetitions=setting.repetitions, modules=modules)
    title = f"{title}, forward and backward"
    return [
        Table(title, rows, setting.tokens, notes),
        _parts(title, setting, layer, work_of),
    ]


def block(setting: Setting) -> list[Table]:
    """Measure a whole block: norms, attention and FFN."""
    model = setting.config.model
    dense = equal_work(model, setting.config.data.sequence_length)
    modules = {
        "dense, equal work": setting.ready(Block(dense)),
        "experts, random router": setting.ready(Block(model)),
        "experts, even loads": balance(setting.ready(Block(model))),
    }
    work = {name: setting.block(module) for name, module in modules.items()}
    rows = compare(work, setting.device, repetitions=setting.repetitions, modules=modules)
    return [Table("block, forward and backward", rows, setting.tokens)]


def _parts(
    title: str, setting: Setting, layer: RoutedModule, work_of: Callable[[nn.Module], Work]
) -> Table:
    """Measure each part of a layer alone, on the inputs that it gets in the layer."""
    recorder = RecordingDispatcher()
    layer.dispatcher = recorder
    work_of(layer)()
    layer.dispatcher = LocalTokenDispatcher()
    applied = recorder.applied
    work: dict[str, Work] = {
        "the layer": work_of(layer),
        "router": _all(_route(child, setting) for child in layer.children()),
        "plan": _all(
            partial(LocalTokenDispatcher().plan, *planned) for planned in recorder.planned
        ),
        "dispatch, experts, combine": _all(_round_trip(a, routed_experts) for a in applied),
        "  grouped: all three": _all(_round_trip(a, grouped_experts) for a in applied),
        "  grouped: dispatch": _all(map(_dispatch, applied)),
        "  grouped: experts": _all(map(_multiply, applied)),
        "  grouped: combine": _all(map(_combine, applied)),
    }
    rows = compare(work, setting.device, repetitions=setting.repetitions, memory=False)
    title = f"{title} part by part; ratio: share of the layer"
    return Table(title, rows, setting.tokens, [*_kernels(recorder), recorder.fullest()])


def _all(parts: Iterable[Work | None]) -> Work:
    """Return work that does all parts, one after the other."""
    present = [part for part in parts if part is not None]

    def once() -> None:
        for part in present:
            part()

    return once


def _route(router: nn.Module, setting: Setting) -> Work | None:
    """Return both passes of a router, with gradients of its weights and probabilities."""
    if not isinstance(router, Router):
        return None
    x = setting.vectors().requires_grad_()

    def forward() -> Tensor:
        routing = router(x)
        return routing.topk_weights.sum() + routing.statistics.probability.sum()

    return gradients(forward, [x, *router.parameters()])


def _round_trip(recorded: Recorded, kernel: Kernel) -> Work:
    experts, x, row_map = recorded
    return gradients(lambda: kernel(experts, x, row_map), recorded.sources())


def _dispatch(recorded: Recorded) -> Work:
    return gradients(lambda: gather(recorded.x, recorded.row_map), [recorded.x])


def _multiply(recorded: Recorded) -> Work:
    experts, x, row_map = recorded
    rows = gather(x, row_map).detach().requires_grad_()
    return gradients(lambda: multiply(experts, rows, row_map), [rows, *experts.tensors()])


def _combine(recorded: Recorded) -> Work:
    experts, x, row_map = recorded
    rows = multiply(experts, gather(x, row_map), row_map).detach().requires_grad_()
    weight = [] if row_map.weight is None else [row_map.weight]
    return gradients(lambda: add_up(rows, row_map), [rows, *weight])


def _kernels(recorder: RecordingDispatcher) -> list[str]:
    """Return which kernels were chosen, and why."""
    chosen = {kernel_for(applied.experts, applied.x).because for applied in recorder.applied}
    return [f"kernel: {because}" for because in sorted(chosen)]
