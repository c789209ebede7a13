"""The page shows what was read of each source, and the loss on each folder of held-out data."""

import re

from moa_dist.data.epochs import SourceRead
from moa_dist.report.comparison import marked
from moa_dist.report.page import page
from moa_dist.report.read import read_run
from moa_dist.report.sources import source_names, source_numbers
from tests.report.outline import NOW, outline

MIX = {"books": SourceRead(700, 0.7, 1.25), "web": SourceRead(300, 0.3, 0.01)}
LOSSES = {"books": 3.25, "web": 4.75}


def texts(run, name):
    return [number.text for number in source_numbers(run, name)]


def test_share_epochs_and_validation_loss_of_each_source(write_run):
    run = read_run(write_run(sources=MIX, validation={"losses": LOSSES}))
    assert source_names([run]) == ["books", "web"]
    assert texts(run, "books") == ["70.00%", "1.25", "3.25"]
    assert texts(run, "web") == ["30.00%", "0.01", "4.75"]
    assert texts(run, "other") == ["-", "-", "-"]
    found = page([run], NOW)
    rows = re.findall(r'<tr><th scope="row">(books|web)</th><td>(.*?)</td><td>(.*?)</td>', found)
    assert rows == [("books", "70.00%", "1.25"), ("web", "30.00%", "0.01")]
    for title in ("Shares of sources", "Validation loss by folder"):
        assert title in found


def test_one_source_has_a_row_and_no_curves(write_run):
    sources = {"train": SourceRead(16, 1.0, 0.5)}
    run = read_run(write_run(sources=sources, validation={"losses": {"valid": 4.5}}))
    assert source_names([run]) == ["train", "valid"]
    assert texts(run, "train") == ["100.00%", "0.50", "-"]
    assert texts(run, "valid") == ["-", "-", "4.5"]
    found = page([run], NOW)
    assert "100.00%" in found
    assert "Shares of sources" not in found


def test_runs_that_recorded_no_sources_have_no_such_section(write_run):
    assert "<h2>Data</h2>" not in page([read_run(write_run())], NOW)


def test_a_source_that_is_read_no_longer_says_until_when(write_run):
    folder = write_run(sources=MIX)
    lines = (folder / "metrics.jsonl").read_text().replace('"web"', '"old"', 11)
    (folder / "metrics.jsonl").write_text(lines)
    run = read_run(folder)
    assert [number.detail for number in source_numbers(run, "old")][:2] == ["until step 11"] * 2
    assert [number.detail for number in source_numbers(run, "web")][:2] == ["", ""]


def test_comparison_has_a_row_for_each_source_and_a_star_where_runs_compare(write_run):
    runs = [
        read_run(write_run("a", sources=MIX, validation={"losses": LOSSES})),
        read_run(write_run("b", sources=MIX, validation={"losses": {"books": 3.0, "code": 1.0}})),
    ]
    assert source_names(runs) == ["books", "web", "code"]
    (*_, losses) = zip(*(source_numbers(run, "books") for run in runs), strict=True)
    assert ["★" in text for text in marked(losses)] == [False, True]
    (*_, losses) = zip(*(source_numbers(run, "code") for run in runs), strict=True)
    assert not any("★" in text for text in marked(losses))
    found = outline(*(run.folder for run in runs))
    for label in ("books: share of samples", "web: epochs", "code: validation loss"):
        assert label in found.text
    assert "code: epochs" not in found.text
