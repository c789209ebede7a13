"""Section `step`: forward, loss, backward and optimizer step of whole models in one process.

Uses plain torch, because DeepSpeed would add the same to every model.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from moa_dist.bench.dense import equal_parameters, equal_work
from moa_dist.bench.measure import Row, Table, Work, compare
from moa_dist.bench.setting import Setting, balance
from moa_dist.config.model import ModelConfig
from moa_dist.models.counts import Counts, count
from moa_dist.models.language_model import LanguageModel, build_model
from moa_dist.models.objective import objective
from moa_dist.peak_flops import peak_flops
from moa_dist.train.optimizer import make_optimizer, parameter_groups
from moa_dist.units import short


def step(setting: Setting) -> list[Table]:
    """Compare the configuration's model with dense ones."""
    model, length = setting.config.model, setting.config.data.sequence_length
    configs = {
        "dense, equal parameters": equal_parameters(model, length),
        "dense, equal work": equal_work(model, length),
        "the model": model,
    }
    work = {name: training_step(setting, config) for name, config in configs.items()}
    work["the model, even loads"] = training_step(setting, model, even=True)
    rows = compare(work, setting.device, repetitions=setting.repetitions)
    counts = {name: count(config, length) for name, config in configs.items()}
    rows = [replace(row, note=_note(row, counts.get(row.name), setting)) for row in rows]
    return [Table("step, including the optimizer", rows, setting.tokens)]


def _note(row: Row, counts: Counts | None, setting: Setting) -> str:
    """Describe sizes, and the share of peak FLOPs if the device's peak is known."""
    if counts is None:
        return ""
    macs = counts.training.total_macs / counts.sequence_length
    note = f"{short(counts.total)} parameters, {short(macs)} MACs/token"
    rate = counts.flops_per_token * setting.tokens / median(row.seconds)
    peak = peak_flops(setting.device_name, setting.config.train.precision)
    share = f", {rate / peak:.1%} MFU" if peak else ""
    return f"{note}, {short(rate)} FLOP/s{share}"


def training_step(setting: Setting, config: ModelConfig, *, even: bool = False) -> Work:
    """Return one training step on random tokens; `even` balances the routers."""
    recompute = setting.config.train.recompute
    model: LanguageModel = build_model(config, recompute=recompute)
    model.to(setting.device, setting.dtype).train()
    if even:
        balance(model)
    settings = setting.config.optimizer
    optimizer = make_optimizer(
        settings, parameter_groups(model, settings), fused=setting.device.type == "cuda"
    )
    batch = setting.batch()

    def once() -> None:
        optimizer.zero_grad()
        objective(model, batch).loss(batch.num_targets()).backward()
        optimizer.step()

    return once
