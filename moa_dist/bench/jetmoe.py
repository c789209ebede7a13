"""Section `jetmoe`: our JetMoE against transformers' own and a dense model."""

from __future__ import annotations

import contextlib
import io
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moa_dist.bench.dense import equal_work
from moa_dist.bench.measure import Table, Work, compare
from moa_dist.bench.setting import Setting, gradients
from moa_dist.config.model import ModelConfig
from moa_dist.models.language_model import build_model
from moa_dist.transfer.jetmoe import problems_of_model, settings_of


def jetmoe(setting: Setting) -> list[Table]:
    """Compare forward, cross-entropy and backward passes of whole models.

    Returns no table if the configuration is not a JetMoE.
    """
    model, length = setting.config.model, setting.config.data.sequence_length
    if next(problems_of_model(model), None) is not None:
        return []
    models: dict[str, nn.Module] = {
        "dense, equal work": build_model(equal_work(model, length)),
        "ours": build_model(model),
    }
    if find_spec("transformers"):
        models["transformers JetMoE"] = _theirs(model, length)
    work = {name: _both_passes(setting, module) for name, module in models.items()}
    rows = compare(work, setting.device, repetitions=setting.repetitions, modules=models)
    return [Table("JetMoE, forward and backward", rows, setting.tokens)]


def _both_passes(setting: Setting, model: nn.Module) -> Work:
    model.to(setting.device, setting.dtype).train()
    vocab_size = setting.config.model.vocab_size
    shape = (setting.sequences, setting.config.data.sequence_length)
    tokens = torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(setting.device)

    def loss() -> Tensor:
        logits = model(tokens).logits.flatten(0, 1)
        return F.cross_entropy(logits.float(), tokens.flatten())

    return gradients(loss, list(model.parameters()))


def _theirs(model: ModelConfig, length: int) -> nn.Module:
    from transformers import JetMoeConfig, JetMoeForCausalLM

    settings = settings_of(model, max_length=length, end_of_document=0)
    with contextlib.redirect_stdout(io.StringIO()):
        theirs: nn.Module = JetMoeForCausalLM(JetMoeConfig(**settings))
    return theirs
