"""Results of `moa-dist plan` for a model and one layout: counts, states, traffic."""

from __future__ import annotations

from typing import Any

from moa_dist.config import Config, find_layout_problems
from moa_dist.config.parts import PARTS
from moa_dist.data.epochs import sources_read
from moa_dist.data.folders import DataFolder
from moa_dist.data.manifest import load_manifest
from moa_dist.data.mixture import Mixture, configured_stages
from moa_dist.data.places import local_path
from moa_dist.errors import DataError
from moa_dist.models.counts import ELEMENT_BYTES, Counts, Work, count_model
from moa_dist.models.language_model import LanguageModel, meta_model
from moa_dist.observe.traffic_names import traffic_name
from moa_dist.plan.exchange_choice import (
    Decision,
    decide_exchange,
    expected_state_traffic,
    expected_states,
    expected_traffic,
    gathered_bytes,
)
from moa_dist.plan.states import States
from moa_dist.plan.terms import total
from moa_dist.units import short


def counts_as_json(config: Config, world_size: int, memory: int | None) -> dict[str, Any]:
    """Return the plan as JSON types; `memory` is bytes per rank, for `expert_exchange` auto."""
    problems = [str(problem) for problem in find_layout_problems(config, world_size)]
    model = meta_model(config.model)
    counts = count_model(model, config.data.sequence_length)
    held = expected_states(config, world_size, model)
    decision = decide_exchange(config, world_size, memory, model)
    plan = _as_json(config, world_size, counts, held, problems)
    return plan | _traffic(config, world_size, decision, model) | {"data": _data(config)}


def _data(config: Config) -> dict[str, dict[str, float]] | None:
    """Return what the run reads of each source; None for pairs and for data that is not here.

    Of a URL, the manifest is here once a run, or `moa-dist config check --data`, has fetched it.
    """
    try:
        paths = {source.label: local_path(config.data, source) for source in config.data.sources}
        folders = [DataFolder(name, path, load_manifest(path)) for name, path in paths.items()]
    except DataError:
        return None
    mixture = Mixture(configured_stages(config.data), config.data.readers)
    samples = config.train.steps * config.train.global_batch
    read = sources_read(folders, mixture, samples)
    return {name: each._asdict() for name, each in read.items()}


def _as_json(
    config: Config, world_size: int, counts: Counts, held: States, problems: list[str]
) -> dict[str, Any]:
    ep, on_device = config.parallel.expert_parallel, held.parts()
    in_host_memory = {"in_host_memory": sum(map(total, held.in_host_memory().values()))}
    return {
        "name": config.name,
        "parameters": {
            "total": counts.total,
            "active": counts.training.active,
            "experts": counts.experts,
            "dense": counts.dense,
            "per_rank": total(held.parameters) // ELEMENT_BYTES[config.train.precision],
        },
        "sequence_length": counts.sequence_length,
        "macs": _macs(counts.training),
        "flops_per_token": counts.flops_per_token,
        "evaluation": {
            "active_parameters": counts.evaluation.active,
            "macs": _macs(counts.evaluation),
        },
        "layout": {
            "world_size": world_size,
            "expert_parallel": ep,
            "expert_data_parallel": world_size // ep,
            "zero_stage": config.parallel.zero_stage,
            "precision": config.train.precision,
            "problems": problems,
        },
        "bytes_per_rank": {
            "parameters": total(held.parameters),
            "gradients": total(held.gradients),
            "optimizer": total(on_device.get("moments", [])),
            "master": total(on_device.get("masters", [])),
            "total": held.total,
            **(in_host_memory if held.offloaded else {}),
        },
    }


def _macs(work: Work) -> dict[str, Any]:
    return {
        "by_part": work.macs,
        "blocks": work.block_macs,
        "head": work.head_macs,
        "total": work.total_macs,
    }


