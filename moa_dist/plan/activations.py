"""Bytes of what the forward pass keeps for the backward pass, on one rank, line by line.

One layer of the model, with embedding and head around it, is measured (`moa_dist.plan.measure`):
once for each micro-batch, and once more for each number of ranks that tokens are sent to.
`tests/plan/test_activations.py` compares the sum with what real tensors on a CPU keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import cache

import torch

from moa_dist.config.model import ModelConfig
from moa_dist.config.run import Config
from moa_dist.kernels.routed_experts import Hardware
from moa_dist.models.language_model import LanguageModel
from moa_dist.moe.routed_module import RoutedModule
from moa_dist.moe.router import Router
from moa_dist.plan.measure import INPUT, Forward, Saved, measure
from moa_dist.plan.terms import Factor, Term, term, total

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
_SMALL = 1e-3
"""Lines with a smaller share of all bytes are added up to one."""


class Activations:
    """Activations of a model in one type on one kind of hardware; remembers what was measured."""

    def __init__(
        self, config: ModelConfig, sequence_length: int, dtype: torch.dtype, hardware: Hardware
    ) -> None:
        """`hardware` is the planned one, which need not be in this machine."""
        self.hardware = hardware
        self.length, self._num_layers = sequence_length, config.num_layers
        self._element_bytes, self._vocabulary = dtype.itemsize, config.vocab_size
        self._model = _one_layer(config).to(dtype)
        self._measured = cache(self._measure)
        # By the prefix of its layer's modules, what their lines are called.
        self._stacks = {"stack.layers.0.": ""}
        if self._model.encoder is not None:
            self._stacks = {"encoder.layers.0.": "encoder: ", "stack.layers.0.": "decoder: "}

    def kept(
        self,
        sequences: int,
        *,
        recompute: bool = False,
        num_ranks: int = 1,
        exchanged: Collection[str] = (),
    ) -> list[Term]:
        """All that a forward keeps; with `recompute` also the one layer that is recomputed.

        `sequences` are those of a micro-batch. Tokens are sent to experts on `num_ranks` ranks in
        those parts of a layer that are `exchanged`, such as `ffn`. A model that translates has as
        many tokens of each text; its decoder's layer is the one that is recomputed.
        """
        here, away = self._measured(sequences, 1), self._measured(sequences, num_ranks)
        found = [
            *(saved for saved in here.saved if not _is_part_of(saved, exchanged)),
            *(saved for saved in away.saved if _is_part_of(saved, exchanged)),
        ]
        layers = ("layers", self._num_layers)
        lines, again = [], []
        for stack, title in self._stacks.items():
            kept = _cut(found, stack)
            if recompute:
                again = [saved for saved in kept if saved.where != INPUT]
                kept = [saved for saved in kept if saved.where == INPUT]
                kept += _cut(here.choices, stack)
            of_stack = self._lines(title, kept, sequences)
            lines += [line.times(*layers) for line in of_stack]
        outside = [s for s in found if not s.where.startswith(tuple(self._stacks))]
        lines += self._lines("recomputed: ", again, sequences)
        return [*lines, *self._lines("", outside, sequences)]

    def working(self, sequences: int) -> list[Term]:
        """Passing memory, beyond what is kept, of the hungriest operation: one line.

        Of logits a copy in fp32 and its gradient; of a routed projection, its rows wide, weighted,
        and in the type of an activation.
        """
        tokens, wide = ("tokens", sequences * self.length), max(self._element_bytes, 4)
        lines = [term("logits", tokens, ("vocabulary", self._vocabulary), ("B", 2 * wide))]
        for name, module in self._model.named_modules():
            for use in module.routed_projections() if isinstance(module, RoutedModule) else ():
                router = module.get_submodule(use.router)
                assert isinstance(router, Router)
                chosen = ("chosen", router.num_groups * router.config.top_k)
                rows_bytes = ("B", 2 * wide + self._element_bytes)
                name_of_line = f"{name.partition('.0.')[2]}: weighted rows"
                if use.weighted:
                    lines.append(
                        term(name_of_line, tokens, chosen, ("d_out", use.d_out), rows_bytes)
                    )
        return [max(lines, key=lambda line: line.value)]

    def _lines(self, title: str, found: Iterable[Saved], sequences: int) -> list[Term]:
        """A line for equal tensors of a module; small ones make one together."""
        counted = Counter(
            Term(title + saved.where, _factors(saved, sequences, self.length)) for saved in found
        )
        lines = [
            line if count == 1 else line.times("tensors", count) for line, count in counted.items()
        ]
        least = _SMALL * total(lines)
        small = sum(line.value for line in lines if line.value < least)
        rest = [term(f"{title}small tensors", ("B", small))] if small else []
        return [*(line for line in lines if line.value >= least), *rest]

    def _measure(self, sequences: int, num_ranks: int) -> Forward:
        return measure(self._model, sequences, self.length, self.hardware, num_ranks)


def _is_part_of(saved: Saved, parts: Collection[str]) -> bool:
    """Whether one of the modules around it is called so."""
    return not set(parts).isdisjoint(saved.where.split("."))


def _cut(found: Iterable[Saved], prefix: str) -> list[Saved]:
    """Those whose name begins so, without that beginning."""
    return [
        saved._replace(where=saved.where.removeprefix(prefix))
        for saved in found
        if saved.where.startswith(prefix)
    ]


def _factors(saved: Saved, sequences: int, length: int) -> tuple[Factor, ...]:
    """Its bytes as a product, by tokens if it has a row, or several, for each."""
    shape, numel, tokens = saved.shape, saved.shape.numel(), sequences * length
    width = shape[-1] if shape else 1
    factors: list[Factor] = [("rows", numel // width), ("width", width)]
    if shape and numel % tokens == 0 and (shape[0] == sequences or shape[0] % tokens == 0):
        rows, rest = divmod(numel // tokens, width)
        if rest or not rows:
            rows, width = 1, numel // tokens
        factors = [("tokens", tokens), ("rows", rows), ("width", width)]
    several = (factor for factor in factors if factor[1] != 1)
    return (*several, ("B", saved.element_bytes))


def activations_of(config: Config, hardware: Hardware) -> Activations:
    """Measure the model of a run in its precision."""
    dtype = _DTYPES[config.train.precision]
    return Activations(config.model, config.data.sequence_length, dtype, hardware)


def _one_layer(config: ModelConfig) -> LanguageModel:
    """The model with one layer, without memory for its parameters."""
    with torch.device("meta"):
        one = {"num_layers": 1, "num_distinct_layers": None}
        model = LanguageModel(config.model_copy(update=one))
    for module in model.modules():
        if isinstance(module, Router):
            # A micro-batch's sequences, as packed, need not divide into the routers' groups.
            module.config = module.config.model_copy(update={"group_sequences": 1})
    return model
