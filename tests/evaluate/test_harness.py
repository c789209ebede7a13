"""lm-evaluation-harness gets the numbers of `moa-dist eval`."""

import json
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from moa_dist.evaluate.harness import HarnessModel
from moa_dist.evaluate.zero_shot import TASKS
from tests.evaluate.test_scoring import LENGTH, REQUESTS, TEXT, by_hand, make_scorer

FILES = {
    "piqa": [
        {"goal": f"Feed {n} cats", "sol1": "run " * n + "over", "sol2": f"sit {n}", "label": n % 2}
        for n in range(1, 13)
    ],
    "blimp": [
        {
            "good": f"{n} cats sit on the mat.",
            "bad": f"{n} cat sit on the {'mat' * (n % 3)}.",
            "uid": "number",
            "phenomenon": "agreement",
        }
        for n in range(1, 13)
    ],
    "lambada": [
        {"text": f"the cat sat on the {word}"} for word in ("mat", "dog", "hill", "on\nmat", "the")
    ],
}
HARNESS = {
    "piqa": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{goal}}\nAnswer:",
        "doc_to_target": "label",
        "doc_to_choice": "{{[sol1, sol2]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "blimp": {
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "target_delimiter": "",
        "doc_to_target": 0,
        "doc_to_choice": "{{[good, bad]}}",
        "metric_list": [{"metric": "acc"}],
    },
    "lambada": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
        "doc_to_target": "{{' ' + text.split(' ')[-1]}}",
        "metric_list": [{"metric": "acc"}, {"metric": "perplexity"}],
    },
}
SAME = {
    "piqa": {"accuracy": "acc", "accuracy_per_character": "acc_norm"},
    "blimp": {"accuracy": "acc"},
    "lambada": {"accuracy": "acc", "perplexity": "perplexity"},
}
"""Ours and theirs."""


def ask(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


def write_task(name: str, folder: Path) -> tuple[Path, dict]:
    """The file of the built-in task, and the harness' task that reads it."""
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in FILES[name]))
    data = {"data_files": {"validation": str(file)}, "cache_dir": str(folder / "cache")}
    task = {"task": f"local_{name}", "dataset_path": "json", "dataset_kwargs": data}
    return file, HARNESS[name] | task | {"validation_split": "validation"}


@pytest.fixture(scope="module")
def model():
    scorer = make_scorer()
    return HarnessModel(scorer.model, scorer)


def test_log_likelihoods_are_the_scorers(model):
    answers = model.loglikelihood([ask("loglikelihood", *request) for request in REQUESTS])
    scores = model.scorer.score(REQUESTS)
    assert answers == [(score.log_likelihood, score.greedy) for score in scores]


def test_a_document_counts_every_token_once(model):
    (answer,) = model.loglikelihood_rolling([ask("loglikelihood_rolling", TEXT * 2)])
    total, num_tokens, *_ = by_hand(model.scorer, "", TEXT * 2)
    assert num_tokens > 2 * LENGTH
    assert answer == pytest.approx(total, rel=1e-12)


def test_generation_is_greedy_and_stops(model):
    options = {"until": [], "max_gen_toks": 20}
    whole, again = model.generate_until([ask("generate_until", "the cat", options)] * 2)
    assert whole == again
    assert len(whole) > 4
    stops = [whole[3:5], "no such text"]
    (cut,) = model.generate_until([ask("generate_until", "the cat", options | {"until": stops})])
    assert cut == whole[: whole.index(stops[0])]


def test_zero_allows_all_tokens_as_in_hugging_face(model):
    options = {"until": [], "max_gen_toks": 5, "do_sample": True, "temperature": 1.0}
    every, zero = (
        model.generate_until([ask("generate_until", "the cat", options | top_k)])
        for top_k in ({}, {"top_k": 0})
    )
    assert every == zero


@pytest.mark.parametrize("name", FILES)
def test_the_whole_harness_on_a_local_file(model, tmp_path, name):
    file, task = write_task(name, tmp_path)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=2)
    theirs = found["results"][f"local_{name}"]
    ours = TASKS[name].run(TASKS[name].examples([file]), model.scorer.score).metrics
    for metric, their_name in SAME[name].items():
        assert theirs[f"{their_name},none"] == pytest.approx(ours[metric].value, rel=1e-12)
        if their_name != "perplexity":  # for which the harness draws samples
            error = theirs[f"{their_name}_stderr,none"]
            assert error == pytest.approx(ours[metric].standard_error, rel=1e-9)
    assert name == "lambada" or 0 < ours["accuracy"].value < 1
