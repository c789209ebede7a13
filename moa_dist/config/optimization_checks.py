"""Checks of the optimizer and the learning rate schedule."""

from __future__ import annotations

from collections.abc import Iterator

from moa_dist.config.run import Config
from moa_dist.errors import Problem


def warmup(config: Config) -> Iterator[Problem]:
    """The peak must be reached."""
    warmup, steps = config.schedule.warmup_steps, config.train.steps
    if warmup > steps:
        yield Problem(
            f"`schedule.warmup_steps` is {warmup}, more than `train.steps` = {steps}, so the peak "
            "would never be reached; warm up for fewer steps or train longer",
            ("schedule.warmup_steps", "train.steps"),
        )
    if config.schedule.kind == "inverse_sqrt" and warmup == 0:
        yield Problem(
            "`schedule.kind` inverse_sqrt decays relative to the end of the warm-up, but "
            "`schedule.warmup_steps` is 0; use at least 1",
            ("schedule.kind", "schedule.warmup_steps"),
        )


def decay(config: Config) -> Iterator[Problem]:
    """The decay of WSD must fit into the run."""
    schedule, steps = config.schedule, config.train.steps
    if schedule.kind != "wsd":
        if schedule.decay_steps:
            yield Problem(
                f"`schedule.decay_steps` has no effect with `schedule.kind` {schedule.kind}; "
                "remove it, or set `schedule.kind` to wsd",
                ("schedule.decay_steps", "schedule.kind"),
                {"schedule.kind": ("wsd",)},
            )
    elif schedule.decay_steps == 0:
        yield Problem(
            "`schedule.kind` wsd needs `schedule.decay_steps`, the number of steps of its decay",
            ("schedule.decay_steps", "schedule.kind"),
        )
    elif schedule.warmup_steps + schedule.decay_steps > steps:
        yield Problem(
            f"`schedule.warmup_steps` = {schedule.warmup_steps} and `schedule.decay_steps` = "
            f"{schedule.decay_steps} are more than `train.steps` = {steps}; shorten them, or train "
            "longer",
            ("schedule.warmup_steps", "schedule.decay_steps", "train.steps"),
        )


def phases(config: Config) -> Iterator[Problem]:
    """Phases belong to their kind of schedule, and must fit into the run."""
    schedule, steps = config.schedule, config.train.steps
    if schedule.kind != "phases":
        if schedule.phases:
            yield Problem(
                f"`schedule.phases` have no effect with `schedule.kind` {schedule.kind}; remove "
                "them, or set `schedule.kind` to phases",
                ("schedule.phases", "schedule.kind"),
                {"schedule.kind": ("phases",)},
            )
        return
    if not schedule.phases:
        text = "`schedule.kind` phases needs `schedule.phases`, such as [{steps: 100, to: 1}]"
        yield Problem(text, ("schedule.phases", "schedule.kind"))
    if schedule.warmup_steps:
        yield Problem(
            "`schedule.warmup_steps` has no effect with `schedule.kind` phases; make it the first "
            f"of them, {{steps: {schedule.warmup_steps}, to: 1}}",
            ("schedule.warmup_steps", "schedule.kind"),
        )
    lengths = [phase.steps for phase in schedule.phases]
    if lengths.count(None) > 1:
        text = "several `schedule.phases` have no `steps`; only one can have what the others leave"
        yield Problem(text, ("schedule.phases",))
    given = sum(length or 0 for length in lengths)
    if given > steps:
        yield Problem(
            f"`schedule.phases` have {given} steps, more than `train.steps` = {steps}; shorten "
            "them, or train longer",
            ("schedule.phases", "train.steps"),
        )


def fractions_of_the_peak(config: Config) -> Iterator[Problem]:
    """Rates are relative to the peak."""
    for name in ("final", "warmup_start"):
        fraction = getattr(config.schedule, name)
        if fraction > 1:
            yield Problem(
                f"`schedule.{name}` is {fraction:g}, but it is a fraction of the peak, "
                "`optimizer.lr`; use 0 to 1",
                (f"schedule.{name}",),
            )


def optimizer(config: Config) -> Iterator[Problem]:
    """Hyper-parameters must be in range, and of the chosen optimizer."""
    optimizer = config.optimizer
    if not all(0 <= beta < 1 for beta in optimizer.betas):
        yield Problem(
            f"`optimizer.betas` is {list(optimizer.betas)}; each must be at least 0 and below 1",
            ("optimizer.betas",),
        )
    if optimizer.kind != "sgd" and optimizer.momentum:
        yield Problem(
            f"`optimizer.momentum` is {optimizer.momentum:g}, which {optimizer.kind} does not use; "
            "remove it, or set `optimizer.kind` to sgd",
            ("optimizer.momentum", "optimizer.kind"),
            {"optimizer.kind": ("sgd",)},
        )


def can_offload(config: Config) -> bool:
    """Return whether the optimizer's state could be in host memory, at ZeRO 1 to 3, and is not."""
    return config.optimizer.offload == "none" and config.optimizer.kind != "muon"


def offload(config: Config) -> Iterator[Problem]:
    """DeepSpeed moves what ZeRO partitions; Muon's products need the GPU."""
    if config.optimizer.offload == "none":
        return
    if config.parallel.zero_stage == 0:
        yield Problem(
            "`optimizer.offload` host does not work with `parallel.zero_stage` 0, which keeps no "
            "optimizer state apart from the model; use stage 1, 2 or 3",
            ("optimizer.offload", "parallel.zero_stage"),
            {"optimizer.offload": ("none",), "parallel.zero_stage": (1,)},
        )
    if config.optimizer.kind == "muon":
        yield Problem(
            "`optimizer.offload` host does not work with `optimizer.kind` muon, whose products of "
            "matrices would run on the CPU; use adamw, or leave the state on the GPU",
            ("optimizer.offload", "optimizer.kind"),
            {"optimizer.offload": ("none",), "optimizer.kind": ("adamw",)},
        )
