"""Judging ranks beside each other: who differs, who is slow, who computes wrongly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from moa_dist.doctor.finding import Finding

SLOW = 1.5
"""Times the median rank's time from which a rank is called slow."""
_MOST_APART_S = 1.0


@dataclass(frozen=True)
class RankReport:
    """What a rank says of itself."""

    host: str
    """Name of its machine."""
    facts: Mapping[str, str]
    """What must be the same everywhere, such as `torch` -> `2.11.0`."""
    findings: Sequence[Finding]
    """Of its own checks."""


Naming = Callable[[Sequence[int], Sequence[str]], str]
"""Words for some of the reporters, given by number, and the host of each of all."""


def name_hosts(numbers: Sequence[int], hosts: Sequence[str]) -> str:
    """Such as `host a and host b`, where every host reports once; `hosts` is by number."""
    return " and ".join(f"host {hosts[number]}" for number in numbers)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Such as `rank 3 (host a) and ranks 8-15 (host b)`; `hosts` is by rank."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return " and ".join(
        f"{'ranks' if len(own) > 1 else 'rank'} {_runs(own)} (host {host})"
        for host, own in by_host.items()
    )


def _runs(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `0-2, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def others_findings(reports: Sequence[RankReport]) -> Iterator[Finding]:
    """What rank 0 has not said of itself: faults and notes of the others, each once."""
    for finding, ranks in said_by(reports):
        if ranks[0] != 0:
            yield finding


def said_by(
    reports: Sequence[RankReport], name: Naming = name_ranks
) -> Iterator[tuple[Finding, list[int]]]:
    """Faults and notes, each once, with who says so, in the text and by number."""
    hosts = [report.host for report in reports]
    sayers: dict[Finding, list[int]] = {}
    for number, report in enumerate(reports):
        for finding in dict.fromkeys(report.findings):
            sayers.setdefault(finding, []).append(number)
    for finding, numbers in sayers.items():
        if finding.status != "ok":
            text = f"{name(numbers, hosts)}: {finding.text}"
            yield Finding(finding.check, finding.status, text, finding.remedy), numbers


def alike(reports: Sequence[RankReport], name: Naming = name_ranks) -> Iterator[Finding]:
    """Whether code, packages and drivers are the same; those in the minority are named."""
    hosts = [report.host for report in reports]
    facts = list(dict.fromkeys(fact for report in reports for fact in report.facts))
    same = True
    for fact in facts:
        values = [report.facts.get(fact, "unknown") for report in reports]
        usual, num_usual = Counter(values).most_common(1)[0]  # the first's, if two are as frequent
        for value in dict.fromkeys(values):
            if value == usual:
                continue
            same = False
            who = [number for number, own in enumerate(values) if own == value]
            on = "on the other" if len(values) == 2 else f"on {num_usual} others"
            text = f"{name(who, hosts)}: {fact} {value}, but {usual} {on}"
            remedy = "install the same on all hosts, and start ranks in the same environment"
            yield Finding("alike", "FAULT", text, remedy)
    if same:
        num_hosts = len(set(hosts))
        where = f"{num_hosts} {'host' if num_hosts == 1 else 'hosts'}"
        if name is name_ranks:
            where = f"{len(hosts)} ranks on {where}"
        text = f"{len(facts)} versions of code, packages and drivers: the same for {where}"
        yield Finding("alike", "ok", text)


def clocks(
    offsets: Sequence[float],
    hosts: Sequence[str],
    name: Naming = name_ranks,
    reference: str = "rank 0",
) -> Iterator[Finding]:
    """`offsets`: seconds that each reporter's clock is ahead of that of `reference`."""
    wrong = [rank for rank, offset in enumerate(offsets) if abs(offset) > _MOST_APART_S]
    for host in dict.fromkeys(hosts[rank] for rank in wrong):
        ranks = [rank for rank in wrong if hosts[rank] == host]
        offset = offsets[ranks[0]]
        direction = "ahead of" if offset > 0 else "behind"
        text = f"{name(ranks, hosts)}: {abs(offset):.1f} s {direction} {reference}"
        yield Finding("clocks", "FAULT", text, "let chrony or systemd-timesyncd set that clock")
    if not wrong:
        most = max(map(abs, offsets))
        text = f"at most {most * 1e3:.1f} ms from {reference}'s, as seen here"
        yield Finding("clocks", "ok", text)


def results(name: str, problems: Sequence[str | None], hosts: Sequence[str]) -> Iterator[Finding]:
    """A fault per rank whose result of `name` was wrong; `problems` is by rank."""
    for problem in dict.fromkeys(p for p in problems if p is not None):
        ranks = [rank for rank, own in enumerate(problems) if own == problem]
        text = f"{name_ranks(ranks, hosts)}: {problem}"
        yield Finding(name, "FAULT", text, "take that host out of the job and test its hardware")


def speed(
    name: str, seconds: Sequence[float], hosts: Sequence[str], *, coupled: bool
) -> Iterator[Finding]:
    """How fast `name` was on each rank, and who is slow.

    The reference is the lower median: of two ranks, the faster one.

    Args:
        name: what was timed.
        seconds: by rank.
        hosts: by rank.
        coupled: all ranks wait for the slowest, so that none can be named.
    """
    usual = median_low(seconds)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    text = f"{min(seconds) * 1e3:.2f} to {seconds[slowest] * 1e3:.2f} ms, median {usual * 1e3:.2f}"
    slow = [] if coupled else [r for r, own in enumerate(seconds) if own > SLOW * usual]
    if slow:
        text = (
            f"slow: {name_ranks(slow, hosts)}, up to {seconds[slowest] / usual:.1f} times the "
            f"median ({text})"
        )
        remedy = "see what else runs there, and its clocks, cooling and links"
        yield Finding(name, "FAULT", text, remedy, tuple(seconds))
    else:
        yield Finding(name, "ok", text, seconds=tuple(seconds))
