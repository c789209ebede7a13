"""Section `exchange`: the cost of expert parallelism, in a layer and in a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.distributed as dist
from torch import Tensor, nn

from moa_dist.bench.deepspeed_moe import CAPACITY, deepspeed_moe
from moa_dist.bench.dense import equal_work
from moa_dist.bench.measure import Row, Table, Work, compare
from moa_dist.bench.setting import Setting
from moa_dist.bench.spawned_ranks import together
from moa_dist.config.feed_forward import FFNConfig, MoEFFNConfig
from moa_dist.config.run import ExpertExchangeConfig
from moa_dist.distributed.device import should_overlap
from moa_dist.distributed.mesh import Mesh, make_mesh
from moa_dist.models.kinds import make_attention, make_feed_forward
from moa_dist.models.mask import AttentionMask
from moa_dist.moe.gathering import ExpertGathering
from moa_dist.moe.routed_module import Gathered
from moa_dist.moe.sharding import EXCHANGES, shard_experts
from moa_dist.train.build import build_engine
from moa_dist.train.engine import Engine, StepResult

Forward = Callable[[nn.Module, Tensor], Tensor]
REPLICATED = "experts on every rank"
EXCHANGE_CONFIGS = {
    kind: ExpertExchangeConfig.model_validate({"attention": kind, "ffn": kind})
    for kind in EXCHANGES
}
"""Configuration of each kind of exchange, the same for attention and FFN."""


def exchange(setting: Setting, mesh: Mesh) -> list[Table]:
    """Compare tokens and weights as what ranks exchange; each rank has tokens of its own.

    Returns no table on a single rank, or for a model without experts.
    """
    model = setting.config.model
    if mesh.expert_parallel == 1:
        return []
    dense = equal_work(model, setting.config.data.sequence_length)
    tables = []
    if model.attention.routers:
        make = partial(make_attention, d_model=model.d_model, init_scale=1.0)
        modules: dict[str, nn.Module] = {
            "dense, equal work": make(dense.attention),
            REPLICATED: make(model.attention),
        }
        modules |= {_name(kind): make(model.attention) for kind in EXCHANGE_CONFIGS}
        rows = _compare(setting, mesh, "attention", modules, _attend)
        tables.append(_table("attention, forward and backward", rows, setting))
    if isinstance(model.ffn, MoEFFNConfig):
        tables.append(_feed_forward(setting, mesh, model.ffn, dense.ffn))
    if tables:
        tables.append(_step(setting, mesh))
    return tables


def _name(kind: str) -> str:
    return f"{kind} exchanged"


def _table(title: str, rows: list[Row], setting: Setting) -> Table:
    return Table(f"{title}, expert parallel", rows, setting.tokens, ["tokens and memory of rank 0"])


def _feed_forward(setting: Setting, mesh: Mesh, ffn: MoEFFNConfig, dense: FFNConfig) -> Table:
    make = partial(make_feed_forward, d_model=setting.config.model.d_model, init_scale=1.0)
    modules: dict[str, nn.Module] = {"dense, equal work": make(dense), REPLICATED: make(ffn)}
    modules |= {_name(kind): make(ffn) for kind in EXCHANGE_CONFIGS}
    with deepspeed_moe(ffn, setting.config.model.d_model, mesh.expert_parallel) as theirs:
        peers = {"DeepSpeed MoE": (theirs, setting.peer(theirs))}
        rows = _compare(setting, mesh, "ffn", modules, _transform, peers)
    return _table("ffn, forward and backward", rows, setting)


def _compare(
    setting: Setting,
    mesh: Mesh,
    part: str,
    modules: dict[str, nn.Module],
    forward: Forward,
    peers: dict[str, tuple[nn.Module, Work]] | None = None,
) -> list[Row]:
    """Compare all implementations of `part`, which is attention or ffn."""
    for kind, exchanged in EXCHANGE_CONFIGS.items():
        shard_experts(nn.ModuleDict({part: modules[_name(kind)]}), mesh, exchanged)
    work = {
        name: setting.both_passes(setting.ready(module), partial(forward, module))
        for name, module in modules.items()
    }
    for name, (module, once) in (peers or {}).items():
        modules[name], work[name] = module, once
    return compare(
        {name: together(once) for name, once in work.items()},
        setting.device,
        repetitions=setting.repetitions,
        notes={"DeepSpeed MoE": f"capacity {CAPACITY}"},
        modules=modules,
    )


def _gathered(module: nn.Module) -> Gathered:
    """Gather the experts of other ranks, if the module's weights are exchanged."""
    gathering = ExpertGathering()
    gathering.start(module)
    return gathering.wait(module)


def _attend(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x, x, x, AttentionMask(causal=True), _gathered(module)).y
    return y


def _transform(module: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = module(x, x, None, _gathered(module)).y
    return y


def _step(setting: Setting, mesh: Mesh) -> Table:
    """Compare whole steps: replicated experts are reduced and updated on every rank."""
    overlap = should_overlap(setting.config.parallel.overlap, dist.get_backend())

    def build(mesh: Mesh, exchanged: ExpertExchangeConfig) -> Engine:
        return build_engine(setting.on(mesh), mesh, setting.device, exchanged, overlap=overlap)

    engines = {REPLICATED: build(make_mesh(1), EXCHANGE_CONFIGS["tokens"])}
    engines |= {_name(kind): build(mesh, exchanged) for kind, exchanged in EXCHANGE_CONFIGS.items()}
    work = {name: partial(engine.step, [setting.batch()], 1e-4) for name, engine in engines.items()}
    sent = {name: _sent_bytes(once()) for name, once in work.items()}
    rows = compare(
        {name: together(once) for name, once in work.items()},
        setting.device,
        repetitions=setting.repetitions,
        notes={name: f"{size / 2**20:,.1f} MiB sent" for name, size in sent.items()},
        memory=False,
    )
    for engine in engines.values():
        engine.close()
    return _table(f"step, ZeRO {setting.config.parallel.zero_stage}", rows, setting)


def _sent_bytes(result: StepResult) -> int:
    """Return bytes of rows and weights; gradients of replicated parameters are always reduced."""
    return sum(v.num_bytes for key, v in result.traffic.items() if key.purpose != "reduce")
