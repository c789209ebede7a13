"""What a run does before its first step, once."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import create_autospec, patch

import torch
import torch.distributed as dist

from moa_dist.config.run import Config
from moa_dist.distributed.preemption import Preemption
from moa_dist.distributed.start import DistContext
from moa_dist.models.counts import count
from moa_dist.models.language_model import LanguageModel
from moa_dist.observe.metrics import Observer, RunStart
from moa_dist.train.startup import open_run
from tests.distributed.layouts import Case
from tests.small_shards import write_folder


def config_of(folder: Path) -> Config:
    """Two ranks that share experts and have to find out how."""
    fields = Case(expert_parallel=2, exchange="auto").config().model_dump()
    manifest = write_folder(folder / "data")
    fields["model"]["vocab_size"] = manifest.vocab_size
    fields["data"] |= {"train": str(folder / "data"), "sequence_length": manifest.block_length}
    fields["output"] = str(folder)
    return Config.model_validate(fields)


def start(config: Config) -> tuple[int, RunStart | None]:
    """On every rank: how many models were built, and what was reported on rank 0."""
    built = []
    initialize = LanguageModel.__init__

    def counted(self, *args, **keywords) -> None:
        built.append(self)
        initialize(self, *args, **keywords)

    observer = create_autospec(Observer, instance=True)
    context = DistContext(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo")
    with (
        patch.object(LanguageModel, "__init__", counted),
        patch("moa_dist.train.startup.init_distributed", lambda: nullcontext(context)),
        open_run(config, observer, Preemption()),
    ):
        pass
    reported = observer.start.call_args
    return len(built), None if reported is None else reported.args[0]


def test_one_model_is_built_to_count_to_decide_and_to_train(pools, tmp_path):
    """On the meta device each costs seconds at full size, on every rank."""
    config = config_of(tmp_path)
    (first, run_start), (second, silent) = pools(2).run(start, config)
    assert (first, second) == (1, 1)
    assert silent is None
    counts = count(config.model, config.data.sequence_length)
    assert run_start.num_parameters == counts.total
    assert run_start.num_active_parameters == counts.training.active
    assert run_start.exchange.keys() == {"attention", "ffn"}
