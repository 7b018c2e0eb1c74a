"""The one typed description of a run. Each default is written here and nowhere else."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
AxisSize = Annotated[int, Field(ge=-1)]
MetricName = Literal[
    "loss", "accuracy", "accuracy_greedy", "accuracy_norm", "macro_f1", "exact_match", "token_f1",
    "rouge_1", "rouge_2", "rouge_l", "bleu",
    "chrf", "json_valid", "json_match", "margin",
]  # fmt: skip
"""What a state may be judged by: the loss, where less is better, or something where more is."""


class Section(BaseModel):
    """A part of the configuration: frozen, strict about types, closed to unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )


class ModelSection(Section):
    """The pretrained model."""

    source: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A hub id, a Hugging Face directory or a .gguf file."""
    dtype: Literal["auto", "float32", "bfloat16", "int8", "nf4"] = "auto"
    """Storage of the frozen weights; auto keeps what the file has, int8 and nf4 quantize the
    blocks' matrices as they are read.
    """
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Activations and matrix products; auto is bfloat16 on TPU and GPU, float32 on CPU."""
    products: Literal["auto", "int8"] = "auto"
    """Products with the frozen matrices in training: auto is the compute dtype; int8, with dtype
    int8, rounds activations and their gradients to eight bits a token, which is faster where a
    device has more integer than float arithmetic.
    """
    new_tokens: list[str] = []
    """Special tokens to add to the vocabulary; their rows begin at the mean of the others."""


class AdapterSection(Section):
    """The trainable adapter."""

    method: Literal["lora", "dora", "none"] = "lora"
    """The kind of adapter; with none the weights themselves train (see trainable)."""
    rank: Count = 16
    """Rank r of the update B A."""
    alpha: Positive = 32
    """Scale of the update: alpha / rank."""
    dropout: Beta = 0.0
    """Dropout on the adapter's input, in training only."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (rank-stabilized LoRA)."""
    targets: str | Annotated[list[str], Field(min_length=1)] = "all-linear"
    """Which modules: all-linear (all but the head), a list of names such as [q_proj, v_proj], or
    a regular expression for a whole name.
    """
    exclude: str | list[str] = []
    """Modules to leave out of targets, named like these."""
    layers: (
        Annotated[str, Field(pattern=r"^last:[1-9]\d*$")] | list[Annotated[int, Field(ge=0)]] | None
    ) = None
    """Which layers are adapted: last:N, or a list of numbers from 0; null is all."""
    rank_pattern: dict[str, Count] = {}
    """Other ranks by the end of a module's name or a regular expression, such as {down_proj:
    32}; the first that fits counts.
    """
    alpha_pattern: dict[str, Positive] = {}
    """Other alphas, likewise."""
    modules_to_save: list[str] = []
    """Modules that train whole beside the adapter and are saved with it, such as [lm_head]."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train beside it: none, all of the model's, or those of adapted modules."""
    train_tokens: Literal["none", "new", "all"] = "none"
    """Rows of embedding and head that train beside: none, those of new tokens, or both matrices
    whole.
    """
    init: str | None = None
    """A PEFT adapter directory to start from; default (or null) starts from zero update, pissa
    from the principal singular vectors.
    """

    @property
    def start(self) -> str | None:
        """The directory of the adapter to start from."""
        return None if self.init in (None, "default", "pissa") else self.init


class DataSource(Section):
    """One source of rows, where there are several or where more is to be said of one."""

    source: str
    """As in data.train: a file, directory, glob, URL or data set of the hub."""
    split: str | None = None
    """The split of a data set or of a directory; null takes train for training, validation or
    test for evaluation.
    """
    name: str | None = None
    """The configuration of a data set of the hub that has several."""
    weight: Positive = 1.0
    """Passes over this source in an epoch: 2 shows each row twice, 0.5 half of the rows, the
    other half in the next epoch.
    """
    rows: Count | None = None
    """Only the first so many rows; a data set of the hub is then streamed, not downloaded."""


Sources = str | Annotated[list[str | DataSource], Field(min_length=1)]


