"""Prepared data that was damaged, mixed up, or made to attack its reader."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moa_dist.config.run import DataConfig
from moa_dist.data.check import check_data
from moa_dist.data.manifest import load_manifest, sha256_of
from moa_dist.data.shards import read_shard
from tests.bad_input.case import BadInput, Make, Meet, raised_by
from tests.small_shards import write_folder

BOMB_FILE = "exploded"
SHARD = "shard-000001.tar"
AGAIN = "copy the shard again or run moa-dist prepare again"


@dataclass
class Member:
    """One member of an archive."""

    info: tarfile.TarInfo
    content: bytes


def _start(folder: Path) -> object:
    """What happens before training: only what can be known cheaply."""
    data = DataConfig(train=str(folder / "data"), sequence_length=3)
    return check_data(data, vocab_size=48, world_size=2)


def _read(folder: Path) -> object:
    """What a reader does when it comes to the shard, with the training's folder around it."""
    data = folder / "data"
    return read_shard(data, load_manifest(data), 1)


START, READ = raised_by(_start), raised_by(_read)


def _data(name: str, meet: Meet, damage: Callable[[Path], object], *says: str) -> BadInput:
    def make(folder: Path) -> None:
        write_folder(folder / "data", num_shards=4, samples_per_shard=12)
        damage(folder / "data")

    return BadInput(name, make, meet, says)


def _manifest(name: str, *says: str, **fields: Any) -> BadInput:
    def change(data: Path) -> None:
        file = data / "manifest.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return _data(name, START, change, "manifest.json: ", "prepare again", *says)


def _manifest_text(name: str, text: str | bytes, *says: str) -> BadInput:
    content = text if isinstance(text, bytes) else text.encode()
    write = _writer("manifest.json", content)
    return _data(name, START, write, "manifest.json: cannot be read", "prepare again", *says)


def _entry(file: str = "a.tar", **fields: Any) -> list[dict[str, Any]]:
    return [{"file": file, "sha256": "0" * 64, "bytes": 48} | fields]


def _shard(name: str, damage: Callable[[Path], object], *says: str, meet: Meet = START) -> BadInput:
    return _data(name, meet, lambda data: damage(data / SHARD), f"{SHARD}: ", AGAIN, *says)