def _traffic(
    config: Config, world_size: int, decision: Decision, model: LanguageModel
) -> dict[str, Any]:
    """Return what a rank sends per step on average, and the memory of gathered weights."""
    traffic = expected_traffic(config, world_size, decision.exchange, model)
    state = expected_state_traffic(config, world_size, model)
    gathered = sum(
        gathered_bytes(config, model, part)
        for part in PARTS
        if part in decision.because and getattr(decision.exchange, part) == "weights"
    )
    return {
        "expert_exchange": decision.because,
        "traffic_per_rank_and_step": {
            traffic_name(key): {
                "messages": volume.messages // world_size,
                "bytes": volume.num_bytes // world_size,
            }
            for key, volume in traffic.items()
        },
        "state_bytes_per_rank_and_step": {
            name: num_bytes // world_size for name, num_bytes in state._asdict().items()
        },
        "gathered_weights_bytes": gathered,
    }


def _traffic_lines(plan: dict[str, Any]) -> list[str]:
    """Format traffic by part of a layer and purpose, summed over layers."""
    sums: dict[str, list[int]] = {}
    for name, volume in plan["traffic_per_rank_and_step"].items():
        layer, _, purpose = name.partition("/")
        key = f"{layer.rpartition('.')[2]} {purpose.removesuffix('.backward')}"
        sums.setdefault(key, [0, 0, 0])
        sums[key][1 if purpose.endswith(".backward") else 0] += volume["bytes"]
        sums[key][2] += volume["messages"]
    lines = [
        f"  {name:<20}{forward / 2**20:>12,.1f}{backward / 2**20:>12,.1f}{messages:>12,}"
        for name, (forward, backward, messages) in sums.items()
    ]
    if lines:
        lines.insert(0, f"  {'experts':<20}{'forward':>12}{'backward':>12}{'messages':>12}")
    for name, num_bytes in plan["state_bytes_per_rank_and_step"].items():
        lines.append(f"  {name:<20}{num_bytes / 2**20:>12,.1f}")
    return lines


def _evaluation_lines(plan: dict[str, Any]) -> list[str]:
    """Say what evaluation computes, if that is not what training does."""
    macs, active = (plan["evaluation"][name] for name in ("macs", "active_parameters"))
    if macs == plan["macs"]:
        return []
    return [
        f"  in evaluation {short(macs['blocks'])} in blocks, {short(macs['total'])} in total, with "
        f"{short(active)} active parameters"
    ]


def counts_as_text(plan: dict[str, Any]) -> str:
    """Format the result of `counts_as_json` for people."""
    parameters, macs, layout = plan["parameters"], plan["macs"], plan["layout"]
    lines = [
        f"{plan['name']} on W {layout['world_size']} = ep {layout['expert_parallel']} x edp "
        f"{layout['expert_data_parallel']}, ZeRO {layout['zero_stage']}, {layout['precision']}",
        "",
        "parameters",
        *(f"  {name.replace('_', ' '):<12}{n:>16,}" for name, n in parameters.items()),
        "",
        "multiply-accumulates in training, forward pass over one sequence of "
        f"{plan['sequence_length']} tokens",
        *(
            f"  {name:<12}{short(n):>16}"
            for name, n in (
                macs["by_part"] | {"blocks": macs["blocks"], "total": macs["total"]}
            ).items()
        ),
        f"  {short(plan['flops_per_token'])} FLOPs per token, forward and backward",
        *_evaluation_lines(plan),
        "",
        "MiB of states on the fullest rank, without activations and buffers",
        *(
            f"  {name.replace('_', ' '):<14}{n / 2**20:>14,.1f}"
            for name, n in plan["bytes_per_rank"].items()
        ),
    ]
    if plan["gathered_weights_bytes"]:
        held = plan["gathered_weights_bytes"] / 2**20
        lines.append(f"  plus {held:,.1f} for gathered experts, until the backward pass ends")
    lines += ["", "MiB that a rank sends to others per step, if routing is balanced"]
    lines += _traffic_lines(plan)
    lines += [f"  {part}: {why}" for part, why in plan["expert_exchange"].items()]
    if plan["data"]:
        lines += ["", "samples that the whole run reads of each source, and epochs of it"]
        lines += [
            f"  {name:<12}{read['samples']:>16,}  {read['share']:6.1%}  {read['epochs']:.2f} epochs"
            for name, read in plan["data"].items()
        ]
    if layout["problems"]:
        lines += ["", "fix these to start on these ranks:"]
        lines += [f"  - {problem}" for problem in layout["problems"]]
    return "\n".join(lines)
