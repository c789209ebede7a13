"""Sections of a run other than model and data: layout, optimization, logging, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)

from moa_dist.config.data import DataConfig
from moa_dist.config.model import ModelConfig
from moa_dist.config.recompute import Recompute
from moa_dist.config.section import MAY_CHANGE, FolderPath, Section


class ExpertExchangeConfig(Section):
    """What is sent between the ranks that share one set of experts; results agree to rounding.

    `tokens` sends rows to the ranks of their experts and returns sums, in every repeat of a layer.
    `weights` gathers all experts' weights on every rank once per forward, for all repeats of a
    shared layer, and reduces their gradients once. Parameter shards, optimizer state and
    checkpoints are the same for both. `auto` chooses the cheaper one according to
    `parallel.network`, if memory allows, and logs the reason; `moa-dist plan` shows both costs.
    """

    attention: Literal["tokens", "weights", "auto"] = "tokens"
    """Exchange for the experts of attention layers."""
    ffn: Literal["tokens", "weights", "auto"] = "tokens"
    """Exchange for the experts of feed-forward layers."""


class NetworkConfig(Section):
    """Assumed speed of the links between ranks, for choices and predictions."""

    bandwidth_gb: PositiveFloat = 50.0
    """GB (10^9 bytes) per second that a rank sends: about 50 with a 400 Gb/s adapter per GPU,
    several hundred within a node with NVLink, 1 to 2 between processes over gloo."""
    latency_us: NonNegativeFloat = 20.0
    """Microseconds that a collective takes regardless of its size."""


class ParallelConfig(Section):
    """Layout of parameters and computation over the W ranks."""

    expert_parallel: PositiveInt = 1
    """Ranks that share one set of experts (ep), for attention and FFN alike; the remaining factor
    W / ep holds copies (edp). Must divide W."""
    expert_exchange: ExpertExchangeConfig = ExpertExchangeConfig()
    """What these ranks send each other."""
    overlap: Literal["auto", "on", "off"] = "auto"
    """Whether communication overlaps computation: rows with queries and keys, weights with earlier
    layers. The result is the same. `auto` is on with NCCL and off with gloo, where on 2 cores it
    gained nothing with tokens and 8 % with weights."""
    network: NetworkConfig = NetworkConfig()
    """Assumed speed of the links."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    """What ZeRO partitions: 0 nothing, 1 optimizer state, 2 and gradients, 3 and parameters.
    Dense state is partitioned over all W ranks, expert state over the edp ranks."""


class OptimizerConfig(Section):
    """The optimizer and its constant hyper-parameters."""

    kind: Literal["adamw", "muon", "sgd"] = "adamw"
    """Which optimizer. `muon` orthogonalizes the updates of the weight matrices in layers, of each
    expert by itself; routers, embeddings, head, norms and biases use AdamW."""
    lr: PositiveFloat = 2.5e-4
    """Peak learning rate, of Muon and AdamW alike."""
    router_lr: PositiveFloat = 1.0
    """Learning rate of routers, relative to `lr`."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates."""
    eps: PositiveFloat = 1e-8
    """AdamW's denominator offset."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """SGD's momentum."""
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: NonNegativeFloat = 0.01
    """Decoupled decay (AdamW, Muon) or L2 (SGD)."""
    decay: Literal["all", "matrices"] = "all"
    """What decays: every parameter, as in MoEUT, or all but norms and biases."""
    clip_norm: PositiveFloat | None = 0.25
    """Maximum gradient norm over dense and expert parameters together; null for no limit."""
    offload: Annotated[Literal["none", "host"], MAY_CHANGE] = "none"
    """Where ZeRO 1 to 3 keep the fp32 weights and the moments, and update them. `host` takes them
    off the GPU, into the memory of its node: slower, for models that do not fit otherwise. The
    result is the same to rounding. Not for `muon`, whose products would run on the CPU."""


DecayShape = Literal["linear", "sqrt", "cosine"]
"""How a learning rate goes from one value to another; `sqrt` has gone sqrt(progress) of the way
(Haegele et al. 2024)."""


class PhaseConfig(Section):
    """A stretch of steps over which the learning rate goes from where it is to another value."""

    steps: PositiveInt | None = None
    """How many; null, which one phase may have, for all that the others leave of `train.steps`."""
    to: Annotated[float, Field(ge=0, le=1)]
    """Fraction of `optimizer.lr` at the end. The rate stays where the phase before ended there."""
    shape: DecayShape = "linear"
    """How it goes there."""


