"""jaxtune from Python; the command line is a thin layer over these functions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtune.config.load import load_config, validated
from jaxtune.config.schema import Config, DataSection
from jaxtune.core import distributed, runtime
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.data.chat.tokenize import prompt_ids
from jaxtune.data.formats.conversation import Conversation
from jaxtune.evaluation.evaluate import EvalOptions, Evaluation
from jaxtune.evaluation.evaluate import evaluate as evaluate_model
from jaxtune.inference.engine import Engine
from jaxtune.inference.sampling import Sampling
from jaxtune.inference.speed import Speed
from jaxtune.inference.text import Completion, TextGenerator
from jaxtune.objectives.objective import Objective
from jaxtune.planning.planner import Plan
from jaxtune.planning.planner import plan as plan_run
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.run_directory import is_run, read_config
from jaxtune.training.callbacks import Callback
from jaxtune.weights import hub
from jaxtune.weights.convert import convert_model
from jaxtune.weights.formats.registry import get_format, get_model_format
from jaxtune.weights.loaded import LoadedModel
from jaxtune.weights.peft import open_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.verify import Comparison
from jaxtune.weights.vocabulary import resize_for_adapter, tokenizer_for
from jaxtune.workflows.export import export_run
from jaxtune.workflows.load import Pair, base_and_adapter, open_both, open_model
from jaxtune.workflows.train import Metrics, Run, run

Prompt = str | list[dict[str, Any]] | Conversation


def load(
    model: str, adapter: str | None = None, dtype: str = "auto", mesh: Mesh | None = None
) -> Pair:
    """`(model, tokenizer)`; `model(input_ids)` gives float32 logits.

    Args:
        model: a hub id (org/name or org/name@revision), a directory of Hugging Face's or of Meta's
            files, a .gguf file or a run directory (whose adapter comes with it).
        adapter: a PEFT adapter directory.
        dtype: storage of the weights: auto, float32, bfloat16, float16, int8 or nf4.
        mesh: the devices; all of them by default.

    Raises:
        UserError: anything that is wrong with the model or the adapter.

    """
    loaded = open_model(model, adapter, dtype, mesh)
    return loaded.model, loaded.tokenizer


def train(
    config: Config | dict | str | Path,
    callbacks: Sequence[Callback] = (),
    *,
    objective: Objective | None = None,
    metrics: Metrics | None = None,
    fresh: bool = False,
    quiet: bool = False,
) -> Run:
    """Train, or go on with a run that was stopped.

    Args:
        config: a `Config`, nested keys, or a YAML file.
        callbacks: see every step and every evaluation, and may end training; see
            `training.callbacks.Callback`.
        objective: what to minimize instead of the objective that `train.objective` names; the data
            is still what that one takes.
        metrics: further metrics of the evaluations before and after training by name: functions of
            what the model said, in the rows of predictions.jsonl.
        fresh: remove an earlier run in the same directory instead of going on with it.
        quiet: no progress.

    Returns:
        The run: `dir`, `metrics` (rows of metrics.jsonl), `adapter` or `model` (the directory of
            what trained), `before` and `after`.

    Raises:
        UserError: anything that is wrong with the configuration, the data or the model.
        RunError: a loss that is not finite, or an export that does not verify.

    """
    runtime.start()
    return run(
        _config(config),
        Reporter(quiet),
        fresh=fresh,
        callbacks=callbacks,
        objective=objective,
        metrics=metrics,
    )


def evaluate(
    model: str | Pair,
    data: str,
    adapter: str | None = None,
    *,
    task: str = "auto",
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    base: bool = False,
    against: str | None = None,
    quiet: bool = True,
) -> dict[str, Any]:
    """Figures of a model on a file, directory or data set of the hub; see `evaluation.evaluate`.

    The rows of a run directory's model are read as its configuration says (`data.format`,
    `data.columns`, `data.on_error`).

    Args:
        model: as in `load`, or a loaded pair.
        data: the rows.
        adapter: a PEFT adapter directory.
        task: auto (by the answers), lm, classification, qa, generation or choice.
        batch_size: rows computed together; it changes no number.
        max_new_tokens: of a generated answer; by default half as many again as the longest one
            wanted.
        base: also evaluate the model without its adapter, or what a run began with, and compare the
            two row by row.
        against: the same with another model.
        quiet: no progress.

    Returns:
        The figures, with their 95% intervals under `intervals`; with `base` or `against` that
        model's under `base`, and under `comparison` for each figure the difference, its interval
        and a p-value.

    Raises:
        UserError: a bad file, model or task, or a model without a tokenizer.

    """
    return evaluated(
        model, data, adapter, task, batch_size, max_new_tokens, base, against, Reporter(quiet)
    )[0]


def evaluated(
    model: str | Pair,
    data: str,
    adapter: str | None,
    task: str,
    batch_size: int,
    max_new_tokens: int | None,
    base: bool,
    against: str | None,
    reporter: Reporter,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Like `evaluate`, with the predictions, row by row."""
    if batch_size < 1:
        raise UserError(f"batch_size = {batch_size}: must be at least 1.")
    trained_on = (
        read_config(Path(model)).data
        if isinstance(model, str | Path) and is_run(model)
        else DataSection()
    )
    section = trained_on.model_copy(update={"train": None, "split": None, "eval": str(data)})
    found: list[Evaluation] = []
    for side in _sides(model, adapter, base, against):
        with reporter.task(
            "Evaluating" if not found else "Evaluating what it is compared with", 1
        ) as bar:
            asked = EvalOptions(
                found[0].task if found else task, batch_size, max_new_tokens, bar.update_of
            )
            found.append(
                evaluate_model(side.model, side.require_tokenizer(), side.stop_ids, section, asked)
            )
        del side  # the next is opened when this one is gone
    mine, figures = found[0], found[0].figures()
    for other in found[1:]:
        figures |= {"base": other.figures(), "comparison": mine.against(other)}
        for row, theirs in zip(mine.predictions, other.predictions, strict=True):
            row["base"] = {
                name: value
                for name, value in theirs.items()
                if name not in ("place", "prompt", "wanted")
            }
    return figures, mine.predictions


