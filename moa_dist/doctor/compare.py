"""Compares ranks or hosts: which of them differ, are slow, or compute wrong results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_low
from typing import Literal

from moa_dist.doctor.finding import Finding

SLOW = 1.5
"""Ratio to the median rank's time from which a rank counts as slow."""
_MAX_CLOCK_OFFSET_S = 1.0

Unit = Literal["rank", "host"]
"""Whether there is one report per rank or one per host."""


@dataclass(frozen=True)
class RankReport:
    """What a rank or a host reports about itself."""

    host: str
    """Name of its machine."""
    facts: Mapping[str, str]
    """Versions that must be the same everywhere, such as `torch` -> `2.11.0`."""
    findings: Sequence[Finding]
    """Results of its own checks."""


def name_hosts(hosts: Sequence[str]) -> str:
    """Format names of hosts, such as `host a and host b`."""
    return " and ".join(f"host {host}" for host in hosts)


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Format ranks, such as `rank 3 (host a) and ranks 8-15 (host b)`; `hosts` is by rank."""
    by_host: dict[str, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts[rank], []).append(rank)
    return " and ".join(
        f"{'ranks' if len(own) > 1 else 'rank'} {_ranges(own)} (host {host})"
        for host, own in by_host.items()
    )


def _ranges(numbers: list[int]) -> str:
    """Format numbers as ranges: [0, 1, 2, 5] -> `0-2, 5`."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and ranges[-1][-1] == number - 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ", ".join("-".join(map(str, ends)) for ends in ranges)


def _located(finding: Finding, numbers: Sequence[int], hosts: Sequence[str], unit: Unit) -> Finding:
    """Put the ranks or hosts concerned, given by number, into a finding and before its text."""
    concerned = tuple(dict.fromkeys(hosts[number] for number in numbers))
    name = name_ranks(numbers, hosts) if unit == "rank" else name_hosts(concerned)
    return replace(
        finding,
        text=f"{name}: {finding.text}",
        ranks=tuple(numbers) if unit == "rank" else (),
        hosts=concerned,
    )


def others_findings(reports: Sequence[RankReport]) -> Iterator[Finding]:
    """Merge the faults and notes that rank 0 has not reported itself."""
    for finding in merge(reports):
        if finding.ranks[0] != 0:
            yield finding


def merge(reports: Sequence[RankReport], unit: Unit = "rank") -> Iterator[Finding]:
    """Merge equal faults and notes of several reports into one that names all of them."""
    hosts = [report.host for report in reports]
    reporters: dict[Finding, list[int]] = {}
    for number, report in enumerate(reports):
        for finding in dict.fromkeys(report.findings):
            reporters.setdefault(finding, []).append(number)
    for finding, numbers in reporters.items():
        if finding.status != "ok":
            yield _located(finding, numbers, hosts, unit)


def versions(reports: Sequence[RankReport], unit: Unit = "rank") -> Iterator[Finding]:
    """Check that code, packages and drivers are the same everywhere; names the minority."""
    hosts = [report.host for report in reports]
    facts = list(dict.fromkeys(fact for report in reports for fact in report.facts))
    same = True
    for fact in facts:
        values = [report.facts.get(fact, "unknown") for report in reports]
        usual, num_usual = Counter(values).most_common(1)[0]  # the first one, in a tie
        for value in dict.fromkeys(values):
            if value == usual:
                continue
            same = False
            numbers = [number for number, own in enumerate(values) if own == value]
            on = "on the other" if len(values) == 2 else f"on {num_usual} others"
            text = f"{fact} {value}, but {usual} {on}"
            remedy = "install the same version on all hosts, and start all ranks in it"
            finding = Finding("versions", "FAULT", text, remedy, subject=fact)
            yield _located(finding, numbers, hosts, unit)
    if same:
        num_hosts = len(set(hosts))
        where = f"{num_hosts} {'host' if num_hosts == 1 else 'hosts'}"
        if unit == "rank":
            where = f"{len(hosts)} ranks on {where}"
        text = f"{len(facts)} versions of code, packages and drivers are the same for {where}"
        yield Finding("versions", "ok", text)


def clocks(
    offsets: Sequence[float],
    hosts: Sequence[str],
    unit: Unit = "rank",
    reference: str = "rank 0",
) -> Iterator[Finding]:
    """Check that clocks agree; `offsets` are seconds ahead of the clock of `reference`."""
    wrong = [number for number, offset in enumerate(offsets) if abs(offset) > _MAX_CLOCK_OFFSET_S]
    for host in dict.fromkeys(hosts[number] for number in wrong):
        numbers = [number for number in wrong if hosts[number] == host]
        offset = offsets[numbers[0]]
        direction = "ahead of" if offset > 0 else "behind"
        text = f"clock {abs(offset):.1f} s {direction} {reference}"
        remedy = "synchronize that clock with chrony or systemd-timesyncd"
        yield _located(Finding("clocks", "FAULT", text, remedy), numbers, hosts, unit)
    if not wrong:
        most = max(map(abs, offsets))
        text = f"at most {most * 1e3:.1f} ms from the clock of {reference}, as measured here"
        yield Finding("clocks", "ok", text)


def results(name: str, problems: Sequence[str | None], hosts: Sequence[str]) -> Iterator[Finding]:
    """Report the ranks whose result of `name` was wrong; `problems` is by rank."""
    for problem in dict.fromkeys(p for p in problems if p is not None):
        ranks = [rank for rank, own in enumerate(problems) if own == problem]
        remedy = "remove that host from the job and test its hardware"
        yield _located(Finding(name, "FAULT", problem, remedy), ranks, hosts, "rank")


def speed(
    name: str, seconds: Sequence[float], hosts: Sequence[str], *, coupled: bool
) -> Iterator[Finding]:
    """Report how fast `name` was on each rank, and which ranks are slow.

    The reference is the lower median: of two ranks, the faster one.

    Args:
        name: What was timed.
        seconds: Times by rank.
        hosts: Names of hosts by rank.
        coupled: All ranks wait for the slowest one, so no rank can be singled out.
    """
    usual = median_low(seconds)
    slowest = max(range(len(seconds)), key=seconds.__getitem__)
    text = f"{min(seconds) * 1e3:.2f} to {seconds[slowest] * 1e3:.2f} ms, median {usual * 1e3:.2f}"
    slow = [] if coupled else [r for r, own in enumerate(seconds) if own > SLOW * usual]
    if not slow:
        yield Finding(name, "ok", text, seconds=tuple(seconds))
        return
    text = (
        f"slow: {name_ranks(slow, hosts)}, up to {seconds[slowest] / usual:.1f} times the "
        f"median ({text})"
    )
    yield Finding(
        name,
        "FAULT",
        text,
        "check for other processes there, and its clocks, cooling and links",
        seconds=tuple(seconds),
        ranks=tuple(slow),
        hosts=tuple(dict.fromkeys(hosts[rank] for rank in slow)),
    )
