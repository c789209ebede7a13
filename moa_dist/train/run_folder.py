"""What a run's folder keeps next to its checkpoints, because they depend on it."""

from __future__ import annotations

from pathlib import Path

from moa_dist.config import to_yaml
from moa_dist.config.run import Config
from moa_dist.data.manifest import MANIFEST_FILE
from moa_dist.data.places import local_path
from moa_dist.data.tokenizer import TOKENIZER_FILE


def describe_run(config: Config, folder: Path) -> None:
    """Write the configuration, and copy what a resumed run must find again. Raises OSError.

    That is the tokenizer and, of every source, the manifest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    first = local_path(config.data, config.data.sources[0])
    contents = {TOKENIZER_FILE: (first / TOKENIZER_FILE).read_bytes()}
    for source in config.data.sources:
        kept = Path(MANIFEST_FILE)
        if not isinstance(config.data.train, str):
            kept = kept.with_stem(f"{kept.stem}-{source.label}")
        contents[kept.name] = (local_path(config.data, source) / MANIFEST_FILE).read_bytes()
    for file, content in ({"config.yaml": to_yaml(config).encode()} | contents).items():
        path, new = folder / file, folder / f".{file}.new"
        if not path.exists() or path.read_bytes() != content:
            new.write_bytes(content)
            new.replace(path)  # cut short, it would be another run's
