"""`~` in a configuration is the home folder: no shell has replaced it."""

from pathlib import Path

from moa_dist.config import load_config
from moa_dist.config.run import run_folder

CONFIG = Path(__file__).parents[2] / "configs/quickstart.yaml"


def test_folders_may_begin_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load_config(CONFIG, ["data.train=~/text/train", "output=~/runs", "name=~a"])
    assert config.data.train == "/home/somebody/text/train"
    assert run_folder(config) == Path("/home/somebody/runs/~a")
    assert load_config(CONFIG, ["data.valid=null"]).data.valid is None
