"""Where a run finds its data: in folders as they lie, in the cache of URLs, or made of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from moa_dist.config.data import DataConfig, FolderConfig, is_remote
from moa_dist.config.prepare import PrepareConfig
from moa_dist.data import direct_text
from moa_dist.data.cache import fetch_manifest, place_of
from moa_dist.data.direct_text import ShouldStop, is_text, never
from moa_dist.data.manifest import MANIFEST_FILE, sha256_of
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moa_dist.errors import DataError


def local_path(data: DataConfig, folder: FolderConfig) -> Path:
    """Return where a run reads a folder: itself, its place in the cache, or the shards of a text.

    Raises DataError if it is text that cannot be found.
    """
    if is_text(folder.path):
        return direct_text.place_of(data, folder, _tokenizer_identity(data, folder))
    return place_of(data.cache, folder) if is_remote(folder.path) else Path(folder.path)


def mirror(data: DataConfig, folder: FolderConfig) -> Path:
    """Return `local_path`, after fetching the manifest and tokenizer of a remote folder.

    Raises DataError.
    """
    if is_remote(folder.path) and not is_text(folder.path):
        fetch_manifest(data.cache, folder)
    return local_path(data, folder)


def is_unprepared(data: DataConfig, folder: FolderConfig) -> bool:
    """Return whether a folder is text whose shards are still to be made. Raises DataError."""
    return is_text(folder.path) and not (local_path(data, folder) / MANIFEST_FILE).is_file()


def prepare_texts(
    data: DataConfig, folders: Sequence[FolderConfig], should_stop: ShouldStop = never
) -> None:
    """Prepare the text among `folders`, unless this was done before.

    Other processes wait for the one that does it.

    Raises:
        DataError: the text cannot be read, or its shards cannot be written.
        StoppedError: `should_stop` has returned True.
    """
    for folder in folders:
        if not is_unprepared(data, folder):
            continue
        given = _given_tokenizer(data, folder)
        tokenizer = None
        if data.prepare.tokenizer is not None:
            tokenizer = Path(data.prepare.tokenizer)
        elif given is not None:
            prepare_texts(data, [given], should_stop)
            tokenizer = mirror(data, given) / TOKENIZER_FILE
        place = local_path(data, folder)  # after the tokenizer is here
        direct_text.prepare_at(place, data, folder, tokenizer, should_stop)


def vocabulary_of_text(data: DataConfig, folder: FolderConfig) -> int | None:
    """Return the size of the vocabulary that a text will have; None if it is another folder's.

    Raises DataError if its tokenizer cannot be loaded.
    """
    if data.prepare.tokenizer is not None:
        return _configured_tokenizer(data.prepare).vocab_size
    return data.prepare.vocab_size if _given_tokenizer(data, folder) is None else None


def describe_tokenizer(data: DataConfig, folder: FolderConfig) -> str:
    """Say which tokenizer a text is, or will be, prepared with."""
    if data.prepare.tokenizer is not None:
        return f"the tokenizer {data.prepare.tokenizer}"
    given = _given_tokenizer(data, folder)
    if given is not None:
        return f"the tokenizer of {given.path}"
    return f"a tokenizer of {data.prepare.vocab_size:,} tokens that is trained on it"


def _given_tokenizer(data: DataConfig, folder: FolderConfig) -> FolderConfig | None:
    """Return the folder whose tokenizer a text shares; None if one is trained on it."""
    first = data.sources[0]
    folders = (*data.sources, *data.held_out)
    prepared = next((each for each in folders if not is_text(each.path)), None)
    return prepared or (None if folder.path == first.path else first)


def _tokenizer_identity(data: DataConfig, folder: FolderConfig) -> str:
    """Return what tells the tokenizer of a text from others."""
    configured = identity_of_configured_tokenizer(data.prepare)
    if configured is not None:
        return configured
    given = _given_tokenizer(data, folder)
    if given is None:
        return f"trained {data.prepare.vocab_size}"
    if is_text(given.path):
        return local_path(data, given).name
    try:
        return sha256_of((local_path(data, given) / TOKENIZER_FILE).read_bytes())
    except OSError as error:
        if is_remote(given.path):
            return "not fetched"
        raise DataError(
            f"{given.path}: no {TOKENIZER_FILE} here ({error.strerror}), so {folder.path} cannot "
            "be prepared with it; name another with data.prepare.tokenizer",
            path=Path(given.path),
            key="data.prepare.tokenizer",
        ) from error


def identity_of_configured_tokenizer(options: PrepareConfig) -> str | None:
    """Return the checksum that manifests of text will have; None if no tokenizer is named."""
    if options.tokenizer is None:
        return None
    return sha256_of(_configured_tokenizer(options).to_json().encode())


@lru_cache(maxsize=4)
def _configured_tokenizer(options: PrepareConfig) -> Tokenizer:
    assert options.tokenizer is not None
    return load_tokenizer(Path(options.tokenizer), options.end_of_document)