class DataSection(Section):
    """The examples."""

    train: Sources | None = None
    """A file (.jsonl, .json, .csv, .parquet, .txt, also compressed), directory, glob, data set
    of the hub, or a list of {source, weight, split}.
    """
    eval: Sources | None = None
    """The same for evaluation; evaluated before, after and every train.eval_every steps."""
    split: (
        Annotated[str, Field(pattern=r"^\d+(\.\d+)?%$")]
        | Annotated[float, Field(gt=0, lt=1)]
        | None
    ) = None
    """Instead of data.eval the part of data.train to evaluate on, such as 5% or 0.05; drawn by a
    hash of each row's prompt.
    """
    format: Literal[
        "auto",
        "messages",
        "prompt-completion",
        "choice",
        "alpaca",
        "sharegpt",
        "text",
        "preference",
    ] = "auto"
    """What a row holds; auto finds out from the keys of a source's first row."""
    columns: dict[str, str] = {}
    """Where other columns hold what the format wants, such as {prompt: question, completion:
    "{answers.0} because {reason}"}.
    """
    on_error: Literal["raise", "skip"] = "raise"
    """What a bad row does: end the run, or be left out and listed."""
    train_on: Literal["responses", "last", "all"] = "responses"
    """Which tokens are supervised: all assistant messages, only the last one, or everything."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Tokens per row; longer examples are cut and counted."""
    packing: bool = True
    """Whether several examples share a row, without seeing each other."""
    shuffle: bool = True
    """Whether the order is drawn anew for every epoch."""

    @property
    def fraction(self) -> float:
        """`split` as a fraction; 0 where nothing is split off."""
        return float(self.split[:-1]) / 100 if isinstance(self.split, str) else self.split or 0.0

    def entries(self, part: Literal["train", "eval"]) -> list[DataSource]:
        """The sources of `data.train` or `data.eval`, each with all its settings."""
        found = self.train if part == "train" else self.eval
        found = [] if found is None else [found] if isinstance(found, str) else found
        return [DataSource(source=entry) if isinstance(entry, str) else entry for entry in found]

    @model_validator(mode="after")
    def _one_evaluation_set(self) -> "DataSection":
        if self.split is not None and self.eval is not None:
            raise ValueError("data.split and data.eval are both set. Keep one of them")
        if not 0 <= self.fraction < 1:
            raise ValueError(f"data.split ({self.split}) must lie below 100%")
        return self


class OptimizerSection(Section):
    """The optimizer and its schedule, counted in optimizer steps."""

    name: Literal["adamw", "adafactor", "lion", "muon", "sgd", "schedule-free"] = "adamw"
    """The update rule; schedule-free is schedule-free AdamW, which wants the schedule constant."""
    learning_rate: Positive | Literal["auto"] = 2.0e-4
    """Peak learning rate; auto takes Thinking Machines' rule for AdamW (LoRA Without Regret,
    2025), for Llama and Qwen models.
    """
    rates: dict[str, Annotated[float, Field(ge=0)]] = {}
    """Peak rates of their own, by the end of a module's name or a regular expression, such as
    {embed_tokens: 1e-5}.
    """
    lora_plus: Positive | None = None
    """By how much the rate of B exceeds that of A (LoRA+); the paper proposes 16."""
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """After the warmup: to zero along a cosine or a line, constant, or constant with a linear
    last fifth.
    """
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a fraction of all steps; otherwise optimizer steps."""
    betas: Annotated[list[Beta], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the first and second moment; of SGD, Lion and Muon the first is the momentum."""
    eps: Positive = 1.0e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay; norms, biases and magnitudes have none."""
    clip_norm: Positive | None = 1.0
    """Largest global norm of the gradient; null does not clip."""

    @model_validator(mode="before")
    @classmethod
    def _schedule_free_is_constant(cls, given: Any) -> Any:
        free = isinstance(given, dict) and given.get("name") == "schedule-free"
        return {"schedule": "constant"} | given if free else given


class TrainSection(Section):
    """The training loop."""

    objective: Literal["sft", "dpo", "orpo", "kto", "simpo", "distill"] = "sft"
    """What is minimized: the loss on answers, a preference objective on pairs of answers, or the
    distance to a teacher.
    """
    epochs: Count = 1
    """Passes over the data."""
    steps: Count | None = None
    """Optimizer steps; overrides epochs."""
    batch_size: Count = 8
    """Rows (packed rows when packing) per optimizer step, over all devices."""
    micro_batch_size: Count | None = None
    """Rows per accumulation step, over all devices; null is the whole batch."""
    remat: Literal["none", "full", "dots", "offload", "auto"] = "auto"
    """What the backward pass recomputes: nothing, whole layers, or all but the matrix products;
    offload: whole layers, their inputs kept in the host's memory; auto: the first of dots, full
    and offload that the memory of a device seems to allow.
    """
    neftune: Annotated[float, Field(ge=0)] = 0.0
    """Noise on the embeddings in training (NEFTune); the paper proposes 5."""
    ema: Beta = 0.0
    """Decay of an exponential moving average of what trains, which is then evaluated and
    exported; 0 is none.
    """
    eval_every: Count | None = None
    """Optimizer steps between evaluations on the way: of the loss, or of all figures where
    checkpoint.best is one of the task's.
    """
    eval_task: Literal["auto", "lm", "classification", "qa", "generation", "choice"] = "auto"
    """What the evaluation rows are for, as in jaxtune eval --task; auto goes by the answers."""
    patience: Count | None = None
    """Training ends after so many evaluations on the way that were no better by checkpoint.best,
    or by the loss where that is not set.
    """
    samples: Annotated[int, Field(ge=0)] = 5
    """Prompts whose answers are kept before and after training and at every evaluation on the
    way, to be looked at.
    """
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of adapter, order and dropout."""


