"""A run that was never trained: prepared data, a tokenizer and two saved checkpoints."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moa_dist.config.run import Config
from moa_dist.data.prepare import prepare
from moa_dist.data.text_options import TextOptions
from moa_dist.data.tokenizer import TOKENIZER_FILE
from moa_dist.distributed.mesh import make_mesh
from moa_dist.models.language_model import build_model
from tests.distributed.pool import Pool

LENGTH, VOCABULARY = 16, 300
ROUTER = {"num_experts": 3, "top_k": 2, "score": "sigmoid"}


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread, for models so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def config(folder: Path) -> Config:
    return Config.model_validate(
        {
            "name": "run",
            "output": str(folder),
            "model": {
                "vocab_size": VOCABULARY,
                "d_model": 16,
                "num_layers": 2,
                "norm_placement": "peri",
                "attention": {"kind": "switchhead", "num_heads": 2, "d_head": 8, "router": ROUTER},
                "ffn": {"kind": "moe", "d_expert": 8, "router": ROUTER},
            },
            "data": {
                "train": str(folder / "data/train"),
                "valid": str(folder / "data/valid"),
                "sequence_length": LENGTH,
            },
            "train": {"steps": 2, "global_batch": 2, "micro_batch": 2},
        }
    )


def prepare_text(
    output: Path, *, length: int = LENGTH, valid_share: float = 0.0, tokenizer: Path | None = None
) -> None:
    file = output.with_suffix(".txt")
    text = (f"{n}: the café in 日本 sells {n * n} things 🚢." for n in range(80))
    file.write_text("\n\n".join(text), encoding="utf-8")
    prepare(
        [str(file)],
        output,
        block_length=length,
        vocab_size=VOCABULARY,
        tokenizer=tokenizer,
        valid_share=valid_share,
        text=TextOptions(documents="blank-line"),
    )


def make_run(folder: Path) -> None:
    """Fill `folder` with `data` and `run`."""
    prepare_text(folder / "data", valid_share=0.3)
    rank = Pool(1)  # saving needs a process group, which stays out of this process
    rank.run(_save, folder)
    rank.close()
    shutil.copyfile(folder / "data/train" / TOKENIZER_FILE, folder / "run" / TOKENIZER_FILE)


def _save(folder: Path) -> None:
    from moa_dist.checkpoint.checkpointer import Checkpointer
    from moa_dist.train.engine import Engine

    run = config(folder)
    for step in (1, 2):
        model = build_model(run.model, seed=step)
        engine = Engine(model, run, make_mesh(1), torch.device("cpu"))
        checkpointer = Checkpointer(engine.state, run, folder / run.name)
        checkpointer.save(step, samples=2 * step)
        checkpointer.finish()
        engine.close()
