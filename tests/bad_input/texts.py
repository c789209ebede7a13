"""Text and tokenizers that `moa-dist prepare` cannot use."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

from moa_dist.data.tokenizer import END_OF_DOCUMENT, train_tokenizer
from tests.bad_input.case import BadInput, Make, command, file

TEXT = "Some text, as it may be.\n\n" * 200


def _prepare(name: str, *more: str) -> Any:
    size = ("--vocab-size", "257", "--sequence-length", "8")
    return command("prepare", "--input", name, "--output", "out", *size, *more)


def _text(name: str, content: bytes | str, *says: str, file_name: str = "a.txt") -> BadInput:
    return BadInput(name, file(file_name, content), _prepare(file_name), says)


def _lines(name: str, content: bytes | str, *says: str) -> BadInput:
    return _text(name, content, *says, file_name="a.jsonl")


def _option(name: str, options: tuple[str, ...], *says: str) -> BadInput:
    return BadInput(name, file("a.txt", TEXT), _prepare("a.txt", *options), says)


def _tokenizer(name: str, make: Make, *says: str) -> BadInput:
    def make_both(folder: Path) -> None:
        file("a.txt", TEXT)(folder)
        make(folder)

    return BadInput(name, make_both, _prepare("a.txt", "--tokenizer", "t.json"), says)


def _changed(**model: Any) -> Make:
    """A tokenizer with another model inside."""

    def make(folder: Path) -> None:
        content = json.loads(train_tokenizer(["text"], 257).to_json())
        content["model"] |= model
        if "vocab" in model:
            content["added_tokens"][0]["id"] = model["vocab"].get(END_OF_DOCUMENT, 0)
        (folder / "t.json").write_text(json.dumps(content))

    return make


def _folder_of_other_files(folder: Path) -> None:
    (folder / "in").mkdir()
    (folder / "in" / "a.bin").write_bytes(b"x")


CUT_GZIP = gzip.compress(TEXT.encode())[:-9]
BENT_XZ = lzma.compress(TEXT.encode())[:60] + b"?" * 40
WORDS = {END_OF_DOCUMENT: 0, "text": 1}
NO_UTF8 = "convert the file, or use --errors replace"

TEXTS = [
    _text("empty text", "", "holds no text (1 files", "give --input files that hold text"),
    _text("white space", " \n\t\r\n\n", "holds no text (1 files, 1 empty documents)"),
    _text("only a byte order mark", b"\xef\xbb\xbf", "holds no text"),
    _text("too little text", "abc", "too little text", "smaller --sequence-length"),
    _text("UTF-16 text", TEXT.encode("utf-16"), "a.txt: not UTF-8 at byte", NO_UTF8),
    _text("UTF-16 without a mark", TEXT.encode("utf-16-le"), "at byte 1", "as UTF-16", NO_UTF8),
    _text("UTF-32 text", TEXT.encode("utf-32-be"), "a.txt: not UTF-8 at byte 0", NO_UTF8),
    _text("NUL bytes", "fine\nbad \0\n", "a.txt: not UTF-8 at byte 9", NO_UTF8),
    _text("invalid UTF-8", b"caf\xe9 \xff", "a.txt: not UTF-8 at byte 3", NO_UTF8),
    _text("encodings mixed", "é\n".encode() + "é\n".encode("latin-1"), "at byte 3", NO_UTF8),
    _text("cut gzip", CUT_GZIP, "a.gz: cannot be read", "copy it again", file_name="a.gz"),
    _text("no gzip", TEXT, "a.gz: cannot be read", "copy it again", file_name="a.gz"),
    _text("altered xz", BENT_XZ, "a.xz: cannot be read", "copy it again", file_name="a.xz"),
    _text("no bzip2", TEXT, "a.bz2: cannot be read", "copy it again", file_name="a.bz2"),
    _lines("JSON Lines, other field", '{"txt": "a"}', "line 1", "(the line has: txt)"),
    _lines("JSON Lines, no text", '{"text": 5}', "a.jsonl, line 1", "--json-field"),
    _lines("JSON Lines, no object", '{"text": "a"}\n["b"]', "a.jsonl, line 2", "--json-field"),
    _lines("JSON Lines, cut", '{"text": "a"}\n{"te', "line 2: not JSON", "fix the line"),
    _lines("JSON Lines, deep", '{"text": ' + "[" * 99999, "line 1: not JSON", "fix the line"),
    _lines("JSON Lines, number", '{"n": ' + "9" * 5000 + "}", "line 1: not JSON", "fix the line"),
    _lines("JSON Lines, half a pair", '{"text": "\\ud800"}', "line 1: character 0", "fix the line"),
    BadInput("folder without text", _folder_of_other_files, _prepare("in"), ("in: no text files",)),
    BadInput("no such text", lambda folder: None, _prepare("a"), ("a: no such file", "--input")),
    BadInput("endless name", lambda folder: None, _prepare("a" * 300), ("name too long", "check")),
    BadInput(
        "pipe as text",
        lambda folder: os.mkfifo(folder / "a.txt"),
        _prepare("a.txt"),
        ("a.txt: no such file or folder; check --input",),
    ),
    _option("vocabulary too small", ("--vocab-size", "3"), "--vocab-size 257 or more"),
    _option("vocabulary too large", ("--vocab-size", f"{10**12}"), "use a smaller --vocab-size"),
    _option("share of NaN", ("--valid-share", "nan"), "--valid-share nan: must be"),
    _option("output that is a file", ("--output", "a.txt"), "a.txt: exists and is not a folder"),
    _option("output below a file", ("--output", "a.txt/out"), "cannot be created", "--output"),
    _tokenizer("no tokenizer", lambda folder: None, "t.json: no tokenizer here", "prepare wrote"),
    _tokenizer("garbage tokenizer", file("t.json", b"\xff\0"), "t.json: not a tokenizer"),
    _tokenizer("cut tokenizer", file("t.json", '{"model": {'), "t.json: not a tokenizer"),
    _tokenizer("pipe as tokenizer", lambda f: os.mkfifo(f / "t.json"), "not a regular file"),
    _tokenizer("tokenizer without letters", _changed(vocab=WORDS, merges=[]), "has no token for"),
    _tokenizer(
        "tokenizer of words",
        _changed(type="WordLevel", vocab=WORDS, unk_token="?"),
        "t.json: the tokenizer cannot encode the text",
    ),
    _tokenizer("tokenizer of other ends", _changed(vocab={"a": 0}, merges=[]), "t.json:"),
    _tokenizer(
        "tokenizer of huge ids",
        _changed(vocab={END_OF_DOCUMENT: 0, "a": 2**31}, merges=[]),
        "t.json: token id 2147483648 is beyond",
    ),
]
