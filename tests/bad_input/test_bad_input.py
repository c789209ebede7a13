"""Every kind of bad input ends at once in an error that names it and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from moa_dist.errors import ConfigError
from tests.bad_input.case import BadInput, time_limit
from tests.bad_input.configurations import CONFIGURATIONS
from tests.bad_input.shards import BOMB_FILE, SHARDS
from tests.bad_input.texts import TEXTS

KINDS = [*CONFIGURATIONS, *TEXTS, *SHARDS]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_bad_input_is_one_clear_error(
    kind: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind.make(tmp_path)
    with time_limit():
        met = kind.meet(tmp_path)
    for part in kind.says:
        assert part in str(met)
    if kind.keys is not None:
        assert isinstance(met, ConfigError)
        assert met.problems[0].keys == kind.keys
        assert tuple(map(str, met.problems[0].sources)) == kind.sources
    # What an attack would have left behind, here or outside.
    assert not list(tmp_path.rglob(BOMB_FILE))
    assert not (tmp_path.parent / BOMB_FILE).exists()
    assert not Path("/", BOMB_FILE).exists()


def test_there_are_many_kinds() -> None:
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names) >= 40
