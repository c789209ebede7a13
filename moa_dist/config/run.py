"""Everything about a run but the model: data, layout, optimisation, what is written when."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from moa_dist.config.model import ModelConfig
from moa_dist.config.section import Section


class DataConfig(Section):
    """Prepared shards to train and validate on (see `moa-dist prepare`)."""

    train: str
    """Folder with the training shards and their manifest."""
    valid: str | None = None
    """Folder with the validation shards; absent means no validation."""
    sequence_length: PositiveInt
    """Tokens per sequence; must be the block length that the shards were prepared with."""
    bucket_tokens: PositiveInt = 4096
    """Translation: a sample is a bucket, of pairs of similar length, and this is the most tokens
    of a bucket: its pairs times its longest text, padding included. Rather than `train.micro_batch`
    raise this: several buckets of one micro-batch are padded to the longest text of all."""
    readers: PositiveInt = 8
    """Shards read side by side by all ranks together. The number of ranks must divide it; the
    order of samples depends on it, and on nothing else of the layout. Not for translation, where
    every rank holds all pairs in memory."""
    workers: NonNegativeInt = 1
    """Background processes per rank that read ahead; 0 reads in the training process. Not for
    translation."""
    seed: NonNegativeInt = 0
    """Seed of the sample order."""
    verify: Literal["sizes", "checksums"] = "sizes"
    """What is checked before the first step: that every shard has its size, or all that it
    holds, which reads the whole data once, each rank a share. In both cases a shard is also
    checked in full whenever it is opened, and damage found then stops the run."""
    on_damage: Literal["stop", "skip"] = "stop"
    """When damaged training shards are found before the first step: `stop` names them, `skip`
    leaves them out of the order, the same on every rank, and says which. `skip` needs
    `verify: checksums`: damage found later stops the run, and its next start leaves it out.
    Validation shards are never left out, since results would no longer compare."""


class ExpertExchangeConfig(Section):
    """What travels between the ranks that share one set of experts; results agree to rounding.

    `tokens` sends rows to the ranks of their experts and sums back, in every repeat of a layer.
    `weights` gathers all experts' weights on every rank once per forward, for all repeats of a
    shared layer, and reduces their gradients once. Stored shards, optimizer state and checkpoints
    are the same for both. `auto` takes what costs less by `parallel.network`, as long as memory
    allows, and says why; `moa-dist plan` shows both costs.
    """

    attention: Literal["tokens", "weights", "auto"] = "tokens"
    """For the experts of attention layers."""
    ffn: Literal["tokens", "weights", "auto"] = "tokens"
    """For the experts of feed-forward layers."""


class NetworkConfig(Section):
    """What is assumed of the links between ranks, where a choice or a prediction needs it."""

    bandwidth_gb: PositiveFloat = 50.0
    """GB (10^9 bytes) that a rank sends to others in a second: about 50 through a 400 Gb/s adapter
    per GPU, several hundred inside a node with NVLink, 1 to 2 between processes through gloo."""
    latency_us: NonNegativeFloat = 20.0
    """Microseconds that a collective takes however little it carries."""


class ParallelConfig(Section):
    """How parameters are laid out over the W ranks."""

    expert_parallel: PositiveInt = 1
    """Ranks that share one set of experts (ep), attention and FFN experts alike; the
    remaining factor W / ep holds copies (edp). Must divide W."""
    expert_exchange: ExpertExchangeConfig = ExpertExchangeConfig()
    """What travels between them."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether rows and weights travel while other things are computed: queries and keys beside
    rows, earlier layers beside weights. The result is the same. `auto` is on with NCCL and off
    with gloo, where on 2 cores it gained nothing with tokens and 8 % with weights."""
    network: NetworkConfig = NetworkConfig()
    """What is assumed of the links."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What ZeRO partitions: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters.
    Dense state is partitioned over all W ranks, expert state over the edp ranks."""


class OptimizerConfig(Section):
    """The optimizer and its constant hyper-parameters."""

    kind: Literal["adamw", "sgd"] = "adamw"
    """Which optimizer."""
    lr: PositiveFloat = 2.5e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay (AdamW) or L2 (SGD), on every parameter as in MoEUT."""
    clip_norm: PositiveFloat | None = 0.25
    """Global gradient norm limit over dense and expert parameters together; null for none."""


