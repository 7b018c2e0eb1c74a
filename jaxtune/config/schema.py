"""The one typed description of a run. Each default is written here and nowhere else."""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxtune.config.rules import CONFIG_RULES, DATA_RULES, Rule
from jaxtune.config.traits import Trait
from jaxtune.config.types import (
    AxisSize,
    Beta,
    Count,
    Index,
    LayerChoice,
    Names,
    NonNegative,
    Positive,
    Seed,
    SplitShare,
)

MetricName = Literal[
    "loss", "accuracy", "accuracy_greedy", "accuracy_norm", "macro_f1", "exact_match", "token_f1",
    "rouge_1", "rouge_2", "rouge_l", "bleu",
    "chrf", "json_valid", "json_match", "margin",
]  # fmt: skip
"""The metrics that checkpoints and the trials of a search are compared by."""


def lower_is_better(metric: str) -> bool:
    """Return whether lower values of a metric are better; they are of the loss alone."""
    return metric == "loss"


class Section(BaseModel):
    """A part of a configuration: frozen, strict about types, closed to unknown keys.

    Attributes:
        rules: the rules that its keys must keep.

    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )
    rules: ClassVar[Sequence[Rule]] = ()

    @model_validator(mode="after")
    def _keep_rules(self) -> Self:
        broken = [rule.message for rule in self.rules if rule.is_broken(self)]
        if broken:
            raise ValueError("; ".join(broken).format(**dict(self)))
        return self


class ModelSection(Section):
    """The pretrained model."""

    source: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A hub id, a Hugging Face directory or a .gguf file."""
    dtype: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """Storage of the frozen weights; auto keeps the file's dtype, int8 and nf4 quantize the
    matrices of the blocks as they are read.
    """
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of activations and matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    products: Literal["auto", "int8"] = "auto"
    """Products with the frozen matrices in training: auto is the compute dtype; int8, with dtype
    int8, rounds activations and their gradients to eight bits per token, which is faster where
    a device has more integer than float arithmetic.
    """
    new_tokens: list[str] = []
    """Special tokens to add to the vocabulary; their rows start at the mean of the others."""


class AdapterSection(Section):
    """The trainable adapter."""

    method: Annotated[Literal["lora", "dora", "ia3", "none"], Trait.KEEPS_START] = "lora"
    """The kind of adapter; none trains the weights themselves (see trainable). ia3 reads only
    targets, exclude, modules_to_save and init; its paper has targets [k_proj, v_proj, down_proj].
    """
    rank: Annotated[Count, Trait.KEEPS_START] = 16
    """Rank r of the update B A."""
    alpha: Annotated[Positive, Trait.KEEPS_START] = 32
    """Scale of the update: alpha / rank."""
    dropout: Annotated[Beta, Trait.KEEPS_START] = 0.0
    """Dropout on the adapter's input, in training only."""
    rslora: Annotated[bool, Trait.KEEPS_START] = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    targets: Annotated[Names, Trait.KEEPS_START] = "all-linear"
    """Modules to adapt: all-linear (all but the head), a list of names such as [q_proj, v_proj],
    or a regular expression for a whole name.
    """
    exclude: Annotated[str | list[str], Trait.KEEPS_START] = []
    """Modules to leave out of targets, written in the same way."""
    layers: Annotated[LayerChoice | None, Trait.KEEPS_START] = None
    """Layers to adapt: last:N, or a list of numbers from 0; null is all."""
    rank_pattern: Annotated[dict[str, Count], Trait.KEEPS_START] = {}
    """Ranks of particular modules, by the end of a module's name or a regular expression, such as
    {down_proj: 32}; the first match wins.
    """
    alpha_pattern: Annotated[dict[str, Positive], Trait.KEEPS_START] = {}
    """Alphas of particular modules, written in the same way."""
    modules_to_save: list[str] = []
    """Modules that train in full beside the adapter and are saved with it, such as [lm_head]."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train beside the adapter: none, all of the model's, or the adapted modules'."""
    train_tokens: Literal["none", "new", "all"] = "none"
    """Rows of embedding and head that train beside the adapter: none, the new tokens' (new), or
    all.
    """
    init: str | None = None
    """A PEFT adapter directory to start from; default (or null) starts at a zero update, pissa at
    the principal singular vectors.
    """

    @property
    def start(self) -> str | None:
        """Return the directory of the adapter to start from, if there is one."""
        return None if self.init in (None, "default", "pissa") else self.init


class DataSource(Section):
    """One source of rows, where there are several or one needs settings of its own."""

    source: str
    """As in data.train: a file, directory, glob, URL or Hub dataset."""
    split: str | None = None
    """The split of a dataset or directory; null is train for training, and validation or test for
    evaluation.
    """
    name: str | None = None
    """The configuration of a Hub dataset that has several."""
    weight: Positive = 1.0
    """Passes over this source in an epoch: 2 shows each row twice; 0.5 shows half of the rows, and
    the other half in the next epoch.
    """
    rows: Count | None = None
    """Read only this many rows, from the first; a Hub dataset is then streamed, not downloaded."""