def harness(
    model: str | Pair,
    tasks: Sequence[str],
    adapter: str | None = None,
    *,
    base: bool = False,
    against: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    batch_size: int = 32,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds, by `model` and, with `base` or `against`, `base`; see
    `evaluation.harness.run_tasks`.

    Raises:
        UserError: the harness is not installed, no such task, or a model without a tokenizer.

    """
    try:
        from jaxtune.evaluation.harness import HarnessModel, run_tasks
    except ModuleNotFoundError as error:
        raise UserError(
            f"lm-evaluation-harness is not installed ({error.name}): pip install "
            "'jaxtune[harness]'."
        ) from None
    options = {
        "include_path": include_path,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "chat": chat,
    }
    found: dict[str, Any] = {}
    for side in _sides(model, adapter, base, against):
        found["base" if found else "model"] = run_tasks(
            HarnessModel(side.model, side.require_tokenizer(), side.stop_ids, batch_size, reporter),
            tasks,
            **options,
        )
        del side  # the next is opened when this one is gone
    return found


def _sides(
    model: str | Pair, adapter: str | None, base: bool, against: str | None
) -> Iterator[LoadedModel]:
    """The model, and what it is compared with."""
    if base and against:
        raise UserError("--base and --against both name what to compare with. Keep one of them.")
    if base:
        trained, before = open_both(model, adapter)
        yield trained
        del trained
        yield before()
        return
    yield open_model(model, adapter)
    if against:
        yield open_model(against)


def generate(
    model: str | Pair,
    prompts: Sequence[Prompt],
    adapter: str | None = None,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 8,
) -> list[str]:
    """The model's answer to every prompt.

    Args:
        model: as in `load`, or a loaded pair.
        prompts: texts, or lists of messages with role and content. A text is a user's message where
            the tokenizer has a chat template, and is continued as it is where it has none.
        adapter: a PEFT adapter directory.
        max_new_tokens: at most so many tokens each.
        temperature: 0 is greedy.
        top_k: only the k most likely tokens; 0 is all.
        top_p: only the most likely tokens that together reach p.
        min_p: only tokens at least so likely as this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that were there before less likely.
        stop: texts that end an answer and are not part of it.
        seed: seed of the draws.
        batch_size: prompts computed together.

    Raises:
        UserError: a bad model or prompt, or a model without a tokenizer.

    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
    return [
        said.text
        for said in generated(
            model, prompts, adapter, max_new_tokens, sampling, stop, batch_size, Reporter(True)
        )[0]
    ]


def generated(
    model: str | Pair,
    prompts: Sequence[Prompt],
    adapter: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str],
    batch_size: int,
    reporter: Reporter,
) -> tuple[list[Completion], Speed]:
    """Like `generate`, with tokens, log-probabilities, why each answer ended, and the speed."""
    if max_new_tokens < 1 or batch_size < 1:
        raise UserError(
            f"max_new_tokens = {max_new_tokens} and batch_size = {batch_size}: both must be at "
            "least 1."
        )
    loaded = open_model(model, adapter)
    tokenizer = loaded.require_tokenizer()
    ids = [
        prompt_ids(tokenizer, as_conversation(prompt, f"prompt {number + 1}"))
        for number, prompt in enumerate(prompts)
    ]
    engine = Engine(loaded.model, loaded.stop_ids, min(batch_size, max(len(prompts), 1)))
    with reporter.task("Generating", len(ids), lazy=True) as bar:
        return TextGenerator(engine, tokenizer, stop).answers(
            ids, max_new_tokens, sampling, bar.update
        ), engine.speed


