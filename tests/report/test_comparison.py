"""Several runs on one page: a star only where they compare, and headers that stay readable."""

import re

import pytest

from moa_dist.observe.metrics import Timing
from moa_dist.report.comparison import marked
from moa_dist.report.curves import labels
from moa_dist.report.numbers import at_equal_tokens, headline
from moa_dist.report.page import page
from moa_dist.report.read import read_run
from tests.observe.reports import routing
from tests.report.outline import NOW, outline


def starred(label: str, runs) -> list[bool]:
    rows = [*zip(*map(headline, runs), strict=True), at_equal_tokens(runs)]
    (numbers,) = (row for row in rows if row[0].label == label)
    return ["★" in text.split("\n")[0] for text in marked(numbers)]


def pair(write_run, **changes):
    """Two runs, of which the second differs by these metrics."""
    return [read_run(write_run()), read_run(write_run("other", **changes))]


def setting(path: str, value):
    def change(run):
        *parts, last = path.split(".")
        section = run.config
        for part in parts:
            section = section[part]
        section[last] = value

    return change


def test_the_best_of_runs_that_compare_gets_a_star(write_run):
    runs = pair(write_run, loss=3.0, tokens_per_second=24690.0)
    assert starred("Training loss", runs) == [False, True]
    assert starred("Tokens per second", runs) == [False, True]
    for label in ("Steps", "Time", "Parameters", "Restarts", "Slowest rank"):
        assert not any(starred(label, runs)), label


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("Training loss", setting("data.train", "elsewhere")),
        ("Training loss", setting("model.vocab_size", 60)),
        ("Training loss", setting("data.sequence_length", 32)),  # other tokens, too
        ("Validation perplexity", setting("model.vocab_size", 60)),
        ("Validation perplexity", setting("data.valid", "elsewhere")),
        ("Tokens per second", lambda run: run.facts.update(device="cuda (NVIDIA H200)")),
        ("Communication share", lambda run: run.facts.update(world_size=4)),
        ("Dead experts", lambda run: run.facts["routers"]["ffn"].update(experts=8)),
    ],
)
def test_no_star_where_runs_do_not_compare(write_run, label, change):
    runs = pair(
        write_run,
        loss=3.0,
        tokens_per_second=24690.0,
        validation={"perplexity": 30.0},
        routing={call: report._replace(load=report.load + 1) for call, report in routing().items()},
        timing=Timing.of([0.5, 0.3], [0.05, 0.05], ["a", "b"]),
    )
    assert starred(label, runs) == [False, True]
    change(runs[1])
    assert starred(label, runs) == [False, False]


def test_no_star_for_values_that_read_the_same(write_run):
    runs = pair(write_run, tokens_per_second=12345.679)
    assert starred("Tokens per second", runs) == [False, False]


def test_losses_after_as_many_tokens_compare(write_run):
    """A run that is further on is compared where the other one ends."""
    runs = [
        read_run(write_run()),
        read_run(write_run("longer", steps=range(1, 31), validation={"loss": 4.4})),
    ]
    assert starred("Validation perplexity", runs) == [False, False]
    assert [number.value for number in at_equal_tokens(runs)] == [4.5, 4.4]
    assert starred("Validation loss at equal tokens", runs) == [False, True]
    assert all("step 20" in number.detail for number in at_equal_tokens(runs))
    dense = read_run(write_run("none", steps=range(1, 5)))
    assert at_equal_tokens([*runs, dense])[-1].value is None


def test_long_names_are_shortened_to_what_differs(write_run):
    name = "moeut-1b-batch1024-sweep-learning-rate-{}-seed-0-weight-decay-0.1"
    folders = [
        write_run(letter, label=name.format(rate))
        for letter, rate in zip("abc", (1, 3, 6), strict=True)
    ]
    runs = [read_run(folder) for folder in folders]
    assert labels(runs) == ["…1…", "…3…", "…6…"]
    assert labels(runs[:1]) == [name.format(1)]
    found = outline(*folders)
    assert all(name.format(rate) in found.text for rate in (1, 3, 6))  # in full, once
    short = [read_run(write_run("x", label="one")), read_run(write_run("y", label="other"))]
    assert labels(short) == ["one", "other"]
    prefix = [
        read_run(write_run("p", label="l" * 30)),
        read_run(write_run("q", label="l" * 30 + "-2")),
    ]
    assert len(set(labels(prefix))) == 2


def test_headers_break_between_words(write_run):
    runs = [read_run(write_run(name, label=f"{name}-with_parts")) for name in ("a", "b")]
    head = re.search(r"<thead><tr>(.*?)</tr>", page(runs, NOW))[1]
    assert "a-<wbr>with_<wbr>parts" in head


def test_only_what_differs_is_listed(write_run):
    first, second = write_run(), write_run("other")
    what_differs = outline(first, second).texts("none")[0]
    assert what_differs.startswith("Nothing")
    run = read_run(second)
    run.facts |= {"hosts": {"node-9": 2}}
    table = page([read_run(first), run], NOW).split("What differs")[1].split("</table>")[0]
    assert re.findall(r'<th scope="row">(.*?)</th>', table) == ["hosts"]