Sources = str | Annotated[list[str | DataSource], Field(min_length=1)]


class DataSection(Section):
    """The examples."""

    rules = DATA_RULES

    train: Sources | None = None
    """A file (.jsonl, .json, .csv, .parquet, .txt, also compressed), directory, glob, Hub dataset,
    or a list of {source, weight, split}.
    """
    eval: Sources | None = None
    """The same for evaluation, which runs before, after and every train.eval_every steps."""
    split: SplitShare | None = None
    """The share of data.train to hold out for evaluation, instead of data.eval, such as 5% or
    0.05; chosen by a hash of each row's prompt.
    """
    format: Literal[
        "auto", "messages", "prompt-completion", "choice", "alpaca", "sharegpt", "text",
        "preference",
    ] = "auto"  # fmt: skip
    """The layout of a row; auto infers it from the keys of a source's first row."""
    columns: dict[str, str] = {}
    """Columns that hold the format's fields under other names, such as {prompt: question,
    completion: "{answers.0} because {reason}"}.
    """
    on_error: Literal["raise", "skip"] = "raise"
    """What happens to a bad row: it ends the run, or it is left out and listed."""
    train_on: Literal["responses", "last", "all"] = "responses"
    """Which tokens are supervised: all assistant messages, only the last one, or everything."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per row; longer examples are truncated and counted."""
    packing: bool = True
    """Whether several examples share a row, without attending to each other."""
    shuffle: bool = True
    """Whether every epoch has a new order."""

    @property
    def fraction(self) -> float:
        """Return `split` as a fraction; 0 where nothing is held out."""
        return float(self.split[:-1]) / 100 if isinstance(self.split, str) else self.split or 0.0

    def entries(self, part: Literal["train", "eval"]) -> list[DataSource]:
        """Return the sources of `data.train` or `data.eval`, each with all its settings."""
        given = self.train if part == "train" else self.eval
        entries = [] if given is None else [given] if isinstance(given, str) else given
        return [DataSource(source=entry) if isinstance(entry, str) else entry for entry in entries]


class OptimizerSection(Section):
    """The optimizer and its schedule, counted in optimizer steps."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd", "schedule-free"] = "adamw"
    """The update rule; schedule-free is schedule-free AdamW, whose schedule is constant."""
    learning_rate: Positive | Literal["auto"] = 2.0e-4
    """Peak learning rate; auto is Thinking Machines' rule for AdamW (LoRA Without Regret, 2025),
    for Llama and Qwen models.
    """
    rates: dict[str, NonNegative] = {}
    """Peak rates of particular modules, by the end of a module's name or a regular expression,
    such as {embed_tokens: 1e-5}.
    """
    lora_plus: Positive | None = None
    """Ratio of the learning rate of B to that of A (LoRA+); the paper proposes 16. As in PEFT it
    holds for vectors too: DoRA's lengths, biases and norms.
    """
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warmup: a cosine or a line to zero, constant, or constant with a linear decay over
    the last fifth.
    """
    warmup: NonNegative = 0.03
    """Below 1, a fraction of all steps; otherwise optimizer steps."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the first and second moment; for SGD, Lion and Muon the first is the momentum.
    Lion's are [0.9, 0.99] where they are not given, as in its paper.
    """
    eps: Positive = 1.0e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay; norms, biases and magnitudes are exempt."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; null does not clip."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_rule(cls, given: Any) -> Any:
        own = {"schedule-free": {"schedule": "constant"}, "lion": {"betas": [0.9, 0.99]}}
        name = given.get("name") if isinstance(given, dict) else None
        return own[name] | given if isinstance(name, str) and name in own else given


class TrainSection(Section):
    """The training loop."""

    objective: Literal["sft", "dpo", "orpo", "kto", "simpo", "distill"] = "sft"
    """The objective: the loss on answers, a preference objective, or the distance to a teacher."""
    epochs: Annotated[Count, Trait.KEEPS_START] = 1
    """Passes over the data."""
    steps: Annotated[Count | None, Trait.KEEPS_START] = None
    """Optimizer steps; overrides epochs."""
    batch_size: Annotated[Count, Trait.KEEPS_START] = 8
    """Rows (packed rows when packing) per optimizer step, over all devices."""
    micro_batch_size: Annotated[Count | None, Trait.RESUMABLE, Trait.KEEPS_START] = None
    """Rows per gradient accumulation step, over all devices; null is the whole batch."""
    remat: Annotated[Literal["none", "full", "dots", "offload", "auto"], Trait.RESUMABLE] = "auto"
    """What the backward pass recomputes: nothing (none), whole layers (full), all but the matrix
    products (dots), or whole layers with their inputs kept in host memory (offload); auto is
    the first of dots, full and offload that a device's memory seems to allow.
    """
    neftune: Annotated[NonNegative, Trait.KEEPS_START] = 0.0
    """Scale of the noise on the embeddings in training (NEFTune); the paper proposes 5."""
    ema: Annotated[Beta, Trait.KEEPS_START] = 0.0
    """Decay of an exponential moving average of the trainable weights, which is then evaluated and
    exported; 0 keeps none.
    """
    eval_every: Annotated[Count | None, Trait.KEEPS_START] = None
    """Optimizer steps between evaluations during training: of the loss, or of all metrics where
    checkpoint.best is a metric of the task.
    """
    eval_task: Literal["auto", "lm", "classification", "qa", "generation", "choice"] = "auto"
    """The task of the evaluation rows, as in jaxtune eval --task; auto goes by the answers."""
    patience: Annotated[Count | None, Trait.RESUMABLE, Trait.KEEPS_START] = None
    """Evaluations in a row without a new best (of checkpoint.best, or else the loss) after which
    training ends.
    """
    samples: Annotated[Index, Trait.RESUMABLE] = 5
    """Prompts whose answers are recorded before and after training and at every evaluation."""
    seed: Annotated[Seed, Trait.KEEPS_START] = 0
    """Seed of the adapter, the order of the data and dropout."""


