"""`moa-dist prepare`: turns text into token shards; `moa_dist.data.prepare` does the work."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moa_dist.cli.progress import ProgressLine
from moa_dist.data.prepare import DEFAULT_SAMPLES_PER_SHARD, Prepared, prepare
from moa_dist.data.prepare_pairs import PairFiles, prepare_pairs
from moa_dist.data.prepare_parts import join_parts, prepare_part
from moa_dist.data.text_options import TextCounts, TextOptions
from moa_dist.errors import DataError

_OF_TEXT = ("valid_share", "max_bytes", "documents", "format", "json_field", "bad_lines", "part")
"""Options that make no sense for pairs."""
_OF_PARTS = (
    *_OF_TEXT, "sequence_length", "vocab_size", "tokenizer", "end_of_document",
    "samples_per_shard", "seed", "errors",
)  # fmt: skip
"""Options that parts were made with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    _add_text_arguments(parser)
    parser.add_argument(
        "--output", required=True, type=Path, metavar="DIR", help="folder to create"
    )
    parser.add_argument(
        "--sequence-length", type=int, default=1024, metavar="L", help="tokens per sequence (1024)"
    )
    parser.add_argument(
        "--valid-share",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="hold out this share of documents, or the end of the longest if that would not fill "
        "a sequence: writes DIR/train and DIR/valid (0: all in DIR)",
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8000, help="size of the tokenizer to train (8000)"
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="use this tokenizer.json instead of training one",
    )
    parser.add_argument(
        "--end-of-document",
        metavar="TOKEN",
        help="token of --tokenizer that ends documents (<|endoftext|>, or else the eos_token that "
        "the tokenizer_config.json next to it names)",
    )
    parser.add_argument(
        "--samples-per-shard",
        type=int,
        default=DEFAULT_SAMPLES_PER_SHARD,
        metavar="N",
        help=f"samples per shard, at most ({DEFAULT_SAMPLES_PER_SHARD})",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random choices (0)")
    parser.add_argument(
        "--part",
        type=_part,
        metavar="I/N",
        help="with --tokenizer: tokenize only part I of N of the input, into DIR.parts, on any "
        "machine; then --join",
    )
    parser.add_argument("--force", action="store_true", help="replace existing data in DIR")


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what to read, and how to split it into documents."""
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument(
        "--input",
        nargs="+",
        metavar="PATH",
        help="files, folders of them, URLs (s3, gs, hf, https), or - for stdin; 'a-{00..99}.tar' "
        "stands for a range. Plain text, JSON Lines, other JSON, CSV and TSV, and tar archives of "
        "these such as webdataset shards, also compressed with gzip, bzip2, xz or zstd, parquet, "
        "Arrow and data sets that Hugging Face's library saved are recognized by content and name; "
        "zstd, parquet and Arrow need the extra moa-dist[formats]. What else a folder or archive "
        "holds is left out and named in the summary, as are hidden files",
    )
    texts.add_argument(
        "--pairs",
        nargs=2,
        type=Path,
        action="append",
        metavar=("SOURCE", "TARGET"),
        help="for translation, instead of --input: files (also .gz, .bz2, .xz) whose lines are "
        "translations of each other; may be repeated. Pairs with an empty text, or one of more "
        "than --sequence-length tokens, are skipped. Prepare validation files separately, with "
        "--tokenizer",
    )
    texts.add_argument(
        "--join",
        type=Path,
        metavar="PARTS",
        help="instead of --input: join the parts in this folder, DIR.parts, made by --part; gives "
        "the same as preparing the whole text at once",
    )
    parser.add_argument(
        "--documents",
        choices=["file", "blank-line", "line"],
        default="file",
        help="how plain text splits into documents: by file, at blank lines, or by line (file)",
    )
    parser.add_argument(
        "--format",
        choices=["auto", "text", "json", "csv"],
        default="auto",
        help="how to read every file (auto: each as what it is)",
    )
    parser.add_argument(
        "--json-field",
        metavar="NAME",
        help="field of JSON, or column of a table, that holds the text; a.b is field b of "
        "the object in field a (text)",
    )
    parser.add_argument(
        "--bad-lines",
        choices=["stop", "skip"],
        default="stop",
        help="if a line, row or JSON value has no readable text: stop, or skip and count it (stop)",
    )
    parser.add_argument(
        "--errors",
        choices=["strict", "replace"],
        default="strict",
        help="if text is not UTF-8: stop, or replace and count it (strict)",
    )
    parser.add_argument(
        "--max-bytes", type=int, metavar="N", help="use only the first N bytes of text"
    )


def _part(text: str) -> tuple[int, int]:
    """Parse `I/N`."""
    try:
        number, num_parts = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N, such as 3/8") from None
    return number, num_parts


def run(args: argparse.Namespace) -> int:
    """Prepare the data and print a summary; returns the exit status."""
    if args.join:
        return _join(args)
    if args.pairs:
        return _prepare_pairs(args)
    options: dict[str, Any] = {
        "block_length": args.sequence_length,
        "tokenizer": args.tokenizer,
        "end_of_document": args.end_of_document,
        "samples_per_shard": args.samples_per_shard,
        "valid_share": args.valid_share,
        "seed": args.seed,
        "text": TextOptions(
            documents=args.documents,
            json_field=args.json_field,
            errors=args.errors,
            max_bytes=args.max_bytes,
            format=args.format,
            bad_lines=args.bad_lines,
        ),
        "force": args.force,
        "progress": ProgressLine(),
    }
    if args.part:
        made = prepare_part(args.input, args.output, *args.part, **options)
        _print_discarded(made.discarded)
        _print_counts(made.part.counts)
        print(
            f"{made.folder}: part {made.part.number} of {made.part.num_parts}; when all are here, "
            f"moa-dist prepare --join {made.folder.parent} --output {args.output}"
        )
        return 0
    made_all = prepare(args.input, args.output, vocab_size=args.vocab_size, **options)
    _print_discarded(made_all.discarded)
    _print_summary(made_all)
    return 0


def _join(args: argparse.Namespace) -> int:
    _refuse(args, _OF_PARTS, "--join")
    _print_summary(join_parts(args.join, args.output, force=args.force, progress=ProgressLine()))
    print(f"{args.join} is no longer needed")
    return 0


def _prepare_pairs(args: argparse.Namespace) -> int:
    _refuse(args, _OF_TEXT, "--pairs")
    made = prepare_pairs(
        [PairFiles(*pair) for pair in args.pairs],
        args.output,
        block_length=args.sequence_length,
        vocab_size=args.vocab_size,
        tokenizer=args.tokenizer,
        end_of_document=args.end_of_document,
        pairs_per_shard=args.samples_per_shard,
        seed=args.seed,
        force=args.force,
        progress=ProgressLine(),
    )
    print(
        f"{args.output}: {made.pairs:,} pairs of {made.source_tokens:,} and "
        f"{made.target_tokens:,} tokens (vocabulary {made.vocab_size:,}) in {len(made.shards):,} "
        f"shards; skipped {made.skipped:,} with an empty text or one of more than "
        f"{made.block_length:,} tokens"
    )
    return 0


def _refuse(args: argparse.Namespace, names: Iterable[str], with_option: str) -> None:
    """Raise DataError if one of the options was given that another one excludes."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for name in names:
        if getattr(args, name) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise DataError(f"{option} cannot be combined with {with_option}", key=option)


def _print_discarded(differences: list[str]) -> None:
    if differences:
        print(
            "started anew: the unfinished work of an earlier run differed in "
            f"{', '.join(differences)}"
        )


def _print_counts(counts: TextCounts) -> None:
    print(
        f"text: {counts.documents:,} documents, {counts.text_bytes:,} bytes; skipped "
        f"{counts.empty:,} empty documents; replaced text in {counts.replaced:,} lines"
    )
    if counts.bad_lines:
        print(f"skipped {counts.bad_lines:,} bad lines, the first: {counts.first_bad_line}")
    if counts.left_out.counts:
        print(f"left out: {counts.left_out}")


def _print_summary(prepared: Prepared) -> None:
    _print_counts(prepared.counts)
    if prepared.held_out:
        print(f"held out: {prepared.held_out}")
    for folder, manifest in prepared.manifests.items():
        print(
            f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens "
            f"({manifest.bytes_per_token:.2f} bytes per token, vocabulary "
            f"{manifest.vocab_size:,}), {len(manifest.shards):,} shards of "
            f"{manifest.samples_per_shard:,} samples of {manifest.block_length:,} tokens; "
            f"dropped {manifest.dropped_tokens:,} tokens at the end"
        )