class ScheduleConfig(Section):
    """Learning rate over steps, relative to `optimizer.lr`."""

    kind: Literal["constant", "cosine", "inverse_sqrt", "wsd", "phases"] = "cosine"
    """Shape after the warm-up. `wsd` (warm-up, stable, decay) stays at the peak until the last
    `decay_steps` steps; `phases` are free, and the first of them is the warm-up."""
    phases: tuple[PhaseConfig, ...] = ()
    """Phases one after the other, as several peaks need them; the rate stays after the last."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up."""
    warmup_start: NonNegativeFloat = 0.0
    """Fraction of the peak at step 0 of the warm-up, or of the first of `phases`."""
    final: NonNegativeFloat = 0.1
    """Fraction of the peak at the end of the cosine or of the decay."""
    decay_steps: NonNegativeInt = 0
    """Steps of the decay of `wsd`, which ends at `train.steps`. A run that is continued from an
    earlier checkpoint with other steps decays later, or earlier."""
    decay_shape: DecayShape = "sqrt"
    """Shape of that decay."""


class TrainConfig(Section):
    """The training loop."""

    steps: Annotated[PositiveInt, MAY_CHANGE]
    """Optimizer steps."""
    global_batch: Annotated[PositiveInt, MAY_CHANGE]
    """Sequences (translation: buckets of pairs) per optimizer step, over all ranks."""
    micro_batch: Annotated[PositiveInt, MAY_CHANGE]
    """Sequences (or buckets) per rank in one forward and backward. Gradients are accumulated over
    `global_batch / (W * micro_batch)` micro-batches."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of every target's probability that is spread evenly over the vocabulary in training
    (Szegedy et al. 2015, section 7). The reported training loss includes it, validation does
    not."""
    z_loss: NonNegativeFloat = 0.0
    """Coefficient of the mean squared logsumexp of the head's logits, over the targets (PaLM:
    1e-4). It is reported as `logits/z_loss`; the reported training loss does not include it."""
    precision: Literal["fp32", "tf32", "bf16", "fp64"] = "fp32"
    """`bf16` computes in bfloat16 over fp32 master weights; `fp64` is for verification. `tf32` is
    fp32 whose products run on the tensor cores of GPUs, with factors rounded to 10 bits; `fp32`
    never rounds them."""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """Make two runs of one layout on the same GPUs equal to the bit, by torch's deterministic
    operations, which may be slower; on CPUs runs are always equal."""
    recompute: Annotated[Recompute, MAY_CHANGE] = False
    """Compute activations again in the backward pass instead of keeping them: true for those of
    whole layers, or a list of `attention` and `ffn`, with the norms around them, and `experts`, the
    products within routed experts (not by torch's kernels for fp64 and without Triton). It saves
    memory, and the result is the same. `moa-dist plan --gpus` lists what a layout needs to fit."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile each block by `torch.compile`, as one graph, for training; the first step takes
    minutes. Not with `recompute`, `data.document_attention` or recursion of kind `token_choice`,
    at ZeRO 3, or where ranks exchange tokens."""
    seed: NonNegativeInt = 0
    """Seed of the initial weights and of expert dropout."""
    step_limit: Annotated[PositiveFloat | None, MAY_CHANGE] = 300.0
    """Maximum duration of a step in seconds, reading its data included. If a step exceeds it, every
    rank writes its stack, the rank that the others wait for is named, and the job ends. null for
    no limit; `moa-dist hang` then shows where ranks are. A collective times out after ten minutes
    in any case."""
    on_bad_step: Annotated[Literal["stop", "skip", "rewind"], MAY_CHANGE] = "stop"
    """What to do when the loss or the gradient norm is not finite, or the loss spikes. The step is
    never applied. `stop` ends the run; `skip` repeats the step with the next samples; `rewind`
    loads the newest checkpoint and continues with the samples after the offending ones. The samples
    without effect are listed in every later checkpoint."""
    bad_step_limit: Annotated[PositiveInt, MAY_CHANGE] = 10
    """Number of consecutive bad steps, or rewinds, that ends the run."""
    spike_factor: Annotated[Annotated[float, Field(gt=1)] | None, MAY_CHANGE] = None
    """A step is also bad if its loss is more than this many times the median of the last 100 steps;
    null accepts any finite loss."""


