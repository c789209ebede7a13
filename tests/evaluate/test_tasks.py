"""Each task's requests and metrics by hand, on tiny files; damage is named with its line."""

import gzip
import json
import math

import pytest

from moa_dist.evaluate.scoring import Request, Score
from moa_dist.evaluate.tasks.cloze import join_tokens
from moa_dist.evaluate.zero_shot import TASKS
from tests.raises import raises_data_error

STORY = "\n".join(f"{n} Sentence {n} ." for n in range(1, 21))
STORY_TEXT = " ".join(f"Sentence {n}." for n in range(1, 21))


class FakeScores:
    """Scores by continuation, and the requests that asked for them."""

    def __init__(self, scores):
        self.scores = scores
        self.requests = []

    def __call__(self, requests):
        self.requests += requests
        return [self.scores[request.continuation] for request in requests]


def run(name, paths, fake):
    task = TASKS[name]
    return task.run(task.examples(paths), fake)


def score(log_likelihood, num_tokens=1, greedy=False):
    return Score(log_likelihood, num_tokens, greedy)


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def pair(number, paradigm, phenomenon):
    names = {"UID": paradigm, "linguistics_term": phenomenon}
    return {"sentence_good": f"good {number}", "sentence_bad": f"bad {number}"} | names


def test_blimp(tmp_path):
    (tmp_path / "a.jsonl").write_text(lines(pair(1, "p1", "island"), pair(2, "p1", "island")))
    short = {"good": "good 3", "bad": "bad 3", "uid": "p2", "phenomenon": "island"}
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(lines(short, pair(4, "p3", "ellipsis")))
    (tmp_path / "SOURCE.txt").write_text("not an example")
    said = {1: (-5.0, -6.0), 2: (-6.0, -5.0), 3: (-7.0, -9.0), 4: (-5.0, -5.0)}  # 4 is a tie
    scores = {f"good {n}": score(good) for n, (good, _) in said.items()}
    scores |= {f"bad {n}": score(bad) for n, (_, bad) in said.items()}
    fake = FakeScores(scores)
    result = run("blimp", [tmp_path], fake)
    assert fake.requests[:2] == [Request("", "good 1"), Request("", "bad 1")]
    assert result.num_examples == 4
    # Two of four are right; sqrt(p (1 - p) / (n - 1)).
    assert result.metrics == {"accuracy": (0.5, pytest.approx(math.sqrt(0.25 / 3)))}
    assert result.groups["phenomenon"] == {
        "ellipsis": (0.0, 0.0),
        "island": (pytest.approx(2 / 3), pytest.approx(math.sqrt(2 / 9 / 2))),
    }
    assert {name: value for name, (value, _) in result.groups["paradigm"].items()} == {
        "p1": 0.5,
        "p2": 1.0,
        "p3": 0.0,
    }


def test_lambada(tmp_path):
    records = tmp_path / "words.jsonl"
    records.write_text(
        lines({"context": "I care about", "continuation": "signs"}, {"text": "he said,\n\nShane "})
    )
    plain = tmp_path / "words.txt"
    plain.write_text("in my palm , a stone\n\n")
    fake = FakeScores(
        {
            " signs": score(-1.0, 2, True),
            " said,\n\nShane": score(-2.0),
            " stone": score(-3.0, 1, True),
        }
    )
    result = run("lambada", [records, plain], fake)
    assert fake.requests == [
        Request("I care about", " signs"),
        Request("he", " said,\n\nShane"),
        Request("in my palm , a", " stone"),
    ]
    assert result.num_examples == 3
    assert result.groups["file"] == {"words.jsonl": (0.5, 0.5), "words.txt": (1.0, 0.0)}
    assert result.metrics["accuracy"] == (
        pytest.approx(2 / 3),
        pytest.approx(math.sqrt(2 / 9 / 2)),
    )
    value, error = result.metrics["perplexity"]
    assert value == pytest.approx(math.exp(2.0))
    assert error == pytest.approx(math.exp(2.0) / math.sqrt(3))  # the losses have variance 1


def test_piqa(tmp_path):
    file = tmp_path / "valid.jsonl"
    questions = [
        {"goal": "Open it", "sol1": "pull it", "sol2": "push it hard", "label": 1},
        {"goal": "dresser", "sol1": "bobby pin ", "sol2": "pins", "label": 0},
    ]
    file.write_text(lines(*questions))
    fake = FakeScores(
        {
            " pull it": score(-8.0, 2),
            " push it hard": score(-9.0, 3),  # worse in total, better on average
            " bobby pin ": score(-4.0, 1),
            " pins": score(-6.0, 2),  # better per token, worse per character
        }
    )
    result = run("piqa", [file], fake)
    assert fake.requests[0] == Request("Question: Open it\nAnswer:", " pull it")
    assert fake.requests[3] == Request("Question: dresser\nAnswer:", " pins")
    assert {name: value for name, (value, _) in result.metrics.items()} == {
        "accuracy": 0.5,
        "accuracy_per_token": 0.5,
        "accuracy_per_character": 1.0,
    }
    assert result.metrics["accuracy"].standard_error == pytest.approx(0.5)


