"""Memory that the forward pass of one rank keeps for the backward pass, line by line.

One layer of each kind, with embedding and head around it, is measured (`moa_dist.plan.measure`):
once for each micro-batch, and once more for each number of ranks that tokens are sent to.
`tests/plan/test_activations.py` compares the sum with what real tensors on a CPU keep.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from typing import NamedTuple

import torch

from moa_dist.config.model import ModelConfig
from moa_dist.config.run import Config
from moa_dist.config.sharing import SharingConfig
from moa_dist.kernels.hardware import Hardware
from moa_dist.models.language_model import LanguageModel, meta_model
from moa_dist.moe.routed_module import routed_modules
from moa_dist.moe.router import Router
from moa_dist.plan.measure import INPUT, Saved, measure_choices, measure_saved
from moa_dist.plan.terms import Factor, Term, term, total

_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}
_STACKS = ("encoder.layers.", "stack.layers.")
"""Prefixes of the modules of a model's layers."""
_SMALL = 1e-3
"""Lines below this share of all bytes are merged into one."""


class Activations:
    """Activations of a model in one type on one kind of hardware; caches measurements."""

    def __init__(
        self, config: ModelConfig, sequence_length: int, dtype: torch.dtype, hardware: Hardware
    ) -> None:
        """Plan for `hardware`, which this machine need not have."""
        self.hardware, self.length = hardware, sequence_length
        self._element_bytes, self._vocabulary = dtype.itemsize, config.vocab_size
        self._layers = [
            _MeasuredLayer(kind, dtype, hardware) for kind in _kinds_of_layers(config, self.length)
        ]
        recursion, self._d_model = config.recursion, config.d_model
        self._rows_between = 0  # of a sequence, which recursions keep outside of layers
        if recursion is not None:
            self._rows_between = recursion.rows_kept(config.num_repeats, self.length)
        self._weighted_rows = [rows for layer in self._layers for rows in layer.weighted_rows()]
        self._kept = cache(self._lines_kept)  # many layouts have lines in common

    def kept(
        self,
        sequences: int,
        *,
        recompute: frozenset[str] = frozenset(),
        num_ranks: int = 1,
        exchanged: Collection[str] = (),
    ) -> list[Term]:
        """List all that a forward keeps, and the layer or part being recomputed if any is.

        `sequences` is the size of a micro-batch. Tokens are sent to experts on `num_ranks` ranks in
        the parts of a layer that are `exchanged`, such as `ffn`. For translation, both texts have
        the same number of tokens, and the layer being recomputed is one of the decoder.
        """
        ranks = num_ranks if exchanged else 1
        return list(self._kept(sequences, recompute, ranks, frozenset(exchanged)))

    def working(self, sequences: int) -> list[Term]:
        """Estimate temporary memory of the largest operation, beyond what is kept, as one line.

        The loss needs a copy of the logits in fp32 and its gradient; a routed projection needs its
        results until they are summed.
        """
        tokens, wide = ("tokens", sequences * self.length), max(self._element_bytes, 4)
        lines = [term("logits", tokens, ("vocabulary", self._vocabulary), ("B", 2 * wide))]
        for name, chosen, d_out in self._weighted_rows:
            element = ("B", self._element_bytes)
            factors = (tokens, ("chosen", chosen), ("d_out", d_out), element)
            lines.append(term(f"{name}: results", *factors))
        return [max(lines, key=lambda line: line.value)]

    def _lines_kept(
        self, sequences: int, recompute: frozenset[str], num_ranks: int, exchanged: frozenset[str]
    ) -> list[Term]:
        every, lines = [], []
        again: list[Term] = []
        for layer in self._layers:
            found = layer.saved_lines(sequences, num_ranks, exchanged)
            lean = found
            if "experts" in recompute:
                lean = layer.saved_lines(sequences, num_ranks, exchanged, recompute_experts=True)
            between, recomputed = layer.lines_kept(found, lean, sequences, recompute)
            lines += between
            again = max(again, recomputed, key=total)
            every.append(found)
        lines += [Term(f"recomputed: {line.name}", line.factors) for line in again]
        if self._rows_between:
            rows = ("rows", sequences * self._rows_between)
            width, element = ("width", self._d_model), ("B", self._element_bytes)
            lines.append(term("between recursions", rows, width, element))
        outside = [line for line in every[0] if not line.name.startswith(_STACKS)]
        return [*lines, *_without_small(outside)]


