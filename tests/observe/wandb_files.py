"""Reads what wandb writes offline: records of protobuf in the log format of LevelDB."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator[Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), HEADER, b""
    assert data.startswith(b":W&B")
    while at + HEADER <= len(data):
        if (left := BLOCK - at % BLOCK) < HEADER:
            at += left
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + HEADER])
        parts += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder: Path) -> dict[str, dict[int, dict[str, float]]]:
    """Values by id of the run, step and name, as a server would have them after `wandb sync`."""
    runs: dict[str, dict[int, dict[str, float]]] = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        points: dict[int, dict[str, float]] = {}
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                points = runs.setdefault(record.run.run_id, {})
                if record.run.HasField("branch_point"):
                    assert record.run.branch_point.run == record.run.run_id
                    for step in [s for s in points if s > record.run.branch_point.value]:
                        del points[step]
            if record.WhichOneof("record_type") == "history":
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                points.setdefault(record.history.step.num, {}).update(
                    {name: value for name, value in values.items() if not name.startswith("_")}
                )
    return runs