class PreferenceSection(Section):
    """Training on preferred and rejected answers."""

    beta: Positive | None = None
    """Strength of the pull toward the reference; null is the objective's own: 0.1, for SimPO 2."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """The form of DPO's loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs assumed to be labeled the wrong way round (conservative DPO); also SimPO's."""
    margin: NonNegative = 1.0
    """SimPO's target margin, in units of its reward."""
    desirable_weight: Positive = 1.0
    """KTO's weight of desirable answers."""
    undesirable_weight: Positive = 1.0
    """KTO's weight of undesirable answers."""


class DistillSection(Section):
    """Training toward a teacher's predictions."""

    teacher: str | None = None
    """The teacher: a model like model.source, with the same tokenizer."""
    top_k: Count = 64
    """How many of the teacher's most likely tokens are compared at each position."""
    temperature: Positive = 1.0
    """Temperature of both distributions."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the distance to the teacher; the rest weighs the loss on the answers."""


class MeshSection(Section):
    """Devices along each axis; -1 is all that remain."""

    slices: Count = 1
    """Slices joined by the data-center network, each with a copy of the weights and a part of the
    batch.
    """
    data: AxisSize = 1
    """Copies of the weights, each with a part of the batch."""
    fsdp: AxisSize = -1
    """Shards of the weights, each with a part of the batch."""
    context: AxisSize = 1
    """Shards of each sequence, for long sequences."""
    tensor: AxisSize = 1
    """Shards of each matrix product."""


class CheckpointSection(Section):
    """Checkpoints of the adapter, the optimizer and the position in the data."""

    every: Count = 100
    """Optimizer steps between checkpoints; the last step always has one."""
    keep: Count = 2
    """How many checkpoints are kept."""
    best: MetricName | None = None
    """Also keep, and export, the state with the best evaluation (see train.eval_every): by the
    loss, or by a metric of the task (accuracy, macro_f1, exact_match, token_f1, rouge_l, chrf
    ...); for preferences, loss, accuracy or margin.
    """
    dir: str | None = None
    """Where checkpoints are kept instead of the run directory: a directory that all processes
    share, or gs://bucket/folder, s3://bucket/folder.
    """


class RunSection(Section):
    """Where the run is recorded."""

    dir: str = "runs/my-run"
    """The run directory."""
    watchdog: Positive | None = 1800
    """Seconds without a finished step after which the run prints the stacks of all threads and
    ends; null never ends it.
    """
    profile: Index = 0
    """Steps to record with JAX's profiler, after the first two, in profile/ of the run."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Trackers that also get the rows of metrics.jsonl; tensorboard writes in tensorboard/ of the
    run.
    """


PREFERENCE = ("dpo", "orpo", "kto", "simpo")
"""Objectives on pairs of answers, or on answers that are labeled desirable or undesirable."""


class Config(Section):
    """The configuration of a run."""

    rules = CONFIG_RULES

    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    trainable: Annotated[Names, Trait.KEEPS_START] = "all"
    """The weights that train with adapter.method none: all, last:N (the last N layers), or a list
    of these, norms, biases, embeddings, head and names.
    """
    data: DataSection = DataSection()
    optimizer: Annotated[OptimizerSection, Trait.KEEPS_START] = OptimizerSection()
    train: TrainSection = TrainSection()
    preference: PreferenceSection = PreferenceSection()
    distill: DistillSection = DistillSection()
    mesh: Annotated[MeshSection, Trait.RESUMABLE] = MeshSection()
    checkpoint: Annotated[CheckpointSection, Trait.RESUMABLE, Trait.KEEPS_START] = (
        CheckpointSection()
    )
    run: Annotated[RunSection, Trait.RESUMABLE] = RunSection()

    @property
    def on_pairs(self) -> bool:
        """Return whether it trains on preferences."""
        return self.train.objective in PREFERENCE

    @property
    def row_length(self) -> int:
        """Return the tokens of a batch's row: `data.max_length` for each of the answers in it."""
        return self.data.max_length * (2 if self.on_pairs else 1)

    @property
    def monitor(self) -> str:
        """Return the metric that decides which state is best."""
        return self.checkpoint.best or "loss"
