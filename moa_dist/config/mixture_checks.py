"""Checks of the folders of data that a run mixes and validates on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

from moa_dist.config.data import FolderConfig, SourceConfig, is_remote, url_problem
from moa_dist.config.run import Config
from moa_dist.errors import Problem

TRAIN, VALID = "data.train", "data.valid"
_NAME = re.compile(r"[A-Za-z0-9._-]+")


def training_sources(config: Config) -> Iterator[Problem]:
    """Check the names and weights of several sources of training data."""
    sources = config.data.train
    if isinstance(sources, str):
        return
    yield from _names(sources, TRAIN)
    if config.model.objective == "translation":
        yield Problem(
            "`data.train` lists sources, which `model.objective` translation cannot mix; name one "
            "folder",
            (TRAIN, "model.objective"),
        )
    ascending = True
    for index, source in enumerate(sources):
        key_path = f"{TRAIN}.{index}"
        samples = [since for since, _ in source.later_weights]
        if samples != sorted(set(samples)):
            ascending = False
            yield Problem(
                f"`{key_path}.later_weights` changes at samples {samples}, which do not ascend",
                (f"{key_path}.later_weights", key_path),
            )
        if not source.weight and not any(weight for _, weight in source.later_weights):
            yield Problem(
                f"`{key_path}.weight` of {source.label} is 0, so nothing is ever read from "
                f"{source.path}; give it a weight above 0, or remove the source",
                (f"{key_path}.weight", key_path),
            )
    if ascending:
        yield from _nothing_left(sources)


def held_out_folders(config: Config) -> Iterator[Problem]:
    """Check the names of several folders of validation data."""
    if isinstance(config.data.valid, tuple):
        yield from _names(config.data.valid, VALID)


def urls(config: Config) -> Iterator[Problem]:
    """Check the URLs of folders, which must not hold credentials."""
    data = config.data
    for field, folders, is_list in (
        (TRAIN, data.sources, not isinstance(data.train, str)),
        (VALID, data.held_out, not isinstance(data.valid, str)),
    ):
        for index, folder in enumerate(folders):
            key_path = f"{field}.{index}.path" if is_list else field
            if is_remote(folder.path) and (problem := url_problem(folder.path)):
                yield Problem(f"`{key_path}` {problem}", (key_path,))


def _names(folders: Sequence[FolderConfig], field: str) -> Iterator[Problem]:
    if not folders:
        yield Problem(f"`{field}` is an empty list; name at least one folder", (field,))
    for index, folder in enumerate(folders):
        if not _NAME.fullmatch(folder.label):
            yield Problem(
                f'`{field}.{index}.name` is "{folder.label}"; use letters, digits, `.`, `_`, `-`',
                (f"{field}.{index}.name",),
            )
    for name, count in Counter(folder.label for folder in folders).items():
        if count > 1:
            same = [index for index, folder in enumerate(folders) if folder.label == name]
            yield Problem(
                f"`{field}` has {count} entries named {name} "
                f"({', '.join(folders[index].path for index in same)}); give each a `name` of its "
                "own",
                tuple(f"{field}.{index}" for index in same),
            )


def _nothing_left(sources: Sequence[SourceConfig]) -> Iterator[Problem]:
    """Check that at every sample some source has a weight."""
    changes = {since for source in sources for since, _ in source.later_weights}
    for sample in sorted({0, *changes}):
        is_all_zero = all(source.weight_at(sample) == 0 for source in sources)
        if is_all_zero and any(source.weight or source.later_weights for source in sources):
            yield Problem(
                f"`data.train`: from sample {sample} on, every weight is 0; give a source a weight "
                "above 0 there",
                tuple(f"{TRAIN}.{index}" for index in range(len(sources))),
            )