class SamplesConfig(Section):
    """Texts that the model continues during training."""

    prompts: tuple[str, ...] = ()
    """Beginnings of texts; an empty one starts a document. Without any, there are no samples."""
    every: PositiveInt = 500
    """Steps between samples; the last step is always followed by some."""
    tokens: PositiveInt = 64
    """New tokens per prompt, at most. Each costs a forward on every rank."""
    temperature: NonNegativeFloat = 0.8
    """Divisor of the logits; 0 always takes the most probable token."""
    top_k: PositiveInt | None = None
    """Draw from so many most probable tokens; null for all."""
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Draw from the fewest tokens whose probabilities add up to this."""
    seed: NonNegativeInt = 0
    """Seed of the draws, which are the same at every step."""


class EvaluationConfig(Section):
    """Validation during training."""

    every: PositiveInt = 500
    """Steps between validations; the last step is always followed by one."""
    sequences: PositiveInt | None = None
    """Number of validation sequences, counted from the first; null for all."""
    tasks: tuple[str, ...] = ()
    """Zero-shot tasks to score with every validation, each as `NAME=PATH` like those of
    `moa-dist eval --tasks`: `[lambada=eval/lambada.jsonl, blimp=eval/blimp]`."""
    samples: SamplesConfig = SamplesConfig()
    """Texts that the model continues, with or without validation."""


class LoggingConfig(Section):
    """Reports during training."""

    every: PositiveInt = 10
    """Steps between console lines, records in `metrics.jsonl` and points of all trackers."""
    parts_every: PositiveInt | None = 100
    """Reported steps that are multiples of this also report gradient norm and relative update of
    dense parameters, attention experts, FFN experts and routers. Such a step holds a second copy of
    the weights that a rank updates. null for none."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where curves are shown, other than in `metrics.jsonl`. `tensorboard` writes to the run's
    folder; `wandb` follows WANDB_MODE, WANDB_BASE_URL and WANDB_API_KEY, and `mlflow`
    MLFLOW_TRACKING_URI, in the environment of rank 0. A server that cannot be reached never stops
    training."""
    project: str = "moa-dist"
    """Project of wandb, or experiment of MLflow."""
    tags: tuple[str, ...] = ()
    """Tags of the run in wandb and MLflow."""


class ProfileConfig(Section):
    """Traces of single steps."""

    steps: tuple[PositiveInt, PositiveInt] | None = None
    """First and last step of a trace, at most ten; null for no trace. It is written to
    `RUN/profile/rank-N.json.gz`, with the time per part in the log and in the report."""
    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write a trace."""
    memory: bool = False
    """Record where GPU memory is allocated, for the snapshot that is written when it runs out;
    costs some speed."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: PositiveInt = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep_last: PositiveInt = 2
    """Number of newest checkpoints to keep; older ones are deleted."""
    keep_every: PositiveInt | None = None
    """Checkpoints at multiples of this many steps are never deleted; null for none."""
    asynchronous: bool = True
    """Whether a thread writes the files, while training waits only for a copy to host memory.
    `false` waits for the files as well; it saves no memory."""
    on_failure: Literal["stop", "continue"] = "stop"
    """What to do when a checkpoint cannot be written (a full disk): `stop` ends the run, `continue`
    logs it and keeps training. Earlier checkpoints are unaffected, and a run without its last one
    ends with an error in either case."""
    resume: Literal["auto", "never"] = "auto"
    """`auto` continues from the newest valid checkpoint in the run's folder, if any; `never`
    rejects a folder that has one."""
    allow_changes: tuple[str, ...] = ()
    """Fields, or whole sections, that may differ from the checkpoint that a run continues from,
    such as `[model.ffn.activation, optimizer]`. They make another model or another run, so a change
    is refused unless it is named here; `data.train` stands for other data, and for other sources
    or weights. Layout, micro- and global batch, number of steps, validation, logging and
    checkpoints may always change. Every change is logged and recorded in later checkpoints."""


class InitConfig(Section):
    """What a new run starts from, instead of random weights; without effect once it has saved."""

    weights: str | None = None
    """Checkpoint, export, or run (its newest checkpoint) whose weights the run starts from, at step
    0 and on its own data: to fine-tune, or for a second phase."""
    new: tuple[str, ...] = ()
    """Parameters that start with initial weights nevertheless, as names or patterns
    (`stack.layers.*.ffn.router.*`): those that `weights` lacks or holds in another shape."""
    unused: tuple[str, ...] = ()
    """Parameters in `weights` that the model does not have, as names or patterns."""
    branch: str | None = None
    """Checkpoint, or run, whose whole state the run continues in a folder of its own: weights,
    moments, steps and samples."""


class Config(Section):
    """A whole run."""

    name: Annotated[str, MAY_CHANGE]
    """Name of the run."""
    output: Annotated[FolderPath, MAY_CHANGE] = "runs"
    """Folder in which the run's folder, called `name`, is created."""
    model: ModelConfig
    """The model."""
    data: DataConfig
    """The data."""
    init: Annotated[InitConfig, MAY_CHANGE] = InitConfig()
    """What it starts from."""
    parallel: Annotated[ParallelConfig, MAY_CHANGE] = ParallelConfig()
    """The layout."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """The optimizer."""
    schedule: ScheduleConfig = ScheduleConfig()
    """The learning rate schedule."""
    train: TrainConfig
    """The training loop."""
    evaluation: Annotated[EvaluationConfig, MAY_CHANGE] = EvaluationConfig()
    """Validation."""
    logging: Annotated[LoggingConfig, MAY_CHANGE] = LoggingConfig()
    """Reports."""
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    """Checkpoints."""
    profile: Annotated[ProfileConfig, MAY_CHANGE] = ProfileConfig()
    """Traces."""


def tokens_per_sample(config: Config) -> int:
    """Return the tokens per sample; for a bucket of pairs the most, of source and target each."""
    if config.model.objective == "translation":
        return config.data.bucket_tokens
    return config.data.sequence_length


def run_folder(config: Config) -> Path:
    """Return the folder of a run's checkpoints, curves, logs and configuration."""
    return Path(config.output) / config.name
