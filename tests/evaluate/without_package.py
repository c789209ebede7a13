"""Loads exports as somebody does who has torch and transformers, but not this package.

    python -I tests/evaluate/without_package.py FOLDER...

For each folder it writes FOLDER.read.safetensors: logits of tokens, greedy continuations with and
without a cache, unless the model looks ahead, and those of the model that is saved again. Then it
computes the loss's gradient, and prints as JSON what the tokenizer makes of a text.
"""

import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from importlib.abc import MetaPathFinder

PACKAGE = "moa_dist"
TEXT = "the cat <|endoftext|> sat"
NEW_TOKENS = 6
TASKS = [1, 0]
"""Of the sequences; ignored by models without a router per task."""


class Absent(MetaPathFinder):
    """Hides the package, which the interpreter that runs the tests has installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in (PACKAGE, "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def tokens_for(vocab_size):
    import torch

    return torch.arange(24).view(2, 12) * 7 % vocab_size


def read(folder):
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    assert not model.training
    tokens = tokens_for(model.config.model["vocab_size"])
    of_tasks = {"tasks": torch.tensor(TASKS)}
    found = {"logits": model(tokens, **of_tasks).logits}
    greedy = {"max_new_tokens": NEW_TOKENS, "do_sample": False} | of_tasks
    refusal = [ValueError] if model.model.config.looks_ahead else []
    for name, use_cache in (("cached", True), ("uncached", False)):
        with suppress(*refusal):
            found[name] = model.generate(tokens, use_cache=use_cache, **greedy)
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        assert type(reloaded).__module__ != type(model).__module__, "the saved code runs"
        found["saved again"] = reloaded(tokens, **of_tasks).logits
        ids = AutoTokenizer.from_pretrained(again, trust_remote_code=True)(TEXT).input_ids
    assert ids == tokenizer(TEXT).input_ids
    loss = model(tokens, labels=tokens, **of_tasks).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    save_file({k: v.detach().contiguous() for k, v in found.items()}, f"{folder}.read.safetensors")
    return ids


def read_elsewhere(folders):
    """Load the exports in a process of its own; returns the ids of a text, for each of them."""
    command = [sys.executable, "-I", __file__, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    sys.meta_path.insert(0, Absent())
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(HF_HOME=cache, HF_HUB_OFFLINE="1")  # before transformers is imported
        print(json.dumps([read(folder) for folder in sys.argv[1:]]))
    assert PACKAGE not in sys.modules


if __name__ == "__main__":
    main()
