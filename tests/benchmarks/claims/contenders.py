"""What is compared, by question: configurations, changed by overrides."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moa_dist.config import Config, load_config
from tests.config.test_shipped_configs import CONFIGS

RATES = (4e-3, 8e-3, 16e-3, 32e-3)


@dataclass(frozen=True)
class Contender:
    """One model of a comparison and how it is trained."""

    file: str
    """Configuration in configs/, without its suffix."""
    overrides: tuple[str, ...] = ()
    rates: tuple[float, ...] = RATES
    tuning_steps: int | None = 128
    """Steps in which rates are compared; None for the whole budget, where short runs mislead: they
    favor large rates where learning starts late."""
    seeds: int = 1

    @property
    def config_file(self) -> Path:
        return CONFIGS / f"{self.file}.yaml"

    def config(self) -> Config:
        return load_config(self.config_file, list(self.overrides))


def changed(*overrides: str, rates: tuple[float, ...] = RATES[1:]) -> Contender:
    return Contender("comparison/moeut", overrides, rates)


COMPARISON = {
    "moeut": Contender("comparison/moeut", seeds=3),
    "dense": Contender("comparison/dense", seeds=3),
    "switchhead": Contender("comparison/switchhead"),
    "moa": Contender("comparison/moa"),
    "universal": Contender("comparison/universal"),
}
"""MoEUT against others of equal size."""


def of_width(model: str, width: int) -> Contender:
    """Return MoEUT or the dense model of another width, in which all widths are in proportion."""
    ffn = f"d_expert={2 * width // 3}" if model == "moeut" else f"d_ff={16 * width // 3}"
    overrides = (
        f"model.d_model={width}",
        f"model.attention.d_head={width // 3}",
        f"model.ffn.{ffn}",
    )
    return Contender(f"comparison/{model}", overrides, RATES[1:], seeds=3)


WIDTHS = {
    f"{model}-{width}": of_width(model, width)
    for model in ("moeut", "dense")
    for width in (48, 192)
}
"""MoEUT and the dense model, half and twice as wide as in the comparison."""

CHANGES = {
    "moeut-muon": changed("optimizer.kind=muon"),
    "moeut-wsd": changed("schedule.kind=wsd", "schedule.decay_steps=256"),
    "moeut-qk-norm": changed("model.attention.qk_norm=true"),
    "moeut-shared-expert": changed(
        "model.ffn.shared_expert={d_expert: 64}",
        "model.ffn.router.num_experts=22",
        "model.ffn.router.top_k=5",
    ),
    "moeut-repeats-apart": changed("model.sharing={own: [norms], vectors: true}"),
    "moeut-prelude-coda": changed(
        "model.prelude=1",
        "model.coda=1",
        "model.attention.router.num_experts=4",
        "model.ffn.router.num_experts=11",
    ),
    "moeut-more-repeats": changed("model.num_layers=8", "model.ffn.router.top_k=3"),
    "moeut-bias": changed(
        "model.attention.router.balance={bias_rate: 1e-3}",
        "model.ffn.router.balance={bias_rate: 1e-3}",
    ),
    "moeut-documents": changed("data.document_attention=true"),
}
"""MoEUT with one change at a time, at equal parameters and no more MACs."""

MASKED = {
    f"masked-{experts}e{suffix}": Contender(
        f"masked_lm/small_{experts}e",
        tuple(f"model.attention.router.gate={gate}" for gate in [gate] if gate != "raw"),
        rates=RATES[:2],
        tuning_steps=None,
        seeds=3 if experts in (8, 32) else 1,
    )
    for gate, suffix in (("renormalized_detached", ""), ("raw", "-raw"))
    for experts in (8, 16, 32, 64)
}
"""MoA with more and more experts of which a token takes four, with the gate of the paper's text
and with that of its code."""

_TEXTS = {
    "captions": (),
    "manuals": ("data.train=data/manuals/train", "data.valid=data/manuals/valid"),
}
_HEADS = {
    "dense": None,
    "moa": (8, 28),  # experts and their width: as many parameters as the dense model
    "moa-wide": (4, 64),  # the paper's base: all heads are taken and twice as wide as dense ones
    "moa-8e": (8, 48),  # as many MACs as the dense model
    "moa-16e": (16, 48),
}


def translator(texts: str, heads: tuple[int, int] | None) -> Contender:
    router = "model.attention.router"
    overrides = _TEXTS[texts]
    if heads is not None:
        num_experts, d_head = heads
        overrides += (
            f"model.attention.d_head={d_head}",
            f"{router}.num_experts={num_experts}",
            f"{router}.gate=renormalized_detached",
        )
    file = f"translation/small_{'dense' if heads is None else 'moa'}"
    return Contender(file, overrides, rates=(1e-3, 2e-3), tuning_steps=None, seeds=3)


TRANSLATION = {
    f"{texts}-{name}": translator(texts, heads)
    for texts in _TEXTS
    for name, heads in _HEADS.items()
}
"""Translation of image captions and of software manuals, with dense attention and with MoA, of
which a token takes four heads."""

_TWO_TASKS = ", ".join(
    f"{{name: {name}, path: data/comparison/train, weight: 1, task: {task}}}"
    for task, name in enumerate(("first", "second"))
)
_OVERRIDES = {
    # Its tasks are one text, so they tell it nothing.
    "mod_squad": (
        f"data.train=[{_TWO_TASKS}]",
        "data.valid=[{path: data/comparison/valid, task: 0}]",
    )
}
FAMILY = {
    path.stem: Contender(f"family/{path.stem}", _OVERRIDES.get(path.stem, ()), RATES[1:])
    for path in sorted((CONFIGS / "family").glob("*.yaml"))
    if path.stem != "bam_seed"  # BAM starts from random weights, like the others
}
"""Relatives of MoA and MoEUT, as large as the dense model of the comparison."""

QUESTIONS = {
    "comparison": tuple(COMPARISON),
    "widths": ("moeut", "dense", *WIDTHS),
    "changes": ("moeut", *CHANGES),
    "masked": tuple(MASKED),
    **{texts: tuple(name for name in TRANSLATION if name.startswith(texts)) for texts in _TEXTS},
    "family": ("dense", *FAMILY),
}
CONTENDERS = COMPARISON | WIDTHS | CHANGES | MASKED | TRANSLATION | FAMILY
