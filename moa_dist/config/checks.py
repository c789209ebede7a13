"""Checks of fields that do not work together, whatever the number of ranks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

from moa_dist.config import sharing_checks
from moa_dist.config.changes import unknown_permissions
from moa_dist.config.layout_checks import fitting_micro_batches
from moa_dist.config.mixture_checks import held_out_folders, training_sources, urls
from moa_dist.config.objective_checks import causal_attention, translation, unequal_batches
from moa_dist.config.optimization_checks import (
    decay,
    fractions_of_the_peak,
    offload,
    optimizer,
    phases,
    warmup,
)
from moa_dist.config.parts import PARTS, Part, PartConfig
from moa_dist.config.position_checks import rotations, window
from moa_dist.config.recursion_checks import looking_ahead, recursion
from moa_dist.config.routers import RouterConfig
from moa_dist.config.run import Config
from moa_dist.config.section import InvalidFieldError
from moa_dist.config.suggest import divisors, multiples_near, nearest, one_of
from moa_dist.config.task_checks import tasks_of_data
from moa_dist.errors import Problem

_LONGEST_NAME = 255
"""Bytes of a file's name on Linux."""
_MOST_LAYERS = 10_000
"""Layers with weights of their own."""
_MOST_TRACED = 10
"""Steps in a trace; a longer one is too large to view."""
_MOST_ELEMENTS = 1 << 44
"""Elements of one weight; the largest models in the world have fewer in all their weights."""


def check_fields(config: Config) -> list[Problem]:
    """Return the impossible combinations that are visible without the number of ranks.

    A check that reads an invalid field, which `validate` has reported already, is skipped.
    """
    problems: list[Problem] = []
    for check in CHECKS:
        with suppress(InvalidFieldError):
            problems += list(check(config))
    return problems


def _name(config: Config) -> Iterator[Problem]:
    if not config.name or config.name in (".", "..") or set(config.name) & set("/\\\0"):
        yield Problem(
            f'`name` is "{config.name}", but it is also the name of the run\'s folder in `output`; '
            "use a plain name without slashes",
            ("name",),
        )
    length = len(os.fsencode(config.name))
    if length > _LONGEST_NAME:
        yield Problem(
            f"`name` has {length} bytes, but it is also the name of the run's folder, for which "
            f"file systems allow {_LONGEST_NAME}",
            ("name",),
        )


def _parts(config: Config) -> Iterator[Problem]:
    for name, part in config.model.parts().items():
        yield from part.problems(f"model.{name}")
        for field, router in part.routers.items():
            yield from router.problems(f"model.{name}.{field}")


def _size(config: Config) -> Iterator[Problem]:
    """A typo in a size would overflow while the model is counted or built."""
    model = config.model
    for name, part in model.parts().items():
        sizes = [value for value in dict(part).values() if type(value) is int]
        experts = [router.num_experts for router in part.routers.values()]
        if math.prod([*sizes, *experts, model.d_model]) > _MOST_ELEMENTS:
            yield Problem(
                f"`model.{name}` has weights of more than 2^{_MOST_ELEMENTS.bit_length() - 1} "
                "elements; make its sizes or `model.d_model` smaller",
                (f"model.{name}", "model.d_model"),
            )
    all_distinct = model.num_distinct_layers is None or model.sharing.is_partial
    layers = "num_layers" if all_distinct else "num_distinct_layers"
    if getattr(model, layers) > _MOST_LAYERS:
        yield Problem(
            f"`model.{layers}` is {getattr(model, layers)}; use at most {_MOST_LAYERS}",
            (f"model.{layers}",),
        )
    if model.vocab_size * model.d_model > _MOST_ELEMENTS:
        yield Problem(
            f"`model.vocab_size` = {model.vocab_size} times `model.d_model` = {model.d_model} is "
            f"more than 2^{_MOST_ELEMENTS.bit_length() - 1}; make one smaller",
            ("model.vocab_size", "model.d_model"),
        )


def _batches(config: Config) -> Iterator[Problem]:
    total, micro = config.train.global_batch, config.train.micro_batch
    if total % micro:
        batches = multiples_near(total, micro)
        fitting = nearest(micro, fitting_micro_batches(config, total))
        yield Problem(
            f"`train.global_batch` is {total}, which is not a multiple of `train.micro_batch` = "
            f"{micro}; use a global batch of {one_of(batches)}"
            + (f", or a micro-batch of {one_of(fitting)}" if fitting else ""),
            ("train.global_batch", "train.micro_batch"),
            {"train.global_batch": batches, "train.micro_batch": fitting},
        )