def export(
    run_dir: str | Path,
    to: str = "peft",
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    push: str | None = None,
) -> Path:
    """Write what a run trained in another program's format, verified; see `weights.export` and
    `weights.convert`.

    Args:
        run_dir: the run, finished or not (then its newest checkpoint is taken).
        to: `peft` (the adapter), or with the adapter merged into its base `hf`, `gguf`, `meta`,
            `orbax` or another format of `weights.formats`.
        out: the directory to make; for gguf also a file that ends in .gguf.
        dtype: of merged weights: float32, bfloat16, float16, for gguf also q8_0; the base's by
            default.
        push: a repository of the hub to upload it to.

    Raises:
        UserError: not a run, no checkpoint, `out` exists, or a format that has no place for the
            model.
        RunError: the export does not compute what was trained.

    """
    return exported(run_dir, to, out, dtype, push, Reporter(quiet=True))[0]


def exported(
    run_dir: str | Path,
    to: str,
    out: str | Path | None,
    dtype: str | None,
    push: str | None,
    reporter: Reporter,
) -> tuple[Path, Comparison]:
    """Like `export`, with what was verified."""
    if out is None:
        raise UserError("export: say where to with out=DIR (--out DIR).")
    get_format(to)
    with distributed.main_only_path(Path(out)) as place:
        _, proof = export_run(Path(run_dir), place, reporter, to, dtype)
    _push(Path(out), push, reporter)
    return Path(out), proof


def convert(
    model: str,
    out: str | Path,
    to: str = "hf",
    dtype: str | None = None,
    *,
    adapter: str | None = None,
    push: str | None = None,
) -> Path:
    """Write a model in another format, verified; see `weights.convert`.

    Args:
        model: as in `load`; the adapter of a run directory is merged.
        out: the directory to make; for gguf also a file that ends in .gguf.
        to: `hf`, `gguf`, `meta`, `orbax` or another format of `weights.formats`.
        dtype: of the weights: float32, bfloat16, float16, for gguf also q8_0; each tensor's own by
            default.
        adapter: a PEFT adapter directory to merge.
        push: a repository of the hub to upload it to.

    Raises:
        UserError: a bad model, `out` exists, or a format that has no place for the model.
        RunError: what was written is not the same model.

    """
    return converted(model, out, to, dtype, adapter, push, Reporter(quiet=True))[0]


def converted(
    model: str,
    out: str | Path,
    to: str,
    dtype: str | None,
    adapter: str | None,
    push: str | None,
    reporter: Reporter,
) -> tuple[Path, Comparison]:
    """Like `convert`, with what was verified."""
    get_model_format(to)
    runtime.start()
    model, adapter = base_and_adapter(str(model), adapter)
    opened = open_adapter(adapter) if adapter else None
    source = resize_for_adapter(resolve(model), opened)
    reporter.say(f"Writing {out}, reading it again and comparing")
    with distributed.main_only_path(Path(out)) as place:
        proof = convert_model(
            place,
            source,
            to,
            make_mesh(),
            dtype=dtype,
            adapter=opened,
            tokenizer=tokenizer_for(source, opened),
        )
    _push(Path(out), push, reporter)
    return Path(out), proof


def plan(config: Config | dict | str | Path, on: str) -> Plan:
    """Does a run fit hardware that is not there, and what does it cost; see `planning.planner`.

    Args:
        config: a `Config`, nested keys, or a YAML file.
        on: `here`, a TPU such as `v5e:4x4`, `v5p:4x4x4` or `2*v6e:8x8`, or GPUs such as `h100:16`.

    Raises:
        UserError: no such target or model, or a configuration that does not fit the mesh.
        RunError: the compiler failed.

    """
    return plan_run(_config(config), on)


def _config(config: Config | dict | str | Path) -> Config:
    if isinstance(config, dict):
        return validated(config)
    return config if isinstance(config, Config) else load_config(Path(config))


def _push(path: Path, name: str | None, reporter: Reporter) -> None:
    if name and distributed.is_main():
        reporter.say(f"Uploading to {name}")
        try:
            reporter.say(f"Uploaded: {hub.push(path, name)}")
        except UserError as error:
            raise UserError(f"{path} is written and verified, but not uploaded. {error}") from None


def as_conversation(prompt: Prompt, place: str) -> Conversation:
    """A prompt as the conversation that it begins."""
    if isinstance(prompt, Conversation):
        return prompt
    if isinstance(prompt, str):
        return Conversation(place, [{"role": "user", "content": prompt}], plain=True)
    return Conversation(place, list(prompt), plain=False)
