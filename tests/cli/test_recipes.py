"""`moa-dist recipes` lists every shipped configuration, with numbers counted from the model."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from moa_dist.cli.main import main
from moa_dist.config import load_config
from moa_dist.config.recipe import read_recipe, shipped_folder, shipped_recipes
from moa_dist.config.source import parse_yaml
from moa_dist.errors import ConfigError
from moa_dist.models.language_model import LanguageModel
from moa_dist.units import short

RECIPES = shipped_recipes()
FILES = sorted(shipped_folder().resolve().rglob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_configuration_is_a_recipe(path):
    """Files without a name of their own are fragments for others to extend."""
    data = parse_yaml(path.read_text(), path.name).data
    recipe = read_recipe(path)
    assert (recipe is not None) == ("name" in data), "`name` and `recipe` come together"
    if recipe is None:
        return
    assert path in [shipped.resolve() for shipped in RECIPES.values()]
    assert re.search(r"arXiv \d{4}\.\d{5}", recipe.paper)
    for name in re.findall(r"\b[a-z_]+/\d+[mb]\b", recipe.expect):
        assert name in RECIPES, "compares with a recipe that does not exist"
    assert "recipe" not in load_config(path).model_dump(), "it is not a setting"


def test_numbers_are_those_of_the_model(capsys):
    assert main(["recipes", "--json"]) == 0
    listed = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    assert listed.keys() == RECIPES.keys()
    for name in ("moeut/44m", "moa/8k16e256d", "small/dense"):
        with torch.device("meta"):
            model = LanguageModel(load_config(RECIPES[name]).model)
        assert listed[name]["parameters"] == sum(p.numel() for p in model.parameters())
    assert round(listed["moeut/44m"]["parameters"] / 1e6, 2) == 44.35
    assert round(listed["dense/44m"]["macs_per_token"] * 1024 / 1e9, 1) == 52.5
    assert listed["moeut/44m"]["tokens"] == 100_000 * 64 * 1024


def test_a_model_that_trains_more_experts_than_it_evaluates_has_both_numbers(capsys):
    name, path = "family/ds_moe", str(RECIPES["family/ds_moe"])
    assert main(["recipes", "--json"]) == 0
    (listed,) = (each for each in json.loads(capsys.readouterr().out) if each["name"] == name)
    assert listed["active_parameters"] == listed["parameters"]
    assert main(["plan", path, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"]["active"] == listed["active_parameters"]
    length, evaluation = planned["sequence_length"], listed["evaluation"]
    assert planned["macs"]["blocks"] == listed["macs_per_token"] * length
    assert planned["flops_per_token"] == 6 * planned["macs"]["total"] / length
    assert planned["evaluation"]["macs"]["blocks"] == evaluation["macs_per_token"] * length
    assert planned["evaluation"]["active_parameters"] == evaluation["active_parameters"]
    assert evaluation["macs_per_token"] < listed["macs_per_token"]
    both = "/".join(short(each["macs_per_token"]) for each in (listed, evaluation))
    for command in (["recipes"], ["recipes", name]):
        assert main(command) == 0
        assert both in capsys.readouterr().out
    assert main(["plan", path]) == 0
    assert short(planned["evaluation"]["macs"]["total"]) in capsys.readouterr().out


def test_the_table_has_a_line_for_each(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1 : len(RECIPES) + 1]] == list(RECIPES)
    (line,) = [line for line in lines if line.startswith("moeut/244m ")]
    assert line.split()[1:3] == ["243M", "32.0M"]


def test_one_in_full_says_how_to_start(capsys):
    assert main(["recipes", "small/moeut"]) == 0
    out = capsys.readouterr().out
    recipe, words = read_recipe(RECIPES["small/moeut"]), " ".join(out.split())
    for text in (recipe.paper, recipe.row, recipe.expect):
        assert " ".join(text.split()) in words
    assert "158.8" in recipe.expect
    (start,) = re.findall(r"start +(.*)", out)
    assert start.startswith("deepspeed --num_gpus 2 launcher/train.py --config ")
    words = start.split()
    config = load_config(words[words.index("--config") + 1], words[words.index("--config") + 2 :])
    assert config == load_config(RECIPES["small/moeut"])


def test_an_unknown_name(capsys):
    assert main(["recipes", "moeut/44"]) == 2
    assert "`moeut/44m`" in capsys.readouterr().err
    assert main(["recipes", "?"]) == 2
    assert "`?`" in capsys.readouterr().err


def test_a_recipe_is_not_passed_on(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        f"extends: {RECIPES['small/moeut'].resolve()}\nname: mine\n"
    )
    assert read_recipe(tmp_path / "mine.yaml") is None
    assert load_config(tmp_path / "mine.yaml").name == "mine"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("recipe: {paper: a, row: b}", r"recipe\.expect"),
        ("recipe: {paper: a, row: b, expect: c, papers: d}", r"recipe\.papers"),
        ("recipe: [", r"wrong\.yaml"),
    ],
)
def test_a_wrong_recipe(tmp_path, text, place):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(ConfigError, match=place):
        read_recipe(tmp_path / "wrong.yaml")


def test_a_reader_that_has_seen_enough_is_no_error():
    """Closes the pipe early, as `head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "moa_dist.cli.main", "recipes"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
