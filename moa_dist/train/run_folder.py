"""What a run's folder keeps next to its checkpoints, because they depend on it."""

from __future__ import annotations

from pathlib import Path

from moa_dist.config import to_yaml
from moa_dist.config.run import Config
from moa_dist.data.manifest import MANIFEST_FILE
from moa_dist.data.tokenizer import TOKENIZER_FILE

KEPT_FILES = (TOKENIZER_FILE, MANIFEST_FILE)
"""Copied from the training data into the run's folder: a resumed run must meet the same."""


def describe_run(config: Config, folder: Path) -> None:
    """Write the configuration and copy `KEPT_FILES`. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {file: (Path(config.data.train) / file).read_bytes() for file in KEPT_FILES}
    for file, content in ({"config.yaml": to_yaml(config).encode()} | contents).items():
        path, new = folder / file, folder / f".{file}.new"
        if not path.exists() or path.read_bytes() != content:
            new.write_bytes(content)
            new.replace(path)  # cut short, it would be another run's
