"""Every shipped YAML is right, and the families differ in what they should differ in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moa_dist.config import find_layout_problems, load_config
from moa_dist.config.schema import describe, walk
from moa_dist.config.section import Section
from moa_dist.models.counts import count
from moa_dist.models.language_model import LanguageModel

CONFIGS = Path(__file__).parents[2] / "configs"
SHIPPED = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "recipes")
FAMILIES = ("moa", "dense")
NAMES = [str(p.relative_to(CONFIGS).with_suffix("")) for p in SHIPPED]


@pytest.mark.parametrize("path", SHIPPED, ids=NAMES)
def test_shipped_config_has_no_problems(path):
    config = load_config(path)  # raises on any
    for folder in (*config.data.sources, *config.data.held_out):
        assert not folder.path.startswith("/"), "no machine paths"
    assert path.read_text().startswith("# "), "the first line says what it is"


def test_names_of_runs_are_distinct():
    names = [load_config(path).name for path in SHIPPED]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("size", ["44m", "126m", "244m", "318m", "727m", "1b"])
def test_dense_baseline_trains_like_its_moeut(size):
    """A comparison is fair only if nothing but the model (and its layout) differs."""
    moeut, dense = (load_config(CONFIGS / kind / f"{size}.yaml") for kind in ("moeut", "dense"))
    for part in ("data", "optimizer", "schedule", "train", "evaluation"):
        assert getattr(moeut, part) == getattr(dense, part), part
    assert moeut.model.vocab_size == dense.model.vocab_size


@pytest.mark.parametrize("path", sorted((CONFIGS / "small").glob("*.yaml")), ids=lambda p: p.stem)
def test_small_configs_train_alike_and_fit_two_ranks(path):
    config, moeut = load_config(path), load_config(CONFIGS / "small" / "moeut.yaml")
    assert find_layout_problems(config, 2) == []
    for part in ("data", "optimizer", "schedule", "train", "evaluation"):
        assert getattr(config, part) == getattr(moeut, part), part


@pytest.mark.parametrize("size", ["", "small_"])
def test_translation_models_differ_in_attention_alone(size):
    moa, dense = (load_config(CONFIGS / f"translation/{size}{kind}.yaml") for kind in FAMILIES)
    parts = dict(moa.model), dict(dense.model)
    assert [part.pop("attention").kind for part in parts] == ["moa", "dense"]
    assert parts[0] == parts[1]
    for part in ("data", "optimizer", "schedule", "train", "evaluation", "checkpoint"):
        assert getattr(moa, part) == getattr(dense, part), part
    if size:  # made for a fair comparison
        assert count(moa.model, 1).total == count(dense.model, 1).total


def test_small_masked_models_differ_in_the_number_of_experts_alone():
    configs = [load_config(CONFIGS / f"masked_lm/small_{e}e.yaml") for e in (8, 16, 32, 64)]
    assert [config.model.attention.router.num_experts for config in configs] == [8, 16, 32, 64]
    alike = [
        load_config(
            CONFIGS / f"masked_lm/small_{e}e.yaml",
            ["name=same", "model.attention.router.num_experts=8"],
        )
        for e in (8, 16, 32, 64)
    ]
    assert all(config == alike[0] for config in alike)


EXAMPLES = {
    "own_text": 1,
    "second_phase": 1,
    "fine_tune": 1,
    "moeut_44m": 8,
    "moa_moe": 2,
    "masked_lm": 1,
    "tied_experts": 2,
    "shared_core": 1,
}
"""Ranks that their headings start."""


@pytest.mark.parametrize("name", sorted(p.stem for p in (CONFIGS / "examples").iterdir()))
def test_an_example_is_short_can_be_built_and_fits_its_ranks(name):
    """A reader copies it: it must work as its heading says."""
    path = CONFIGS / "examples" / f"{name}.yaml"
    config = load_config(path)
    assert find_layout_problems(config, EXAMPLES[name]) == []
    assert len(path.read_text().splitlines()) <= 80
    with torch.device("meta"):
        LanguageModel(config.model)


def test_quickstart_fits_two_ranks():
    assert find_layout_problems(load_config(CONFIGS / "quickstart.yaml"), 2) == []


def test_every_field_has_a_docstring_and_a_description():
    for field in walk():
        assert field.info.description, f"{field.path} has no docstring"
        assert describe(field.info), field.path


def sections_of_the_product(base):
    """Yield all subclasses of `base` but those that other tests define in this process."""
    for section in base.__subclasses__():
        yield from sections_of_the_product(section)
        if section.__module__.startswith("moa_dist."):
            yield section


def test_walk_visits_every_field_of_every_section():
    """A field that `walk` misses would have neither suggestions nor documentation."""
    visited = {(f.path.rpartition(".")[2], f.info.description) for f in walk()}
    sections = list(sections_of_the_product(Section))
    assert len(sections) > 40
    for section in sections:
        for name, info in section.model_fields.items():
            kind_of_union = name == "kind" and info.description.startswith("Names this kind")
            assert kind_of_union or (name, info.description) in visited, f"{section}.{name}"