def _members(name: str, change: Callable[[list[Member]], object], *says: str) -> BadInput:
    """The shard with other members, and a manifest whose checksum agrees: a forgery."""

    def forge(file: Path) -> None:
        with tarfile.open(file) as tar:
            members = [Member(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
        change(members)
        with tarfile.open(file, "w") as tar:
            for member in members:
                member.info.size = len(member.content) if member.info.isreg() else 0
                tar.addfile(member.info, io.BytesIO(member.content))
        _accept(file)

    return _shard(name, forge, *says, meet=READ)


def _forged(name: str, content: Callable[[bytes], bytes], *says: str) -> BadInput:
    def forge(file: Path) -> None:
        file.write_bytes(content(file.read_bytes()))
        _accept(file)

    return _shard(name, forge, *says, meet=READ)


def _accept(file: Path) -> None:
    """Let the manifest agree with the file."""
    manifest = json.loads((file.parent / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["shards"][1] |= {"sha256": sha256_of(content), "bytes": len(content)}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


def _writer(name: str, content: bytes) -> Make:
    return lambda data: (data / name).write_bytes(content)


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[600] ^= 1
    file.write_bytes(content)


def _replaced(name: str, kind: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(data: Path) -> None:
        (data / name).unlink()
        kind(data / name)

    return replace


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (BOMB_FILE,)


def _pickle_named(suffix: str) -> Callable[[list[Member]], None]:
    def put(members: list[Member]) -> None:
        members[0] = Member(tarfile.TarInfo(f"000000012.{suffix}"), pickle.dumps(Bomb()))

    return put


def _renamed(name: str) -> Callable[[list[Member]], None]:
    def rename(members: list[Member]) -> None:
        members[0].info.name = name

    return rename


def _turned_into(kind: bytes, target: str) -> Callable[[list[Member]], None]:
    def turn(members: list[Member]) -> None:
        members[0].info.type, members[0].info.linkname = kind, target

    return turn


def _other_token(members: list[Member]) -> None:
    members[2].content = np.full(4, 60000, "<u2").tobytes()


def _shorter(members: list[Member]) -> None:
    members[2].content = b"123"


def _swap(members: list[Member]) -> None:
    members[3], members[4] = members[4], members[3]


INVALID = "manifest.json: invalid"
WRONG_PLACE = "where 000000012.tokens should be"

SHARDS = [
    _manifest_text("empty manifest", ""),
    _manifest_text("manifest cut short", '{"format_version": 1, "shar'),
    _manifest_text("manifest in UTF-16", '{"format_version": 1}'.encode("utf-16-be") + b"\xff"),
    _manifest_text("manifest nested too deeply", "[" * 99999),
    _manifest("manifest of another version", "format version 2", format_version=2),
    _manifest("manifest with a surprise", INVALID, "surprise", surprise=1),
    _manifest("manifest without shards", INVALID, shards=[]),
    _manifest("manifest with text as number", INVALID, "tokens", tokens="5"),
    _manifest("manifest with too many samples", INVALID, samples_per_shard=10**18),
    _manifest("manifest with a huge number", INVALID, text_bytes=10**400),
    _manifest("manifest with one shard twice", INVALID, shards=_entry() * 2),
    _manifest("shard above the folder", INVALID, "shards.0.file", shards=_entry("../a.tar")),
    _manifest("shard at a whole path", INVALID, "shards.0.file", shards=_entry("/etc/a.tar")),
    _manifest("shard from a command", INVALID, "shards.0.file", shards=_entry("pipe:cat a.tar")),
    _manifest("shard from the network", INVALID, "shards.0.file", shards=_entry("http://a/b.tar")),
    _data("no manifest", START, lambda d: (d / "manifest.json").unlink(), "missing", "prepare"),
    _data("pipe as manifest", START, _replaced("manifest.json", os.mkfifo), "not a regular file"),
    BadInput("no data", lambda folder: None, START, ("data: no such folder", "moa-dist prepare")),
    _data("no tokenizer there", START, lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    _data("other tokenizer", START, _writer("tokenizer.json", b"{ }"), "not the tokenizer that"),
    _shard("missing shard", lambda file: file.unlink(), "missing"),
    _shard("truncated shard", lambda file: os.truncate(file, 700), "700 bytes instead of"),
    _shard("empty shard", lambda file: os.truncate(file, 0), "0 bytes instead of"),
    _shard("grown shard", lambda file: os.truncate(file, 10**6), "1000000 bytes instead of"),
    _data("pipe as shard", START, _replaced(SHARD, os.mkfifo), f"{SHARD}: missing"),
    _data("folder as shard", START, _replaced(SHARD, os.mkdir), f"{SHARD}: missing"),
    _data("device as shard", START, _replaced(SHARD, lambda f: os.symlink("/dev/zero", f)), SHARD),
    _shard("altered shard", _flip, "its checksum is wrong", meet=READ),
    _forged("no archive", lambda content: b"?" * len(content), "not a tar archive"),
    _forged("compressed archive", lambda content: content[:512] + b"\x1f\x8b" * 4000, SHARD),
    _forged("archive cut at a sample", lambda content: content[:3072], "3 samples instead of 12"),
    _members("token outside the vocabulary", _other_token, "token id 60000 is outside"),
    _members("sample of another length", _shorter, "000000014.tokens", "3 bytes instead of 8"),
    _members("sample missing", lambda members: members.pop(), "11 samples instead of 12"),
    _members("sample too many", lambda m: m.append(m[0]), "where the end should be"),
    _members("samples swapped", _swap, "where 000000015.tokens should be"),
    _members("pickle named .pyd", _pickle_named("pyd"), WRONG_PLACE),
    _members("pickle named .pkl", _pickle_named("pkl"), WRONG_PLACE),
    _members("pickle named .pickle", _pickle_named("pickle"), WRONG_PLACE),
    _members("pickle named .pth", _pickle_named("pth"), WRONG_PLACE),
    _members(
        "pickle named as tokens", _pickle_named("tokens"), "000000012.tokens", "bytes instead of 8"
    ),
    _members("member above the folder", _renamed("../../exploded"), WRONG_PLACE),
    _members("member at a whole path", _renamed("/exploded"), WRONG_PLACE),
    _members("symbolic link", _turned_into(tarfile.SYMTYPE, "/etc/passwd"), WRONG_PLACE),
    _members("hard link", _turned_into(tarfile.LNKTYPE, "/etc/passwd"), WRONG_PLACE),
    _members("pipe in the archive", _turned_into(tarfile.FIFOTYPE, ""), WRONG_PLACE),
    _members("device in the archive", _turned_into(tarfile.CHRTYPE, ""), WRONG_PLACE),
]
