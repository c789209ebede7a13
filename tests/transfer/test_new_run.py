"""A run that consists of weights may still choose its data; one that has read some may not."""

import pytest

from moa_dist.config.layout_checks import WORLD_SIZE
from moa_dist.config.model import ModelConfig
from moa_dist.errors import ConfigError
from moa_dist.models.language_model import build_model
from moa_dist.train.check_run import check_run
from tests.small_shards import write_folder
from tests.transfer.runs import make_run
from tests.transfer.test_upcycle import DENSE


def test_the_order_of_samples_is_free_until_one_was_read(tmp_path):
    manifest = write_folder(tmp_path / "data")
    run = tmp_path / "runs/one"
    config = make_run(run, build_model(ModelConfig.model_validate(DENSE)))
    (run / "tokenizer.json").unlink()  # else data of another would be refused, rightly
    data = {
        "train": str(tmp_path / "data"),
        "sequence_length": manifest.block_length,
        "seed": 3,
        "readers": 4,
    }
    config = config.model_copy(update={"data": config.data.model_copy(update=data)})
    check_run(config, world_size=1)
    index = run / "step-00000000/checkpoint.json"
    index.write_text(index.read_text().replace('"samples": 0', '"samples": 8'))
    with pytest.raises(ConfigError, match=r"data\.readers 8 [\s\S]*data\.seed 0 "):
        check_run(config, world_size=1)
    index.write_text(index.read_text().replace('"samples": 8', '"samples": 9'))
    train = config.train.model_copy(update={"global_batch": 4, "micro_batch": 2})
    with pytest.raises(ConfigError, match=r"\b9 samples.*\b2 ranks") as refused:
        check_run(config.model_copy(update={"train": train}), world_size=2)
    ranks, *others = refused.value.problems  # all at once
    assert ranks.suggestions == {WORLD_SIZE: [1]}
    assert all(key in "".join(map(str, others)) for key in ("data.readers", "data.seed"))
    dense = index.read_text().replace('"objective": "causal"', '"objective": "masked"')
    index.write_text(dense)
    with pytest.raises(ConfigError, match=r"model\.objective.* masked "):
        check_run(config, world_size=1)
