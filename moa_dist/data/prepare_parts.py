"""Tokenizes text in parts, on any number of machines, and joins them.

Part i of n reads the i-th of n equal ranges of the input (see `division`), and can run anywhere.
The join gives what one process would have given, byte for byte: what is held out and the order of
the documents depend on the documents alone, not on who has tokenized them.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from moa_dist.data.assembly import Progress, TokenizedPart, plan_hold_out, write_output
from moa_dist.data.corpus import Corpus
from moa_dist.data.division import divide
from moa_dist.data.input_files import find_files
from moa_dist.data.left_out import LeftOut
from moa_dist.data.manifest import file_sha256, sha256_of
from moa_dist.data.output_folder import check_output, put_in_place
from moa_dist.data.prepare import Prepared, empty_folder, given_tokenizer, prepared
from moa_dist.data.prepare_settings import Settings, describe_inputs
from moa_dist.data.spans import Span
from moa_dist.data.text import check_any_text
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.data.token_store import RECORDS_FILE, TOKENS_FILE, write_durably
from moa_dist.data.tokenizer import TOKENIZER_FILE, load_tokenizer
from moa_dist.data.work_folder import (
    TOKENIZED_FOLDER,
    continued,
    hidden_folder,
    parts_folder,
    work_folder,
)
from moa_dist.errors import DataError

PART_FILE = "part.json"


class Part(BaseModel):
    """Describes a finished part: `part.json`."""

    number: int
    """Which part it is, from 1."""
    num_parts: int
    """Number of parts."""
    settings: Settings
    """Options and inputs."""
    spans: tuple[Span, ...]
    """What it has read."""
    counts: TextCounts
    """Counts of that."""
    left_out: LeftOut
    """Files that no part reads."""
    sha256: dict[str, str]
    """Checksums of its files."""


@dataclass(frozen=True)
class PreparedPart:
    """Describes what `prepare_part` wrote."""

    folder: Path
    """The folder to join with others."""
    part: Part
    """What it holds."""
    discarded: list[str]
    """How the unfinished work of an earlier run, which was deleted, differs from this one."""


def prepare_part(
    inputs: Sequence[str],
    output: Path,
    number: int,
    num_parts: int,
    *,
    block_length: int,
    tokenizer: Path | None,
    end_of_document: str | None = None,
    samples_per_shard: int,
    valid_share: float = 0.0,
    seed: int = 0,
    text: TextOptions | None = None,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> PreparedPart:
    """Tokenize part `number` of `num_parts`, counted from 1, into `OUTPUT.parts/NUMBER-of-PARTS`.

    All parts have the same inputs and options; see `prepare`. A finished part stays as it is, and
    an interrupted one is continued.

    Raises:
        DataError: the text cannot be read, an option is out of range, no tokenizer is given, or a
            finished part had other inputs or options and must not be replaced.
    """
    options = text or TextOptions()
    if not 1 <= number <= num_parts:
        raise DataError(
            f"--part {number}/{num_parts}: the first number must be from 1 to the second",
            key="--part",
        )
    given = given_tokenizer(tokenizer, end_of_document)
    streams = [name for name in inputs if name == "-"]
    for unfit, why in (
        (given is None, "needs --tokenizer, because each machine sees only its part of the text"),
        (options.max_bytes is not None, "cannot be combined with --max-bytes"),
        (bool(streams), "needs files, which stdin is not"),
    ):
        if unfit:
            raise DataError(f"--part {why}", key="--part")
    assert given is not None
    settings = Settings(
        block_length=block_length,
        samples_per_shard=samples_per_shard,
        valid_share=valid_share,
        seed=seed,
        text=options,
        tokenizer=sha256_of(given.to_json().encode()),
        vocab_size=None,
        tokenizer_sample_bytes=None,
    )
    settings.check()
    target = parts_folder(output) / f"{number}-of-{num_parts}"
    with work_folder(target, target, keep=True) as work:
        left_out = LeftOut()
        files = find_files(inputs, None, work / "stdin", left_out)
        settings = settings.model_copy(update={"inputs": describe_inputs(files, work / "stdin")})
        finished = _finished(target, settings, force)
        if finished:
            return PreparedPart(target, finished, [])
        folder, discarded = continued(work, settings)
        spans = divide(files, options, number, num_parts)
        counts = Corpus(spans, settings, folder, progress).tokenize(given)
        write_durably(folder / TOKENIZER_FILE, given.to_json())
        part = Part(
            number=number,
            num_parts=num_parts,
            settings=settings,
            spans=spans,
            counts=counts,
            left_out=left_out,
            sha256={name: file_sha256(folder / name) for name in (TOKENS_FILE, RECORDS_FILE)},
        )
        write_durably(work / PART_FILE, part.model_dump_json())
    return PreparedPart(target, part, discarded)


def join_parts(
    parts: Path,
    output: Path,
    *,
    force: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Prepared:
    """Make of finished parts what `prepare` would make of the whole text, byte for byte.

    Args:
        parts: folder that holds the folders of all parts.
        output: folder to create.
        force: replace an output that an earlier run wrote.
        progress: called while working.

    Raises:
        DataError: a part is missing, unfinished or damaged, parts do not belong together, or the
            output exists.
    """
    check_output(output, force)
    described = _load_parts(parts)
    folders = [folder / TOKENIZED_FOLDER for folder in described]
    first, *_ = described.values()
    tokenizer = load_tokenizer(folders[0])
    tokenized = [
        TokenizedPart(folder, part.spans)
        for folder, part in zip(folders, described.values(), strict=True)
    ]
    counts = _summed(list(described.values()))
    check_any_text(len(first.settings.inputs), counts)
    _check_sums(described, progress)
    with work_folder(hidden_folder(output), output) as work:
        hold_out = plan_hold_out(tokenized, first.settings)
        shards, shuffle = (empty_folder(work / name) for name in ("shards", "shuffle"))
        manifests = write_output(
            tokenized, hold_out, tokenizer, first.settings, shards, shuffle, progress
        )
        put_in_place(shards, output)
        shutil.rmtree(work)
    return prepared(output, manifests, counts, hold_out, [])


def _finished(folder: Path, settings: Settings, force: bool) -> Part | None:
    """Return the finished part of a folder; None if it has to be made."""
    part = _load(folder) if (folder / PART_FILE).exists() else None
    if part is None:
        return None
    differences = part.settings.differences(settings)
    if not differences:
        return part
    if not force:
        raise DataError(
            f"{folder}: already holds this part, with other inputs or options "
            f"({', '.join(differences)}); use --force to replace it, or choose another --output",
            path=folder,
            key="--force",
        )
    (folder / PART_FILE).unlink()
    return None


def _load(folder: Path) -> Part:
    try:
        return Part.model_validate_json((folder / PART_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(
            f"{folder / PART_FILE}: cannot be read ({error}); run this part again with --force, "
            "or copy it again",
            path=folder / PART_FILE,
        ) from error


def _load_parts(parts: Path) -> dict[Path, Part]:
    """Load the descriptions of all parts, in order, and check that they belong together."""
    try:
        folders = sorted(entry for entry in parts.iterdir() if entry.is_dir())
    except OSError as error:
        raise DataError(
            f"{parts}: no parts here ({error.strerror}); name the folder that moa-dist prepare "
            "--part has made, OUTPUT.parts",
            path=parts,
            key="--join",
        ) from error
    unfinished = [folder.name for folder in folders if not (folder / PART_FILE).exists()]
    loaded = {folder: _load(folder) for folder in folders if folder.name not in unfinished}
    by_number = {part.number: (folder, part) for folder, part in loaded.items()}
    num_parts = max((part.num_parts for part in loaded.values()), default=0)
    missing = [str(n) for n in range(1, num_parts + 1) if n not in by_number]
    if unfinished or missing or not loaded:
        problems = [f"missing: {', '.join(missing)} of {num_parts}"] if missing else []
        problems += [f"unfinished: {', '.join(unfinished)}"] if unfinished else []
        raise DataError(
            f"{parts}: not all parts are here ({'; '.join(problems) or 'there are none'}); run "
            "those moa-dist prepare --part commands again, or copy what they have made",
            path=parts,
            key="--join",
        )
    _check_agreement(parts, loaded)
    return dict(by_number[number] for number in sorted(by_number))


def _check_agreement(parts: Path, loaded: dict[Path, Part]) -> None:
    """Raise DataError if parts of different texts, options or divisions are together."""
    (first_folder, first), *others = loaded.items()
    for folder, part in others:
        differences = first.settings.anywhere().differences(part.settings.anywhere())
        if part.num_parts != first.num_parts:
            differences.append("the number of parts")
        if differences:
            raise DataError(
                f"{parts}: {first_folder.name} and {folder.name} differ in "
                f"{', '.join(differences)}; run moa-dist prepare --part with the same inputs and "
                "options for all parts, in an empty folder",
                path=folder,
                key="--join",
            )


def _check_sums(described: dict[Path, Part], progress: Progress) -> None:
    for number, (folder, part) in enumerate(described.items()):
        progress("checking the parts", number, len(described))
        for name, expected in part.sha256.items():
            file = folder / TOKENIZED_FOLDER / name
            if not file.is_file() or file_sha256(file) != expected:
                raise DataError(
                    f"{file}: missing, altered or damaged (its checksum is wrong); copy the part "
                    "again or run it again with --force",
                    path=file,
                    key="sha256",
                )
    progress("checking the parts", len(described), len(described))


def _summed(parts: Sequence[Part]) -> TextCounts:
    """Return the counts of the whole text."""
    total = TextCounts(files_opened=len(parts[0].settings.inputs))
    total.left_out.update(parts[0].left_out)
    for part in parts:
        counts = part.counts
        total.documents += counts.documents
        total.text_bytes += counts.text_bytes
        total.empty += counts.empty
        total.replaced += counts.replaced
        total.bad_lines += counts.bad_lines
        total.first_bad_line = total.first_bad_line or counts.first_bad_line
        total.left_out.update(counts.left_out)
        total.input_bytes += counts.input_bytes
    return total