def cloze(query="`` The XXXXX 's , '' he said .", answer="dragon", candidates="dragon|wood|life"):
    return f"{STORY}\n21 {query}\t{answer}\t\t{candidates}\n\n"


def test_cloze(tmp_path):
    (tmp_path / "CN.txt").write_text(cloze() + cloze("XXXXX , he did .", "wood", "life|wood"))
    (tmp_path / "V.txt").write_text(cloze(candidates="dragon|wood|dragon"))
    rest = "'s,\" he said."
    fake = FakeScores(
        {
            f"dragon{rest}": score(-5.0, 2),
            f"wood{rest}": score(-6.0, 2),
            f"life{rest}": score(-7.0, 3),  # the worst in total, the best on average
            "life, he did.": score(-5.0),
            "wood, he did.": score(-6.0),
        }
    )
    result = run("cbt", [tmp_path], fake)
    assert fake.requests[0] == Request(f'{STORY_TEXT} "The ', f"dragon{rest}")
    assert fake.requests[3] == Request(f"{STORY_TEXT} ", "life, he did.")
    assert len(fake.requests) == 3 + 2 + 2
    assert result.metrics["accuracy"].value == pytest.approx(2 / 3)
    assert result.metrics["accuracy_per_token"].value == pytest.approx(1 / 3)
    assert result.groups["file"] == {"CN.txt": (0.5, pytest.approx(0.5)), "V.txt": (1.0, 0.0)}


def test_tokens_are_joined():
    apart = "`` I ca n't , '' said Tom 's dog ; -LRB- it 'll go -RRB- ! -- why ?"
    assert join_tokens(apart) == "\"I can't,\" said Tom's dog; (it'll go)! -- why?"


PAIR = json.dumps(pair(1, "p", "q"))
QUESTION = '{"goal": "g", "sol1": "a", "sol2": "b"'
DAMAGED = {
    "not JSON": ("blimp", f"{PAIR}\n\n{{\n", 3, None, ()),
    "nested without end": ("blimp", "[" * 100_000, 1, None, ()),
    "a list": ("blimp", "[]\n", 1, None, ()),
    "another task's": ("blimp", '{"goal": "x"}\n', 1, "sentence_good", ("'good'", "goal")),
    "a number": ("blimp", PAIR.replace('"bad 1"', "3"), 1, "sentence_bad", ()),
    "an empty sentence": ("blimp", PAIR.replace("good 1", " "), 1, "sentence_good", ()),
    "half a surrogate pair": ("blimp", PAIR.replace("good 1", "\\ud800"), 1, "sentence_good", ()),
    "no example": ("blimp", "\n \n", None, None, ()),
    "not UTF-8": ("blimp", b"\xff\xfe", 1, None, ()),
    "one word": ("lambada", '{"text": " word "}', 1, None, ()),
    "no label": ("piqa", QUESTION + "}", 1, "label", ("None",)),
    "a third solution": ("piqa", QUESTION + ', "label": 2}', 1, "label", ("2",)),
    "no number": ("cbt", "1 One .\nTwo .\n", 2, None, ("sentence 2",)),
    "a sentence is missing": ("cbt", cloze().replace("7 Sentence 7 .\n", ""), 7, None, ("7",)),
    "half a question": ("cbt", f"{cloze()}{STORY}", 42, None, ()),
    "no gap": ("cbt", cloze("The end ."), 21, "sentence", ("XXXXX",)),
    "no candidates": ("cbt", f"{STORY}\n21 XXXXX .\tdragon\n", 21, "sentence", ()),
    "another answer": ("cbt", cloze(answer="cat"), 21, "candidates", ("'cat'",)),
    "one candidate": ("cbt", cloze(candidates="dragon"), 21, "candidates", ("'dragon'",)),
}


@pytest.mark.parametrize(
    ("task", "content", "line", "key", "values"), DAMAGED.values(), ids=DAMAGED
)
def test_damaged_files(tmp_path, task, content, line, key, values):
    file = tmp_path / ("file.txt" if task == "cbt" else "file.jsonl")
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with raises_data_error(file, *values, path=file, line=line, key=key):
        TASKS[task].examples([file])


def test_a_file_given_twice(tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(PAIR)
    with raises_data_error(path=file):
        TASKS["blimp"].examples([file, tmp_path])


def test_files_of_one_name_are_told_apart(tmp_path):
    files = [tmp_path / folder / "words.txt" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text("the cat\n")
    result = run("lambada", files, FakeScores({" cat": score(-1.0)}))
    assert list(result.groups["file"]) == [str(file) for file in files]


@pytest.mark.parametrize("task", TASKS)
def test_no_file(tmp_path, task):
    with raises_data_error(path=tmp_path / "gone.jsonl"):
        TASKS[task].examples([tmp_path / "gone.jsonl"])
    with raises_data_error(*TASKS[task].suffixes, path=tmp_path):
        TASKS[task].examples([tmp_path])


def test_a_compressed_file_that_is_cut_off(tmp_path):
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress(PAIR.encode())[:-9])
    with raises_data_error(path=file):
        TASKS["blimp"].examples([file])
