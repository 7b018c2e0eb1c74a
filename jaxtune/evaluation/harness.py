"""A model for lm-evaluation-harness, and its tasks from here; needs the extra `harness`."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from jaxtune.core.errors import UserError, listed
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.evaluation.likelihood import likelihoods
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.text import TextGenerator
from jaxtune.models.decoder import CausalLM
from jaxtune.tracking.progress import Reporter

_NEW_TOKENS = 256  # where a task says nothing, as the harness has it
_IGNORED = ("do_sample", "until", "max_gen_toks", "temperature", "pad_token_id", "use_cache")

type_request = tuple[Any, list[int], list[int]]


class GenerationSettings(NamedTuple):
    """How a task wants its answers generated."""

    sampling: Sampling
    stop: list[str]
    max_new_tokens: int


class HarnessModel(TemplateLM):
    """A model for lm-evaluation-harness.

    Its numbers equal those of the harness's own `hf` model on the same weights.

    Args:
        model: with or without an adapter.
        tokenizer: its tokenizer.
        stop_ids: tokens that end an answer.
        batch: requests computed together.
        reporter: where progress is shown.

    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Tokenizer,
        stop_ids: Sequence[int],
        batch: int = 32,
        reporter: Reporter | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer, self.max_length = tokenizer, model.config.max_positions
        self._engine = Engine(model, stop_ids, batch)
        self._reporter = reporter or Reporter(quiet=True)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, which the harness caches requests under."""
        return self.tokenizer.name_or_path.replace("/", "__")

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Encode a text with the tokenizer's own special tokens, and no second BOS."""
        if add_special_tokens is None and has_bos_prefix(
            string, self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        more = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer(string, **more)["input_ids"]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation with the model's template."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def _loglikelihood_tokens(
        self, requests: list[type_request], **_: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; each context is read once, and a long one loses its beginning."""
        contexts: dict[tuple[int, ...], list[int]] = {}
        for number, (_, context, continuation) in enumerate(requests):
            shortened = context[-(self.max_length + 1 - len(continuation)) :]
            contexts.setdefault(tuple(shortened), []).append(number)
        candidates = [[requests[number][2] for number in numbers] for numbers in contexts.values()]
        with self._reporter.task("Scoring", len(contexts)) as bar:
            scores = likelihoods(self._engine, list(contexts), candidates, progress=bar.update_of)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for numbers, likelihood in zip(contexts.values(), scores, strict=True):
            for number, log_prob, greedy in zip(numbers, *likelihood, strict=True):
                answers[number] = (float(log_prob), bool(greedy))
                if requests[number][0] is not None:
                    self.cache_hook.add_partial(
                        "loglikelihood", requests[number][0], answers[number]
                    )
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in windows of the model's length that share no token."""
        windows: list[type_request] = []
        counts = []
        for request in requests:
            pieces = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own: list[type_request] = [(None, *make_disjoint_window(piece)) for piece in pieces]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        sums = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer up to the first stop string; a context too long to answer loses its beginning."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        for numbers in groups.values():
            settings = self._generation_settings(requests[numbers[0]].args[1])
            room = self.max_length - settings.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks = {settings.max_new_tokens} leaves no room for a prompt in the "
                    f"model's {self.max_length} positions."
                )
            prompts = [self.tok_encode(requests[number].args[0])[-room:] for number in numbers]
            generator = TextGenerator(self._engine, self.tokenizer, settings.stop)
            with self._reporter.task("Generating", len(prompts)) as bar:
                completions = generator.answers(
                    prompts, settings.max_new_tokens, settings.sampling, bar.update
                )
            for number, completion in zip(numbers, completions, strict=True):
                answers[number] = completion.text
                self.cache_hook.add_partial(
                    "generate_until", requests[number].args, completion.text
                )
        return answers

    def _generation_settings(self, options: dict[str, Any]) -> GenerationSettings:
        """Return what a task asks for in its generation_kwargs."""
        task: Any = normalize_gen_kwargs(options, _NEW_TOKENS)
        known = ("top_k", "top_p", "min_p", "repetition_penalty", "seed")
        if unknown := [name for name in task if name not in (*known, *_IGNORED)]:
            raise UserError(
                f"A task asks for {listed(unknown)} in generation_kwargs, which is not supported; "
                f"supported are {listed(known)}."
            )
        more = {name: task[name] for name in known if name in task}
        temperature = float(task.get("temperature", 0.0)) if task.get("do_sample") else 0.0
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stop = [text for text in handle_stop_sequences(task.get("until"), eos=eos) if text]
        return GenerationSettings(Sampling(temperature, **more), stop, task["max_gen_toks"])


def run_tasks(
    lm: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Run tasks of the harness, or your own.

    Args:
        lm: the model.
        tasks: names of tasks, groups or tags.
        include_path: a directory with more of them.
        limit: only the first rows of each.
        num_fewshot: examples before each question; the task's own number by default.
        chat: whether questions go through the chat template.

    Returns:
        The harness's results without its samples.

    Raises:
        UserError: no such task.

    """
    # It logs what it does not know of this model and of this machine.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=include_path)
    known = manager.match_tasks(list(tasks))
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise UserError(
            f"--harness: no task {listed(unknown)}. Add a directory of your own with "
            "--include-path DIR."
        )
    evaluate: Any = simple_evaluate  # its decorator hides its arguments
    results = evaluate(
        lm,
        tasks=known,
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        task_manager=manager,
        log_samples=False,
    )
    kept = (
        "results",
        "groups",
        "group_subtasks",
        "versions",
        "n-shot",
        "higher_is_better",
        "n-samples",
    )
    return {name: results[name] for name in kept if name in results}