class ScheduleConfig(Section):
    """Learning rate over steps, relative to `optimizer.lr`."""

    kind: Literal["constant", "cosine", "inverse_sqrt"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    warmup_start: NonNegativeFloat = 0.0
    """Share of the peak at step 0 of the warm-up."""
    final: NonNegativeFloat = 0.1
    """Share of the peak that the cosine ends on."""


class TrainConfig(Section):
    """The training loop."""

    steps: PositiveInt
    """Optimizer steps."""
    global_batch: PositiveInt
    """Sequences (translation: buckets of pairs) per optimizer step, over all ranks."""
    micro_batch: PositiveInt
    """Sequences (or buckets) per rank in one forward and backward. Gradients are accumulated over
    `global_batch / (W * micro_batch)` micro-batches."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of every target's probability that is spread evenly over the vocabulary, in training
    (Szegedy et al. 2015, section 7). The reported training loss includes it, validation does
    not."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """`bf16` computes in bfloat16 over fp32 master weights; `fp64` is for verification."""
    deterministic: bool = False
    """Two runs of one layout on the same GPUs give the same bits. Sums of rows then go by sorting
    instead of atomic additions, so this costs speed; on CPUs it is so anyway and costs nothing."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass to save memory."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of expert dropout."""
    step_limit: PositiveFloat | None = 300.0
    """Seconds in which a step must end, reading its data included. If one does not, every rank
    writes where it stands, the rank for which the others wait is named, and the job ends; absent
    means that only `moa-dist hang` asks. A collective fails after ten minutes in any case."""
    on_bad_step: Literal["stop", "skip", "rewind"] = "stop"
    """What to do when the loss or the gradient norm is not finite, or the loss spikes. The step is
    never applied. `stop` ends the run; `skip` takes the same step with the next samples; `rewind`
    goes back to the newest checkpoint, and on from there with the samples after the offending ones.
    The samples of no effect are listed in every later checkpoint."""
    bad_step_limit: PositiveInt = 10
    """Bad steps, or rewinds, in a row that end the run after all."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss of more than so many times the median of the last 100 steps is bad as well; absent
    means that no finite loss is."""


class EvaluationConfig(Section):
    """Validation during training."""

    every: PositiveInt = 500
    """Steps between validations; the last step is always validated."""
    sequences: PositiveInt | None = None
    """Validation sequences to use, from the first; absent means all."""


class LoggingConfig(Section):
    """What is reported while training."""

    every: PositiveInt = 10
    """Steps between console lines and TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard events into the run's folder."""


class ProfileConfig(Section):
    """Looking at single steps."""

    steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step of a trace, at most ten; absent means none. It goes to
    `RUN/profile/rank-N.json.gz`, with the time per part in the log and in the report."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write one."""
    memory: bool = False
    """Remember where GPU memory was allocated, for the snapshot that is written when it does not
    suffice; costs some speed."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Older checkpoints are deleted."""
    keep_every: PositiveInt | None = None
    """Those of every so many steps are kept for good; absent means none."""
    asynchronous: bool = True
    """Training waits only for a copy to host memory, while a thread writes the files; `false`
    waits for those as well, and saves no memory."""
    on_failure: Literal["stop", "continue"] = "stop"
    """When a checkpoint cannot be written (a full disk): `stop` ends the run, `continue` notes
    it and trains on. The checkpoints before stay as they are, and a run whose last one is not
    there ends with an error in either case."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the run folder's newest valid checkpoint, if there is any; `never`
    refuses a folder that has one."""


class Config(Section):
    """A whole run."""

    name: str
    """Name of the run."""
    output: str = "runs"
    """Folder in which the run's folder, named `name`, is made."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """The data."""
    parallel: ParallelConfig = ParallelConfig()
    """The layout."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate schedule."""
    train: TrainConfig
    """The loop."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Validation."""
    logging: LoggingConfig = LoggingConfig()
    """Reports."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    profile: ProfileConfig = ProfileConfig()
    """Traces."""


def tokens_per_sample(config: Config) -> int:
    """Of a bucket of pairs the most, for source and target each."""
    if config.model.objective == "translation":
        return config.data.bucket_tokens
    return config.data.sequence_length


def run_folder(config: Config) -> Path:
    """Where a run keeps its checkpoints, curves, logs and configuration."""
    return Path(config.output) / config.name
