"""`moa-dist generate` prints the prompt and what the functions behind it say."""

import pytest

from moa_dist.cli.main import main
from moa_dist.data.tokenizer import load_tokenizer
from moa_dist.evaluate.generate import generate
from moa_dist.models.language_model import build_model
from tests.evaluate.runs import LENGTH, config


def printed(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_prompt_and_continuation(made, capsys):
    options = ["--tokens", 30, "--temperature", 1.5, "--top-p", 0.9, "--seed", 5]
    text = printed(capsys, made / "run", "--prompt", "the café", *options)
    tokenizer = load_tokenizer(made / "data/train")
    ids = generate(
        build_model(config(made).model, seed=2).eval(),
        tokenizer.encode("the café"),
        max_new_tokens=30,
        temperature=1.5,
        top_p=0.9,
        seed=5,
        end_of_document=tokenizer.end_of_document,
        max_length=LENGTH,
    )
    expected = tokenizer.decode(list(ids))
    assert expected
    assert text == f"the café{expected}\n"


def test_defaults_and_an_empty_prompt(made, capsys):
    arguments = [made / "run", "--prompt", "", "--tokens", 12]
    first = printed(capsys, *arguments)
    spelled_out = ["--temperature", 0.8, "--top-p", 0.95, "--seed", 0]
    assert printed(capsys, *arguments, *spelled_out) == first
    assert printed(capsys, *arguments, "--seed", 1) != first


def test_no_checkpoint(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert "give the folder of a run that has saved one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--tokens", "0", "must be at least 1"),
        ("--temperature", "-1", "must be at least 0"),
        ("--temperature", "nan", "must be at least 0"),
        ("--temperature", "inf", "must be at least 0"),
        ("--top-p", "1.1", "must be from 0 to 1"),
        ("--seed", "x", "invalid number value: 'x'"),
        ("--prompt", "\udcff", "is not valid UTF-8"),
    ],
)
def test_wrong_values(capsys, option, value, message):
    with pytest.raises(SystemExit):
        main(["generate", "run", "--prompt", "a", option, value])
    assert message in capsys.readouterr().err
