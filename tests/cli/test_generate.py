"""`moa-dist generate` prints the prompt and what `generate` draws."""

import pytest

from moa_dist.cli.main import main
from moa_dist.data.tokenizer import load_tokenizer
from moa_dist.evaluate.generate import generate
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.language_model import build_model
from tests.evaluate.runs import LENGTH, config


def printed(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_prompt_and_continuation(made, capsys):
    options = ["--tokens", 30, "--temperature", 1.5, "--top-p", 0.9, "--top-k", 200, "--seed", 5]
    prompts = ["the café", "", "things in 日本"]
    tokenizer = load_tokenizer(made / "data/train")
    drawn = generate(
        build_model(config(made).model, seed=2).eval(),
        tokenizer.encode_batch(prompts),
        Sampling(1.5, 200, 0.9),
        max_new_tokens=30,
        seed=5,
        end_of_document=tokenizer.end_of_document,
        max_length=LENGTH,
    )
    ids = [[], [], []]
    for prompt, token in drawn:
        ids[prompt].append(token)
    texts = [prompt + tokenizer.decode(new) for prompt, new in zip(prompts, ids, strict=True)]
    assert texts[0] != prompts[0]
    assert texts[1] != prompts[1]
    one = printed(capsys, made / "run", "--prompt", prompts[0], *options)
    assert one == f"{texts[0]}\n"
    several = [part for prompt in prompts for part in ("--prompt", prompt)]
    assert printed(capsys, made / "run", *several, *options) == "\n\n".join(texts) + "\n"


def test_defaults_and_an_empty_prompt(made, capsys):
    arguments = [made / "run", "--prompt", "", "--tokens", 12]
    first = printed(capsys, *arguments)
    spelled_out = ["--temperature", 0.8, "--top-p", 0.95, "--seed", 0]
    assert printed(capsys, *arguments, *spelled_out) == first
    assert printed(capsys, *arguments, "--seed", 1) != first


def test_a_prompt_longer_than_the_model_sees_gets_a_warning(made, capsys):
    command = ["generate", str(made / "run"), "--prompt", "the café", "--tokens"]
    assert main([*command, "2"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert main([*command, str(LENGTH)]) == 0
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert str(LENGTH) in warning.split()


def test_no_checkpoint(tmp_path, capsys):
    assert main(["generate", str(tmp_path), "--prompt", "a"]) == 2
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "bound"),
    [
        ("--tokens", "0", "1"),
        ("--temperature", "-1", "0"),
        ("--temperature", "nan", "0"),
        ("--temperature", "inf", "0"),
        ("--top-p", "1.1", "0 to 1"),
        ("--top-k", "0", "1"),
        ("--seed", "x", "'x'"),
        ("--prompt", "\udcff", "UTF-8"),
    ],
)
def test_wrong_values(capsys, option, value, bound):
    with pytest.raises(SystemExit) as exit:
        main(["generate", "run", "--prompt", "a", option, value])
    assert exit.value.code == 2
    _, named, reason = capsys.readouterr().err.partition(f"argument {option}:")
    assert named
    assert bound in reason