class PreferenceSection(Section):
    """Training on preferred and rejected answers."""

    beta: Positive | None = None
    """How strongly the model is held to the reference; null is the objective's own: 0.1, for
    SimPO 2.
    """
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Form of DPO."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs taken to be the wrong way round (conservative DPO)."""
    margin: Annotated[float, Field(ge=0)] = 1.0
    """SimPO's target margin, in units of its reward."""
    desirable_weight: Positive = 1.0
    """KTO's weight of good answers."""
    undesirable_weight: Positive = 1.0
    """KTO's weight of bad answers."""


class DistillSection(Section):
    """Training towards a teacher's predictions."""

    teacher: str | None = None
    """The teacher: a model like model.source, with the same tokenizer."""
    top_k: Count = 64
    """How many of the teacher's most likely tokens are compared at each position."""
    temperature: Positive = 1.0
    """Both distributions are taken at this temperature."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the teacher; the rest is the loss on the answers."""


class MeshSection(Section):
    """Devices along each axis; -1 takes what is left."""

    slices: Count = 1
    """Slices joined by the data-center network, each with a copy of the weights and its part of
    the batch.
    """
    data: AxisSize = 1
    """Copies of the weights, each with its part of the batch."""
    fsdp: AxisSize = -1
    """Parts of the weights, each with its part of the batch."""
    context: AxisSize = 1
    """Parts of each sequence, for long ones."""
    tensor: AxisSize = 1
    """Parts of each matrix product."""


class CheckpointSection(Section):
    """Checkpoints of the adapter, the optimizer and the position in the data."""

    every: Count = 100
    """Optimizer steps between checkpoints; the last step always has one."""
    keep: Count = 2
    """How many are kept."""
    best: MetricName | None = None
    """Also keep the state with the best evaluation (see train.eval_every), and export it: by the
    loss, or by a figure of the task (accuracy, macro_f1, exact_match, token_f1, rouge_l, chrf
    ...), of preferences accuracy or margin.
    """
    dir: str | None = None
    """Where they lie instead of the run directory: a directory that all processes share, or
    gs://bucket/folder, s3://bucket/folder.
    """


