"""Measurements: ratios per round, and the peak of bytes held."""

import torch

from moa_dist.bench.measure import Table, as_json, as_text, compare, peak_bytes

CPU = torch.device("cpu")


def test_work_takes_turns_and_ratios_are_taken_within_a_round():
    calls = []
    work = {name: lambda name=name: calls.append(name) for name in "ab"}
    rows = compare(work, CPU, repetitions=3, memory=False)
    assert calls[-6:] == ["a", "b"] * 3
    for row in rows:
        assert row.ratios == tuple(
            ours / theirs for ours, theirs in zip(row.seconds, rows[0].seconds, strict=True)
        )
    table = Table("title", rows, tokens=4)
    assert as_json(table)["rows"][1]["seconds"] == rows[1].seconds
    assert "title" in as_text(table)


def test_peak_counts_what_is_held_at_once():
    def in_turn():
        for _ in range(3):
            torch.ones(1000, 1000)

    def together():
        return [torch.ones(1000, 1000) for _ in range(3)]

    assert 4e6 <= peak_bytes(in_turn, CPU) < 5e6
    assert 12e6 <= peak_bytes(together, CPU) < 13e6