class _Kind(NamedTuple):
    """A kind of layer."""

    title: str
    """What precedes the names of its lines."""
    model: ModelConfig
    """A model that is measured, which has such a layer."""
    number: int
    """Applications of such layers."""
    length: int
    """Tokens of a sequence that they compute."""
    layer: int = 0
    """Which layer of the model it is."""


class _MeasuredLayer:
    """A kind of layer, measured in a model of one such layer with embedding and head around it."""

    def __init__(
        self,
        kind: _Kind,
        dtype: torch.dtype,
        hardware: Hardware,
    ) -> None:
        """Prepare to measure a kind of layer."""
        self._number, self._length, self._hardware = kind.number, kind.length, hardware
        self._model = _few_layers(kind.model).to(dtype)
        self._parts = {f"{name}.": module.part for name, module in routed_modules(self._model)}
        self._saved, self._choices = cache(self._measure_saved), cache(self._measure_choices)
        # By the prefix of its layer's modules, what their lines are called.
        of_encoder, of_stack = (f"{stack}{kind.layer}." for stack in _STACKS)
        self._stacks = {of_stack: kind.title}
        if self._model.encoder is not None:
            names = (f"encoder: {kind.title}", f"decoder: {kind.title}")
            self._stacks = dict(zip((of_encoder, of_stack), names, strict=True))

    def weighted_rows(self) -> Iterator[tuple[str, int, int]]:
        """Yield module, rows per token and width of each projection that a router weights."""
        return _weighted_rows(self._model)

    def saved_lines(
        self,
        sequences: int,
        num_ranks: int,
        exchanged: frozenset[str],
        *,
        recompute_experts: bool = False,
    ) -> list[Term]:
        """List all that the forward of the model of one layer saves."""
        here = self._saved(sequences, 1, recompute_experts)
        found = [line for line in here if self._part_of(line) not in exchanged]
        if exchanged:
            away = self._saved(sequences, num_ranks, recompute_experts)
            found += [line for line in away if self._part_of(line) in exchanged]
        return found

    def lines_kept(
        self, found: list[Term], lean: list[Term], sequences: int, recompute: frozenset[str]
    ) -> tuple[list[Term], list[Term]]:
        """Return what all such layers keep, and what the part being recomputed does.

        `found` is what a layer saves, and `lean` what it does if experts are recomputed. What is
        recomputed is the largest part, of the decoder for translation.
        """
        lines: list[Term] = []
        again: list[Term] = []
        if not self._number:
            return lines, again
        for stack, title in self._stacks.items():
            of_layer = _cut(found, stack)
            choices = _cut(self._choices(sequences), stack) if recompute else []
            if "block" in recompute:
                again = [line for line in of_layer if line.name != INPUT]
                of_layer = [line for line in of_layer if line.name == INPUT] + choices
            elif recompute:
                of_layer, parts = _without_parts(of_layer, _cut(lean, stack), choices, recompute)
                again = max(parts, key=total)
            lines += [
                Term(title + line.name, line.factors).times("layers", self._number)
                for line in _without_small(of_layer)
            ]
        return lines, _without_small(again)

    def _part_of(self, line: Term) -> str | None:
        """Return the part of a layer with experts that keeps a tensor, if any."""
        within = (part for name, part in self._parts.items() if f"{line.name}.".startswith(name))
        return next(within, None)

    def _measure_saved(self, sequences: int, num_ranks: int, recompute_experts: bool) -> list[Term]:
        saved = measure_saved(
            self._model,
            sequences,
            self._length,
            self._hardware,
            num_ranks,
            recompute_experts=recompute_experts,
        )
        return _lines(saved, sequences, self._length)

    def _measure_choices(self, sequences: int) -> list[Term]:
        saved = measure_choices(self._model, sequences, self._length)
        return _lines(saved, sequences, self._length)


def _without_parts(
    found: list[Term], lean: list[Term], choices: list[Term], recompute: frozenset[str]
) -> tuple[list[Term], list[list[Term]]]:
    """Return what a layer keeps if parts of it are recomputed, and what each of them saves then."""
    kept, again = [line for line in found if not _is_in(line, *_WITHIN.values())], []
    for part, prefixes in _WITHIN.items():
        of_part, of_lean = (
            [line for line in lines if _is_in(line, prefixes)] for lines in (found, lean)
        )
        if part in recompute:
            kept += [line for line in choices if _is_in(line, prefixes)]
            again.append(of_part)
        elif "experts" in recompute:
            kept += of_lean
            again.append([term(f"{part}.experts", ("B", total(of_part) - total(of_lean)))])
        else:
            kept += of_part
    return kept, again


