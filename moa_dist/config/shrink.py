"""Shrink a configuration: other sizes, the same choices, so that it runs in seconds.

Every field that is not a size stays as it is, including fields that this file does not know.
"""

from __future__ import annotations

from moa_dist.config.checks import check_fields
from moa_dist.config.model import ModelConfig
from moa_dist.config.routers import shrunk
from moa_dist.config.run import Config
from moa_dist.config.sequence_groups import sequences_per_group

_LENGTH = 16
_VOCABULARY, _D_MODEL = 64, 24
_LAYERS, _REPEATS = 2, 2
_MICRO_BATCH, _ACCUMULATION = 4, 2


def shrink(config: Config, world_size: int) -> Config:
    """Return the copy that is verified instead of `config`, which must fit `world_size` ranks.

    Sharding covers the same cases: an uneven number of experts stays uneven, a shared layer is
    applied twice, accumulation stays accumulation. Dropout is off, since each layout draws its
    own.
    """
    ep, train = config.parallel.expert_parallel, config.train
    groups = sequences_per_group(config.model)
    micro_batch = groups * min(_MICRO_BATCH, train.micro_batch // groups)
    accumulation = min(train.global_batch // (world_size * train.micro_batch), _ACCUMULATION)
    result = config.changed(
        model=_shrink_model(config.model, ep),
        data=config.data.changed(sequence_length=min(config.data.sequence_length, _LENGTH)),
        train=train.changed(
            micro_batch=micro_batch,
            global_batch=world_size * micro_batch * accumulation,
        ),
    )
    assert not check_fields(result), check_fields(result)
    return result


def _shrink_model(model: ModelConfig, ep: int) -> ModelConfig:
    distinct = model.num_distinct_layers or model.num_core_layers
    layers = min(distinct, _LAYERS)
    prelude, coda = min(model.prelude, 1), min(model.coda, 1)
    repeats, recursion = min(model.num_repeats, _REPEATS), model.recursion
    return model.changed(
        vocab_size=shrunk(model.vocab_size, _VOCABULARY),
        dropout=0.0,
        d_model=shrunk(model.d_model, _D_MODEL),
        num_layers=prelude + layers * repeats + coda,
        recursion=None if recursion is None else recursion.shrink(repeats),
        num_distinct_layers=None if model.num_distinct_layers is None else layers,
        prelude=prelude,
        coda=coda,
        prelude_ffn=None if model.prelude_ffn is None else model.prelude_ffn.shrink(ep),
        attention=model.attention.shrink(ep),
        ffn=model.ffn.shrink(ep),
    )