class RunSection(Section):
    """Where the run is recorded."""

    dir: str = "runs/my-run"
    """The run directory."""
    watchdog: Positive | None = 1800
    """Seconds without a step done after which the stacks of all threads are printed and the run
    ends; null: never.
    """
    profile: Annotated[int, Field(ge=0)] = 0
    """Steps to record with JAX's profiler, the first two apart; the recording lies in profile/
    of the run.
    """
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Where else the rows of metrics.jsonl go: tensorboard (in tensorboard/ of the run), wandb,
    trackio.
    """


PREFERENCE = ("dpo", "orpo", "kto", "simpo")
"""Objectives on pairs of answers, or on answers that are marked good or bad."""


class Config(Section):
    """A run of jaxtune, whole."""

    model: ModelSection = ModelSection()
    adapter: AdapterSection = AdapterSection()
    trainable: str | Annotated[list[str], Field(min_length=1)] = "all"
    """With adapter.method none, what trains: all, last:N (the last N layers), or a list of
    these, norms, biases, embeddings, head and names.
    """
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection = TrainSection()
    preference: PreferenceSection = PreferenceSection()
    distill: DistillSection = DistillSection()
    mesh: MeshSection = MeshSection()
    checkpoint: CheckpointSection = CheckpointSection()
    run: RunSection = RunSection()

    @property
    def on_pairs(self) -> bool:
        """Whether it trains on preferences."""
        return self.train.objective in PREFERENCE

    @property
    def monitor(self) -> str:
        """The figure by which states are better or worse."""
        return self.checkpoint.best or "loss"

    @model_validator(mode="after")
    def _micro_batches_divide(self) -> "Config":
        size, micro = self.train.batch_size, self.train.micro_batch_size
        if micro is not None and size % micro:
            raise ValueError(
                f"train.micro_batch_size ({micro}) must divide train.batch_size ({size})"
            )
        return self

    @model_validator(mode="after")
    def _methods_fit(self) -> "Config":
        weights, optimizer = self.adapter.method == "none", self.optimizer
        auto, evaluated = (
            optimizer.learning_rate == "auto",
            self.data.eval is not None or self.data.split is not None,
        )
        wrong = {
            "checkpoint.best needs evaluations. Set train.eval_every, and data.eval or data.split": self.checkpoint.best
            is not None
            and not (self.train.eval_every and evaluated),
            "checkpoint.best=margin is for preferences. Set checkpoint.best=loss": self.checkpoint.best
            == "margin"
            and not self.on_pairs,
            "of preferences checkpoint.best is loss, accuracy or margin": self.on_pairs
            and self.checkpoint.best not in (None, "loss", "accuracy", "margin"),
            "train.patience counts evaluations. Set train.eval_every, and data.eval or data.split": self.train.patience
            is not None
            and not (self.train.eval_every and evaluated),
            "trainable names weights, and adapter.method is an adapter. Set adapter.method=none": not weights
            and self.trainable != "all",
            "trainable=all leaves nothing frozen that model.dtype could quantize. Take float32 or bfloat16": weights
            and self.trainable == "all"
            and self.model.dtype in ("int8", "nf4"),
            "model.products=int8 multiplies the codes of model.dtype=int8. Set that too": self.model.products
            == "int8"
            and self.model.dtype != "int8",
            "adapter.init is for adapters, and adapter.method is none": weights
            and self.adapter.init is not None,
            "adapter.train_tokens is for adapters. With adapter.method=none name embeddings in trainable": weights
            and self.adapter.train_tokens != "none",
            "adapter.init=pissa is for adapter.method=lora": self.adapter.init == "pissa"
            and self.adapter.method != "lora",
            "optimizer.lora_plus is for adapters, and adapter.method is none": weights
            and optimizer.lora_plus is not None,
            "optimizer.learning_rate=auto is a rule for AdamW and train.objective=sft. Give a number": auto
            and (optimizer.name != "adamw" or self.train.objective != "sft"),
            "optimizer.name=schedule-free replaces the schedule. Set optimizer.schedule=constant": optimizer.name
            == "schedule-free"
            and optimizer.schedule != "constant",
            "optimizer.name=schedule-free averages by itself. Set train.ema=0": optimizer.name
            == "schedule-free"
            and self.train.ema > 0,
            "train.objective=distill needs distill.teacher": self.train.objective == "distill"
            and self.distill.teacher is None,
            "distill.teacher is set, and train.objective is not distill": self.train.objective
            != "distill"
            and self.distill.teacher is not None,
        }
        if found := [text for text, holds in wrong.items() if holds]:
            raise ValueError("; ".join(found))
        return self