def _skipping(config: Config) -> Iterator[Problem]:
    if config.data.on_damage == "skip" and config.data.verify != "checksums":
        yield Problem(
            f"`data.on_damage` skip cannot find altered shards with `data.verify` = "
            f"{config.data.verify}; set it to checksums",
            ("data.on_damage", "data.verify"),
            {"data.verify": ("checksums",)},
        )


def _trace(config: Config) -> Iterator[Problem]:
    if config.profile.steps is None:
        return
    first, last = config.profile.steps
    if not first <= last < first + _MOST_TRACED or last > config.train.steps:
        yield Problem(
            f"`profile.steps` is [{first}, {last}]; give the first and the last of at most "
            f"{_MOST_TRACED} steps, up to `train.steps` = {config.train.steps}",
            ("profile.steps", "train.steps"),
        )


def _init(config: Config) -> Iterator[Problem]:
    init = config.init
    if init.weights is not None and init.branch is not None:
        yield Problem(
            "`init.weights` starts a run at step 0 and `init.branch` continues one; give one",
            ("init.weights", "init.branch"),
        )
    for field in ("new", "unused"):
        if getattr(init, field) and init.weights is None:
            yield Problem(
                f"`init.{field}` has no effect without `init.weights`",
                (f"init.{field}", "init.weights"),
            )


def _tasks(config: Config) -> Iterator[Problem]:
    if not config.evaluation.tasks:
        return
    if config.data.valid is None:
        yield Problem(
            "`evaluation.tasks` are scored with every validation, but `data.valid` is null",
            ("evaluation.tasks", "data.valid"),
        )
    if config.model.objective != "causal":
        yield Problem(
            f"`evaluation.tasks` score continuations, which `model.objective` "
            f"{config.model.objective} does not predict",
            ("evaluation.tasks", "model.objective"),
        )


def _samples(config: Config) -> Iterator[Problem]:
    if config.evaluation.samples.prompts and config.model.objective != "causal":
        yield Problem(
            f"`evaluation.samples.prompts` are continued, which a model of `model.objective` "
            f"{config.model.objective} cannot do",
            ("evaluation.samples.prompts", "model.objective"),
        )


def _precision(config: Config) -> Iterator[Problem]:
    if config.train.precision == "bf16" and config.parallel.zero_stage == 0:
        yield Problem(
            "`train.precision` bf16 does not work with `parallel.zero_stage` 0, where DeepSpeed "
            "leaves the experts out of the gradient norm; use stage 1",
            ("train.precision", "parallel.zero_stage"),
            {"parallel.zero_stage": (1,)},
        )
    if config.train.precision == "fp64" and config.parallel.zero_stage > 0:
        yield Problem(
            f"`train.precision` fp64 does not work with `parallel.zero_stage` "
            f"{config.parallel.zero_stage}, where DeepSpeed keeps weights in fp32; use stage 0",
            ("train.precision", "parallel.zero_stage"),
            {"parallel.zero_stage": (0,)},
        )


def _compile(config: Config) -> Iterator[Problem]:
    if not config.train.compile:
        return
    off = {"train.compile": (False,)}
    if config.train.recompute:
        yield Problem(
            "`train.compile` does not work with `train.recompute`; set one of them to false",
            ("train.compile", "train.recompute"),
            {**off, "train.recompute": (False,)},
        )
    if config.data.document_attention:
        yield Problem(
            "`train.compile` does not work with `data.document_attention`, as every batch has "
            "documents of other lengths; set one of them to false",
            ("train.compile", "data.document_attention"),
            {**off, "data.document_attention": (False,)},
        )
    if config.parallel.zero_stage == 3:
        yield Problem(
            "`train.compile` does not work with `parallel.zero_stage` 3, which gathers parameters "
            "inside of blocks; use stage 2",
            ("train.compile", "parallel.zero_stage"),
            {**off, "parallel.zero_stage": (2,)},
        )
    for part in config.model.routed_parts():
        exchanged = getattr(config.parallel.expert_exchange, part)
        # What auto chooses is checked once it is decided.
        if exchanged == "tokens" and config.parallel.expert_parallel > 1:
            key = f"parallel.expert_exchange.{part}"
            yield Problem(
                f"`train.compile` does not work with `{key}` tokens, of which every step sends "
                "another number; use weights, or `parallel.expert_parallel` 1",
                ("train.compile", key),
                {**off, key: ("weights",), "parallel.expert_parallel": (1,)},
            )


