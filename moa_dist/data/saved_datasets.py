"""Finds the files of data sets that Hugging Face's `datasets` saved to disk (`save_to_disk`).

    DIR/state.json                    names the files that hold the rows
    DIR/dataset_info.json             describes them
    DIR/data-00000-of-00002.arrow ...

A folder of several splits has `dataset_dict.json` and a folder like this per split.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moa_dist.data.left_out import LeftOut
from moa_dist.errors import DataError

_STATE, _INFO = "state.json", "dataset_info.json"
SPLITS_FILE = "dataset_dict.json"
"""Names the splits of a data set that has several; its folder holds a folder of each."""
DESCRIPTIONS = frozenset({_STATE, _INFO, SPLITS_FILE})
"""Files that describe a data set and hold none of its rows."""


def is_saved_dataset(names: Collection[str]) -> bool:
    """Return whether a folder with these files is a saved data set, or a split of one."""
    return _STATE in names and _INFO in names


def dataset_files(folder: Path, left_out: LeftOut) -> list[Path]:
    """Return the files that hold the rows of a saved data set, in their order.

    Raises:
        DataError: the description is damaged, names a file that is missing, or says that rows
            were selected or shuffled in a way that the files do not show.
    """
    state = _read(folder / _STATE)
    try:
        names = [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise _damaged(folder / _STATE, f"no list of files in {error}") from error
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: rows of this data set were selected or shuffled without being written in "
            "that order; call flatten_indices() and save it again",
            path=folder,
        )
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or any(Path(name).name != name for name in names):
        raise _damaged(folder / _STATE, f"it names {', '.join(missing or names)}, missing here")
    for path in sorted(folder.iterdir()):
        if path.name not in names:
            what = "descriptions of data sets" if path.name in DESCRIPTIONS else "not of a data set"
            left_out.add(what, path)
    return [folder / name for name in names]


def require_one_split(folder: Path, names: Collection[str]) -> None:
    """Raise DataError if a folder with these files is a data set of several splits.

    Mixing its test split into the training data would be easy to overlook.
    """
    if SPLITS_FILE not in names:
        return
    splits = _read(folder / SPLITS_FILE).get("splits")
    if not isinstance(splits, list) or not splits:
        raise _damaged(folder / SPLITS_FILE, "no list of splits")
    if len(splits) > 1:
        raise DataError(
            f"{folder}: a data set with the splits {', '.join(map(str, splits))}; name the folder "
            f"of one, such as {folder / str(splits[0])}",
            path=folder,
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise _damaged(file, str(error)) from error
    if not isinstance(content, dict):
        raise _damaged(file, "no object")
    return content


def _damaged(file: Path, reason: str) -> DataError:
    return DataError(f"{file}: damaged ({reason}); copy the data set again", path=file)
