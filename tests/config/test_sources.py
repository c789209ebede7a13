"""Several sources of data: what a configuration may say of them."""

from __future__ import annotations

import pytest

from moa_dist.config import load_config, to_yaml
from moa_dist.config.data import SourceConfig

BOOKS = "{path: data/books/train, weight: 0.7}"
DEBIAN = "{path: data/debian/train, weight: 0.3}"


@pytest.mark.parametrize(
    ("field", "entries", "keys"),
    [
        ("train", "[]", ("data.train",)),
        ("train", "[{path: a, weight: 0}, {path: b, weight: 1}]", ("data.train.0.weight",)),
        ("train", f"[{BOOKS}, {{path: a, weight: -1}}]", ("data.train.1.weight",)),
        ("train", f"[{BOOKS}, {{path: a}}]", ("data.train.1.weight",)),
        ("train", f"[{BOOKS}, {{path: a, weight: 1, seed: 3}}]", ("data.train.1.seed",)),
        ("train", f"[{BOOKS}, data/debian]", ("data.train",)),
        ("train", f"[{BOOKS}, {{path: x/books, weight: 1}}]", ("data.train.0", "data.train.1")),
        ("train", f"[{BOOKS}, {{path: a, weight: 1, name: a/b}}]", ("data.train.1.name",)),
        (
            "train",
            "[{path: a, weight: 1, later_weights: [[10, 0]]}, {path: b, weight: 1, "
            "later_weights: [[10, 0], [20, 1]]}]",
            ("data.train.0", "data.train.1"),
        ),
        (
            "train",
            "[{path: a, weight: 1, later_weights: [[20, 1], [10, 2]]}]",
            ("data.train.0.later_weights",),
        ),
        (
            "train",
            "[{path: a, weight: 1, later_weights: [[-5, 1]]}]",
            ("data.train.0.later_weights",),
        ),
        ("valid", "[]", ("data.valid",)),
        ("valid", "[{path: a/valid}, {path: b/a}]", ("data.valid.0", "data.valid.1")),
        ("valid", "[{path: a/valid, weight: 1}]", ("data.valid.0.weight",)),
    ],
)
def test_one_mistake_is_one_problem(base, problems, field, entries, keys):
    override = f"data.{field}={entries}"
    (found,) = problems(base, override)
    assert found.keys[: len(keys)] == keys
    assert f"override `{override}`" in {source.name for source in found.sources}


def test_all_weights_zero_is_a_problem_per_source(base, problems):
    found = problems(base, "data.train=[{path: a, weight: 0}, {path: b, weight: 0}]")
    assert [problem.keys[0] for problem in found] == ["data.train.0.weight", "data.train.1.weight"]


def test_a_problem_names_the_line_of_its_source(write, base, problems):
    text = f"extends: base.yaml\ndata:\n  train:\n    - {BOOKS}\n    - path: a\n      weight: 0\n"
    (found,) = problems(write(text))
    assert [source.line for source in found.sources] == [6, 5]


def test_translation_has_one_folder(base, problems):
    override = f"data.train=[{BOOKS}, {DEBIAN}]"
    keys = {problem.keys for problem in problems(base, override, "model.objective=translation")}
    assert ("data.train", "model.objective") in keys


def test_sources_survive_yaml_and_a_source_may_begin_or_end_later(base, write):
    late = "{path: w, weight: 0, name: web, later_weights: [[100, 1], [200, 0]]}"
    config = load_config(
        base, [f"data.train=[{BOOKS}, {late}]", "data.valid=[{path: data/books/valid}]"]
    )
    assert load_config(write(to_yaml(config))) == config
    assert [source.label for source in config.data.sources] == ["books", "web"]
    assert [config.data.sources[1].weight_at(n) for n in (0, 99, 100, 199, 200)] == [0, 0, 1, 1, 0]
    assert [folder.label for folder in config.data.held_out] == ["books"]
    one = load_config(base).data
    assert one.sources == (SourceConfig(path="data/train", name="train", weight=1),)
    assert one.held_out == ()


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("data/books/train", "books"),
        ("/data/books/", "books"),
        ("train", "train"),
        ("s3://bucket/my books/valid", "my-books"),
        (".", "data"),
    ],
)
def test_a_folder_is_named_after_its_text(path, label):
    assert SourceConfig(path=path, weight=1).label == label


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/books",
        "file:///etc",
        "s3://",
        "s3://bucket/../other",
        "https://someone:s3cret@host/books",
        "s3://key:s3cret@bucket/books",
        "https://host/books?X-Amz-Signature=s3cret",
        "https://host/books#s3cret",
        "s3://bucket/books::file:///etc",
    ],
)
def test_a_url_without_credentials_is_needed_and_a_secret_is_not_repeated(base, problems, url):
    (found,) = problems(base, f"data.train=[{{path: '{url}', weight: 1}}]")
    assert found.keys == ("data.train.0.path",)
    assert "s3cret" not in found.text
    (found,) = problems(base, f"data.valid='{url}'")
    assert found.keys == ("data.valid",)


@pytest.mark.parametrize(
    "url", ["s3://bucket/books", "gs://b/x/", "https://host:8000/a", "hf://datasets/a/b@main/x"]
)
def test_urls(base, url):
    assert load_config(base, [f"data.train={url}"]).data.train == url
