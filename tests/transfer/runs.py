"""Runs of ours that consist of weights."""

from pathlib import Path

import torch

from moa_dist.checkpoint.tensor_file import TensorSpec
from moa_dist.config.run import Config
from moa_dist.data.tokenizer import TOKENIZER_FILE, train_tokenizer
from moa_dist.models.language_model import LanguageModel
from moa_dist.transfer.new_run import write_new_run

VOCABULARY, LENGTH = 270, 12


def save_tokenizer(folder: Path) -> None:
    tokenizer = train_tokenizer(["the cat sat on the mat"], VOCABULARY)
    (folder / TOKENIZER_FILE).write_text(tokenizer.to_json())


@torch.no_grad()
def randomize(model: torch.nn.Module, seed: int = 1) -> None:
    """Draw every parameter at random, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def make_run(folder: Path, model: LanguageModel, *, apart: bool = False) -> Config:
    """A run at step 0 with the weights of `model`, and a tokenizer; it keeps documents `apart`."""
    tasks = [{"path": f"{t}", "weight": 1.0, "task": t} for t in range(model.config.num_tasks)]
    train = tasks or "none"
    config = Config.model_validate(
        {
            "name": folder.name,
            "output": str(folder.parent),
            "model": model.config.model_dump(),
            "data": {"train": train, "sequence_length": LENGTH, "document_attention": apart},
            "train": {"steps": 4, "global_batch": 8, "micro_batch": 2},
        }
    )
    folder.parent.mkdir(exist_ok=True)
    save_tokenizer(folder.parent)
    state = model.state_dict()
    specs = [TensorSpec(name, t.dtype, tuple(t.shape)) for name, t in state.items()]
    values = (tensor.contiguous() for tensor in state.values())
    write_new_run(folder, config, specs, values, (folder.parent / TOKENIZER_FILE).read_bytes())
    return config
