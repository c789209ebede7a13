"""Continues the prompts of a run, `evaluation.samples`, with its weights as they are.

Prompt i is continued by rank i mod W. Experts and parameters may lie on other ranks, so every rank
enters the same number of forwards: one per new token, also when its texts have ended, or when it
has none. Each forward reads whole texts, because experts with a capacity, which they keep here,
cannot use a cache. Without a capacity, the texts are those of `generate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moa_dist.config.run import Config
from moa_dist.config.sequence_groups import sequences_per_group
from moa_dist.data.places import local_path
from moa_dist.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_tokenizer
from moa_dist.distributed.collectives import sum_over_ranks
from moa_dist.distributed.comm_timer import CommTimer
from moa_dist.evaluate.generate import Drawn, padded_left, stream_text, within
from moa_dist.evaluate.sampling import Sampling
from moa_dist.models.documents import Documents
from moa_dist.models.language_model import LanguageModelOutput


@dataclass(frozen=True)
class Samples:
    """The prompts of a run, and what continuing them needs."""

    config: Config
    """The run's configuration."""
    tokenizer: Tokenizer
    """The run's tokenizer."""

    def run(self, model: nn.Module) -> list[str]:
        """Return a continuation of each prompt. Collective if a process group exists.

        `model` may be sharded; it is an engine or a `LanguageModel`. The result depends on it, the
        prompts and `evaluation.samples.seed` alone. Raises DataError if a prompt cannot be encoded.
        """
        prompts = self.tokenizer.encode_batch(self.config.evaluation.samples.prompts)
        was_training = model.training
        model.eval()
        drawn = self._draw(model, prompts)
        model.train(was_training)
        texts = [""] * len(prompts)
        for prompt, piece in stream_text(self.tokenizer, drawn, prompts):
            texts[prompt] += piece
        return texts

    def _draw(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Drawn]:
        """Return the new tokens of all prompts, on every rank."""
        ranked = dist.is_initialized()
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if ranked else (0, 1)
        settings = self.config.evaluation.samples
        # Each token as its id plus one, since what nobody has drawn is zero.
        drawn = torch.zeros(len(prompts), settings.tokens, dtype=torch.int64)
        own = list(range(rank, len(prompts), world_size))
        drawn[own] = self._continue(model, prompts, own, -(-len(prompts) // world_size))
        if ranked:
            device = next(model.parameters()).device
            drawn = sum_over_ranks([drawn.to(device)], CommTimer(), "samples")[0].cpu()
        return [Drawn(i, n - 1) for i, row in enumerate(drawn.tolist()) for n in row if n]

    def _continue(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], own: list[int], num_rows: int
    ) -> Tensor:
        """Return the rows of `_draw` at `own`; every rank reads `num_rows` texts at once."""
        settings, end = self.config.evaluation.samples, self.tokenizer.end_of_document
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p)
        length = self.config.data.sequence_length
        texts = [list(prompts[i])[-length:] or [end] for i in own]
        texts += [[end]] * (num_rows - len(own))  # read, but not continued
        generators = [torch.Generator().manual_seed(settings.seed + i) for i in own]
        drawn = torch.zeros(len(own), settings.tokens, dtype=torch.int64)
        unfinished = set(range(len(own)))
        for position in range(settings.tokens):
            logits = self._read(model, texts)
            for row in sorted(unfinished):
                token = sampling.draw(logits[row], generators[row])
                if token == end:
                    unfinished.remove(row)
                else:
                    drawn[row, position] = token + 1
                    texts[row] = within([*texts[row], token], length)
        return drawn

    @torch.no_grad()
    def _read(self, model: nn.Module, texts: list[list[int]]) -> Tensor:
        """Return logits [B, V] of the next tokens, fp64 on the CPU."""
        # A group of sequences shares the experts' capacity: it gets one text, the rest is padding.
        stride = sequences_per_group(self.config.model)
        rows = [row for text in texts for row in [text, *[[]] * (stride - 1)]]
        padded, real = padded_left(rows, max(map(len, rows)))
        device = next(model.parameters()).device
        documents = None
        if self.config.data.document_attention:
            found = Documents.of(padded, self.tokenizer.end_of_document, real)
            documents = found.moved(lambda part: part.to(device))
        token_mask = None if bool(real.all()) else real.to(device)
        output: LanguageModelOutput = model(padded.to(device), token_mask, documents=documents)
        return output.logits[::stride, -1].double().cpu()


def samples_of(config: Config) -> Samples | None:
    """Read what the samples of a run need; None if it has no prompts. Raises DataError."""
    prompts = config.evaluation.samples.prompts
    if not prompts:
        return None
    tokenizer = load_tokenizer(local_path(config.data, config.data.sources[0]) / TOKENIZER_FILE)
    tokenizer.encode_batch(prompts)
    return Samples(config, tokenizer)
