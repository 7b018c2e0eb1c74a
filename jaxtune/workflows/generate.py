"""Answer prompts with a model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtune.core.errors import UserError
from jaxtune.data.chat.tokenize import prompt_ids
from jaxtune.data.formats.conversation import Conversation
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.speed import Speed
from jaxtune.inference.text import Completion, TextGenerator
from jaxtune.tracking.progress import Reporter
from jaxtune.workflows.load import Pair, open_model

Prompt = str | list[dict[str, Any]] | Conversation


@dataclass(frozen=True)
class GenerationResult:
    """The result of `generate_completions`.

    Attributes:
        completions: the answer to each prompt: text, tokens, log-probabilities, why it ended.
        speed: how fast they were generated.

    """

    completions: list[Completion]
    speed: Speed


def generate_completions(
    model: str | Pair,
    prompts: Sequence[Prompt],
    adapter: str | None = None,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    reporter: Reporter | None = None,
) -> GenerationResult:
    """Answer every prompt.

    Args:
        model: see `load.open_model`.
        prompts: see `api.generate`.
        adapter: a PEFT adapter directory.
        max_new_tokens: the longest answer.
        sampling: how tokens are chosen; greedy by default.
        stop: texts that end an answer and are not part of it.
        batch_size: prompts computed together.
        reporter: where progress is shown.

    Raises:
        UserError: a bad model or prompt, or a model without a tokenizer.

    """
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(
            f"max_new_tokens = {max_new_tokens} and batch_size = {batch_size}: both must be at "
            "least 1."
        )
    reporter = reporter or Reporter(quiet=True)
    loaded = open_model(model, adapter)
    tokenizer = loaded.require_tokenizer()
    ids = [
        prompt_ids(tokenizer, _to_conversation(prompt, f"prompt {number}"))
        for number, prompt in enumerate(prompts, 1)
    ]
    engine = Engine(loaded.model, loaded.stop_ids, min(batch_size, max(len(prompts), 1)))
    generator = TextGenerator(engine, tokenizer, stop)
    with reporter.task("Generating", len(ids), lazy=True) as bar:
        completions = generator.answers(ids, max_new_tokens, sampling, bar.update)
    return GenerationResult(completions, engine.speed)


def _to_conversation(prompt: Prompt, location: str) -> Conversation:
    """Return the conversation that a prompt begins."""
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        return Conversation(location, [{"role": "user", "content": prompt}], plain=True)
    return Conversation(location, list(prompt), plain=False)