def _kept_checkpoints(config: Config) -> Iterator[Problem]:
    every, keep = config.checkpoint.every, config.checkpoint.keep_every
    if keep is not None and keep % every:
        fitting = multiples_near(keep, every)
        yield Problem(
            f"`checkpoint.keep_every` is {keep}, not a multiple of `checkpoint.every` = {every}, "
            f"so most checkpoints to keep would never be written; use {one_of(fitting)}",
            ("checkpoint.keep_every", "checkpoint.every"),
            {"checkpoint.keep_every": fitting},
        )


def _enough_experts(config: Config) -> Iterator[Problem]:
    ep = config.parallel.expert_parallel
    if ep == 1:
        return
    parts = config.model.routed_parts()
    if not parts:
        yield Problem(
            f"`parallel.expert_parallel` is {ep}, but the model has no experts: `model.attention` "
            "and `model.ffn` are both dense; set it to 1",
            ("parallel.expert_parallel",),
            {"parallel.expert_parallel": (1,)},
        )
    for name, part in parts.items():
        count = part.num_flat_experts
        if ep > count:
            yield Problem(
                f"`parallel.expert_parallel` is {ep}, but each layer's `model.{name}` has {count} "
                f"experts, so some ranks would hold none; use at most {count}",
                (
                    "parallel.expert_parallel",
                    *(f"model.{name}.{router}.num_experts" for router in part.routers),
                ),
                {"parallel.expert_parallel": (count,)},
            )


def _top_k(config: Config, router: RouterConfig, path: str) -> Iterator[Problem]:
    if router.top_k > router.num_experts:
        yield Problem(
            f"`{path}.top_k` is {router.top_k}, more than `{path}.num_experts` = "
            f"{router.num_experts}; use at most {router.num_experts}",
            (f"{path}.top_k", f"{path}.num_experts"),
            {f"{path}.top_k": (router.num_experts,)},
        )
    if router.expert_dropout and router.top_k == router.num_experts:
        yield Problem(
            f"`{path}.expert_dropout` is {router.expert_dropout:g}, but `{path}.top_k` selects all "
            f"{router.num_experts} experts, dropped ones included; use a smaller top_k or no "
            "dropout",
            (f"{path}.expert_dropout", f"{path}.top_k", f"{path}.num_experts"),
        )


def _gate(config: Config, router: RouterConfig, path: str) -> Iterator[Problem]:
    if router.gate == "renormalized" and router.top_k == 1 < router.num_experts:
        yield Problem(
            f"`{path}.gate` renormalized with `{path}.top_k` 1 makes every weight 1, so the "
            "task loss would never train the router; use raw or renormalized_detached",
            (f"{path}.gate", f"{path}.top_k"),
            {f"{path}.gate": ("raw", "renormalized_detached")},
        )


def _group_limit(config: Config, router: RouterConfig, path: str) -> Iterator[Problem]:
    if router.group_limit is not None:
        yield from router.group_limit.problems(path, router.num_experts, router.top_k)


def _sequence_groups(config: Config, router: RouterConfig, path: str) -> Iterator[Problem]:
    group, micro = router.group_sequences, config.train.micro_batch
    if micro % group:
        yield Problem(
            f"`{path}.group_sequences` is {group}, which does not divide `train.micro_batch` = "
            f"{micro}; use {one_of(divisors(micro))}",
            (f"{path}.group_sequences", "train.micro_batch"),
            {f"{path}.group_sequences": divisors(micro)},
        )


RouterCheck = Callable[[Config, RouterConfig, str], Iterable[Problem]]


def _for_routers(part: Part, check: RouterCheck) -> Callable[[Config], Iterator[Problem]]:
    def run(config: Config) -> Iterator[Problem]:
        section: PartConfig = getattr(config.model, part)
        for name, router in section.routers.items():
            yield from check(config, router, f"model.{part}.{name}")

    return run


CHECKS: tuple[Callable[[Config], Iterable[Problem]], ...] = (
    _name,
    sharing_checks.repeats,
    sharing_checks.sharing,
    sharing_checks.halting,
    recursion,
    looking_ahead,
    rotations,
    window,
    *(
        _for_routers(part, check)
        for part in PARTS
        for check in (_top_k, _gate, _group_limit, _sequence_groups, unequal_batches)
    ),
    _parts,
    _size,
    _batches,
    _skipping,
    training_sources,
    held_out_folders,
    urls,
    translation,
    causal_attention,
    tasks_of_data,
    _trace,
    warmup,
    decay,
    phases,
    fractions_of_the_peak,
    optimizer,
    offload,
    _init,
    _tasks,
    _samples,
    _precision,
    _compile,
    _kept_checkpoints,
    unknown_permissions,
    _enough_experts,
)
"""Each is independent of the others, so an invalid field skips only the checks that read it."""