_WITHIN = {"attention": ("attention", "cross"), "ffn": ("ffn",)}
"""What names of modules of a layer begin with, by the part that they belong to."""


def _is_in(line: Term, *prefixes: tuple[str, ...]) -> bool:
    return line.name.startswith(sum(prefixes, ()))


def _kinds_of_layers(config: ModelConfig, length: int) -> list[_Kind]:
    """Return each kind of layer: those that repeat, of each recursion, first and last ones.

    The first kind computes whole sequences, though there may be no such layer. The first of those
    that repeat takes no state from the one before, so that where layers hand on any it is a kind of
    its own.
    """
    one = config.model_copy(
        update={
            "num_layers": 1,
            "num_distinct_layers": None,
            "prelude": 0,
            "prelude_ffn": None,
            "coda": 0,
            "recursion": None,
        }
    )
    once = one.model_copy(update={"sharing": SharingConfig(), "halting": None})
    first = once.model_copy(update={"ffn": config.prelude_ffn or config.ffn})
    hands_on = config.halting is not None or any(r.is_recurrent for r in config.routers().values())
    if config.recursion is not None:
        kinds = [_Kind("", one, 0, length)]
        number = config.num_core_layers // config.num_repeats
        for r, num in enumerate(config.recursion.lengths(config.num_repeats, length)):
            kinds.append(_Kind(f"recursion {r}: ", one, number, num))
    elif not hands_on or config.num_core_layers == 1:
        kinds = [_Kind("", one, config.num_core_layers, length)]
    else:
        # What the layer in the middle is handed counts as its own, what it hands on does not.
        three = one.model_copy(update={"num_layers": 3})
        later = _Kind("", three, config.num_core_layers - 1, length, layer=1)
        kinds = [later, _Kind("first: ", three, 1, length)]
    for title, model, number in (
        ("prelude: ", first, config.prelude),
        ("coda: ", once, config.coda),
    ):
        known = [(kind.model, kind.length) for kind in kinds]
        if (model, length) in known:
            i = known.index((model, length))
            kinds[i] = kinds[i]._replace(number=kinds[i].number + number)
        elif number:
            kinds.append(_Kind(title, model, number, length))
    return kinds


def _cut(lines: Iterable[Term], prefix: str) -> list[Term]:
    """Select the tensors whose name has a prefix, and remove the prefix."""
    return [
        Term(line.name.removeprefix(prefix), line.factors)
        for line in lines
        if line.name.startswith(prefix)
    ]


def _without_small(lines: list[Term]) -> list[Term]:
    """Merge small lines into one, keeping the sum."""
    least = _SMALL * total(lines)
    small = sum(line.value for line in lines if line.value < least)
    rest = [term("small tensors", ("B", small))] if small else []
    return [*(line for line in lines if line.value >= least), *rest]


def _lines(found: Iterable[Saved], sequences: int, length: int) -> list[Term]:
    """Describe equal tensors of a module in one line."""
    counted = Counter(Term(saved.where, _factors(saved, sequences, length)) for saved in found)
    return [line if n == 1 else line.times("tensors", n) for line, n in counted.items()]


def _factors(saved: Saved, sequences: int, length: int) -> tuple[Factor, ...]:
    """Write the bytes of a tensor as a product, per token if it has rows for each token."""
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


def _few_layers(config: ModelConfig) -> LanguageModel:
    """Build a model of few layers on the meta device."""
    model = meta_model(config)
    for module in model.modules():
        if isinstance(module, Router):
            # A micro-batch's sequences, as packed, need not divide into the routers' groups.
            module.config = module.config.model_copy(update={"group_sequences": 1})
    return model


def _weighted_rows(model: LanguageModel) -> Iterator[tuple[str, int, int]]:
    """Yield module, rows per token and width of each projection that a router weights."""
    for name, module in routed_modules(model):
        for projection in module.routed_projections():
            router = module.router_of(projection)
            if projection.weighted:
                chosen = router.num_groups * router.config.experts_per_token(training=True).most
                of_layer = name.partition(".layers.")[2].partition(".")[2]
                yield of_layer, chosen, projection.d_out
