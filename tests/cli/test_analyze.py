"""`moa-dist analyze` writes numbers, pictures and a page, and the run's report shows them."""

import contextlib
import io
import json
import shutil

import pytest

from moa_dist.analyze import plots
from moa_dist.analyze.results import ANALYSIS_FILE, load_analysis
from moa_dist.cli.main import main
from moa_dist.data.manifest import load_manifest
from moa_dist.errors import DataError

PICTURES = {"load.png", "together.png", "heads.png"}


@pytest.fixture(scope="module")
def analyzed(made, tmp_path_factory):
    """A run that was analyzed, and what was printed; not to be changed."""
    run = tmp_path_factory.mktemp("analyzed") / "run"
    shutil.copytree(made / "run", run)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["analyze", str(run), "--min-count", "2"]) == 0
    return run, out.getvalue()


@pytest.fixture
def run(analyzed, tmp_path):
    """A copy, to write into."""
    shutil.copytree(analyzed[0], tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def no_matplotlib(monkeypatch):
    monkeypatch.setattr(plots, "find_spec", lambda name: None)


def test_one_command_writes_everything(made, analyzed):
    run, out = analyzed
    assert "L0 attention.value\n  6 experts, 4 per token" in out
    assert "L1 ffn\n  3 experts, 2 per token" in out
    written = {path.name for path in (run / "analysis").iterdir()}
    assert written == {"analysis.json", "analysis.html", *PICTURES}
    for name in PICTURES:
        assert (run / "analysis" / name).read_bytes().startswith(b"\x89PNG")
    analysis = load_analysis(run / "analysis")
    manifest = load_manifest(made / "data/valid")
    assert analysis.tokens == manifest.num_samples * manifest.block_length
    assert analysis.step == 2
    assert len(analysis.routers) == 2 * 3
    for router in analysis.routers:
        assert sum(router.load[0]) == analysis.tokens * router.choices


def test_the_report_shows_it(run):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    for title in ("Load of every expert", "Where heads look", "What experts are chosen by"):
        assert f"<h2>{title}</h2>" in page
    assert "Which repeats use an expert" not in page, "there are no repeats"


def test_an_export_elsewhere(made, tmp_path, no_matplotlib):
    assert main(["export", str(made / "run"), str(tmp_path / "model")]) == 0
    data = ["--data", str(made / "data/valid"), "--sequences", "3"]
    assert main(["analyze", str(tmp_path / "model"), *data, "--output", str(tmp_path / "a")]) == 0
    assert load_analysis(tmp_path / "a").tokens == 3 * 16


def test_an_average_stands_for_itself(made, tmp_path, no_matplotlib, capsys):
    """It is no part of a run, and its neighbors are not to share its folder."""
    run, mean = str(made / "run"), tmp_path / "runs/mean"
    mean.parent.mkdir()
    assert main(["checkpoint", "average", run, str(mean), "--last", "2"]) == 0
    assert main(["analyze", str(mean), "--sequences", "3"]) == 0
    assert load_analysis(mean / "analysis").tokens == 3 * 16


def test_a_place_that_cannot_be_is_refused_at_once(made, capsys):
    place = made / "run/tokenizer.json"
    assert main(["analyze", str(made / "run"), "--output", str(place)]) == 2
    error = capsys.readouterr().err
    assert "choose another place with --output" in error
    assert "reading" not in error


def test_without_matplotlib_it_says_what_is_missing(made, tmp_path, no_matplotlib, capsys):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    assert main(["analyze", str(run), "--sequences", "2"]) == 0
    assert "pip install 'moa-dist[plots]'" in capsys.readouterr().out
    written = {path.name for path in (run / "analysis").iterdir()}
    assert written == {"analysis.json", "analysis.html"}


def test_a_place_that_cannot_be_written(run, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["analyze", str(run), "--sequences", "2", "--output", str(tmp_path / "file")]) == 2
    assert "file: not written: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step"),
        ({"routers": [{"layer": 0}]}, "routers.0.router"),
        ("not JSON", "Invalid JSON"),
    ],
)
def test_a_damaged_analysis_is_a_problem_of_the_report(run, change, message):
    path = run / "analysis" / ANALYSIS_FILE
    content = (
        change if isinstance(change, str) else json.dumps(json.loads(path.read_text()) | change)
    )
    path.write_text(content)
    with pytest.raises(DataError, match=rf"damaged: .*{message}.*run moa-dist analyze again"):
        load_analysis(run / "analysis")
    assert main(["report", str(run)]) == 0
    assert "run moa-dist analyze again" in (run / "report.html").read_text()


def test_tables_that_do_not_fit_are_refused(run):
    path = run / "analysis" / ANALYSIS_FILE
    content = json.loads(path.read_text())
    content["routers"][0]["common"] = [[1, 2]]
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="do not fit each other"):
        load_analysis(run / "analysis")
