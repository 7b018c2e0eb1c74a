"""From a configuration to the model's source, its tokenizer and every batch, before any weight
loads.
"""

from dataclasses import dataclass, replace
from datetime import date

from jaxtune.config.schema import Config
from jaxtune.core.errors import UserError
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.template import plain_template
from jaxtune.data.examples import Examples
from jaxtune.data.formats.answers import AnswerComparison
from jaxtune.data.loader import BatchSchedule
from jaxtune.data.packing import Layout
from jaxtune.data.prepare import Which, has_part, prepare
from jaxtune.models.config import ModelConfig
from jaxtune.models.families.from_hf import from_hf
from jaxtune.objectives.registry import build_objective
from jaxtune.tracking.progress import Reporter
from jaxtune.weights.peft import Adapter, open_adapter
from jaxtune.weights.source import Source, resolve
from jaxtune.weights.vocabulary import (
    ResizedSource,
    add_tokens,
    cut_rows,
    resize_for_adapter,
    stop_ids_for,
    tokenizer_for,
)

_NAMES = {"train": "Training", "eval": "Evaluation"}


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run.

    Attributes:
        source: the base model's origin, with rows for new tokens.
        adapter: the adapter to start from, if any.
        teacher: the teacher's origin, if there is a teacher.
        tokenizer: the model's tokenizer.
        stop_ids: tokens that end an answer: the model's, and those that end the answers trained on.
        schedule: every batch of the run.
        eval_schedule: the evaluation's batches, None where there is no evaluation data.

    """

    source: Source
    adapter: Adapter | None
    teacher: Source | None
    tokenizer: Tokenizer
    stop_ids: list[int]
    schedule: BatchSchedule
    eval_schedule: BatchSchedule | None

    @property
    def schedules(self) -> dict[str, BatchSchedule]:
        """Return the schedules that are there, by part."""
        return {"train": self.schedule} | (
            {"eval": self.eval_schedule} if self.eval_schedule else {}
        )


def read_inputs(config: Config, reporter: Reporter, day: date | None = None) -> Inputs:
    """Open the model and the adapter to start from, and tokenize the data.

    Args:
        config: the resolved configuration.
        reporter: progress.
        day: the date for chat templates that print one; today's by default.

    Raises:
        UserError: anything that is wrong with the model, the adapter or the data.

    """
    adapter = open_adapter(config.adapter.start) if config.adapter.start else None
    source = resize_for_adapter(resolve(config.model.source), adapter)
    _model_config(source)  # its errors come before those of the tokenizer
    if adapter is None:
        source = add_tokens(source, config.model.new_tokens)
    elif config.model.new_tokens or config.adapter.train_tokens != "none":
        raise UserError(
            "model.new_tokens and adapter.train_tokens: an adapter that is trained further "
            "(adapter.init) keeps its tokens. Remove them."
        )
    if config.adapter.train_tokens == "new" and not isinstance(source, ResizedSource):
        raise UserError(
            "adapter.train_tokens = new, and no token is new. Name new tokens in model.new_tokens, "
            "or set adapter.train_tokens=all."
        )
    tokenizer = tokenizer_for(source, adapter)
    if tokenizer is None:
        raise UserError(
            f"{config.model.source} has no tokenizer, and training needs one. Put its tokenizer "
            "files beside the weights."
        )
    train = config.train
    layout = Layout(
        train.batch_size, config.row_length, config.data.packing, config.data.shuffle, train.seed
    )
    schedule = BatchSchedule(
        _examples(config, tokenizer, "train", reporter, day), layout, train.epochs, train.steps
    )
    eval_schedule = None
    if has_part(config.data, "eval"):
        eval_schedule = BatchSchedule(
            _examples(config, tokenizer, "eval", reporter, day), replace(layout, shuffle=False), 1
        )
    _give_template(tokenizer, schedule.examples)
    teacher = _teacher(config, tokenizer)
    ends = schedule.examples.stop_ids(tokenizer)
    stop_ids = sorted({*stop_ids_for(source, adapter), *ends})
    inputs = Inputs(source, adapter, teacher, tokenizer, stop_ids, schedule, eval_schedule)
    largest = [[part.examples.largest_token] for part in inputs.schedules.values()]
    _model_config(source).check_tokens(largest)
    return inputs


def _model_config(source: Source) -> ModelConfig:
    return from_hf(source.config_json(), str(source.config_path))


def _teacher(config: Config, tokenizer: Tokenizer) -> Source | None:
    """Open the teacher's origin; where it has more or fewer rows of embeddings than the model, only
    those that name a token.

    Raises:
        UserError: its tokens are not the model's.

    """
    if config.distill.teacher is None:
        return None
    source = resolve(config.distill.teacher)
    teacher_tokenizer = source.tokenizer()
    if teacher_tokenizer is not None and teacher_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"distill.teacher: {source.name} has other tokens than {config.model.source}, so "
            "their predictions cannot be compared. Take a teacher of the same family."
        )
    size = _model_config(source).vocab_size
    model_size = _model_config(resolve(config.model.source)).vocab_size
    if size == model_size:
        return source
    if teacher_tokenizer is None:
        raise UserError(
            f"distill.teacher: {source.name} has {size} rows of tokens and no tokenizer that says "
            f"what they mean, the model has {model_size}. Put its tokenizer files beside it."
        )
    return cut_rows(source, 1 + max(teacher_tokenizer.get_vocab().values()))


def report_data(schedules: dict[str, BatchSchedule], reporter: Reporter) -> None:
    """Report the data to train and evaluate on, and what of it was truncated or left out."""
    for part, schedule in schedules.items():
        examples, counts = schedule.examples, schedule.examples.summary()
        reporter.say(
            f"{_NAMES[part]} data: {counts['rows']:,} rows ({counts['format']}), "
            f"{counts['tokens']:,} tokens, "
            f"{counts['supervised_tokens']:,} supervised, longest {counts['longest']:,}; "
            f"{counts['truncated']} truncated, {counts['dropped'] + counts['bad']} left out"
        )
        for places, what in (
            (examples.truncated, "lost supervised tokens to data.max_length"),
            (examples.cut_off, "are left out: their answers lie beyond data.max_length"),
            (examples.unanswered, "are left out: nothing in them is supervised"),
            (examples.bad, "are bad and left out"),
        ):
            if places:
                reporter.say(
                    f"  {len(places):,} rows {what}: "
                    f"{', '.join(places[:3])}{' ...' if len(places) > 3 else ''}"
                )
        if examples.rewritten:
            reporter.say(
                f"  {examples.rewritten:,} rows: the chat template rewrites earlier turns, so "
                "each answer is an example of its own"
            )


def _examples(
    config: Config, tokenizer: Tokenizer, which: Which, reporter: Reporter, day: date | None
) -> Examples:
    with reporter.task(f"Tokenizing {_NAMES[which].lower()} data", 100, lazy=True) as task:
        return prepare(
            config.data,
            tokenizer,
            which,
            progress=task.update_share,
            day=day,
            comparison=comparison(config),
        )


def comparison(config: Config) -> AnswerComparison | None:
    """Return what the objective compares."""
    return build_objective(config).compares


def _give_template(tokenizer: Tokenizer, examples: Examples) -> None:
    """Give a tokenizer without chat template the one that chats were rendered with, to be exported.

    Raises:
        UserError: some rows are chats and others are not, so that no prompt would suit both.

    """
    if tokenizer.chat_template or "chat" not in examples.kinds:
        return
    if "plain" in examples.kinds:
        raise UserError(
            f"{examples.source}: some rows are chats, others prompts with completions, and the "
            "tokenizer has no chat template. Write all rows in one form, so that prompts look as "
            "they did in training."
        )
    tokenizer.chat_template = plain_template(tokenizer)
