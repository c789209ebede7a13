"""Ranks that wait between tests leave the machine to others, however many cases they have run."""

from dataclasses import replace

import psutil

from tests.distributed.layouts import Case, on_rank

CASE = Case(zero_stage=3, precision="fp32")


def num_threads() -> int:
    return psutil.Process().num_threads()


def test_a_case_leaves_no_thread_behind(pools):
    """Each process group that stays alive has a thread that polls its sockets for ever."""
    cases = (CASE, replace(CASE, zero_stage=0, precision="fp64"))
    numbers = []
    for _ in range(3):  # the first time, torch starts threads that stay
        for case in cases:
            pools(2).run(on_rank, case)
        numbers.append(pools(2).run(num_threads))
    assert numbers[2] == numbers[1]
