"""jaxtune from Python; the command line is a thin layer over the same workflows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxtune.config.load import validated
from jaxtune.config.schema import Config
from jaxtune.core import runtime
from jaxtune.evaluation.evaluate import EvalOptions
from jaxtune.inference.sampling import Sampling
from jaxtune.objectives.objective import Objective
from jaxtune.planning.planner import Plan
from jaxtune.planning.planner import plan as plan_run
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import load_run
from jaxtune.training.callbacks import Callback
from jaxtune.workflows.convert import convert_to
from jaxtune.workflows.evaluate import evaluate_model
from jaxtune.workflows.export import export_run
from jaxtune.workflows.generate import Prompt, generate_completions
from jaxtune.workflows.load import Pair, open_model
from jaxtune.workflows.train import Metrics, Run, run


def load(
    model: str, adapter: str | None = None, dtype: str = "auto", mesh: Mesh | None = None
) -> Pair:
    """Return `(model, tokenizer)`; `model(input_ids)` returns float32 logits.

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
    """Train, or continue a run that was stopped.

    Args:
        config: a `Config`, nested keys, or a YAML file.
        callbacks: see every step and every evaluation, and may end training; see
            `training.callbacks.Callback`.
        objective: what to minimize instead of the objective that `train.objective` names, which
            still says what the data looks like.
        metrics: further metrics of the evaluations before and after training, by name: functions of
            the predictions, rows as in predictions.jsonl.
        fresh: remove an earlier run in the same directory instead of continuing it.
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
    """Evaluate a model on a file, a directory or a data set of the hub; see `evaluation.evaluate`.

    With the model of a run directory, rows are read as the run's configuration says (`data.format`,
    `data.columns`, `data.on_error`).

    Args:
        model: as in `load`, or a loaded pair.
        data: the rows.
        adapter: a PEFT adapter directory.
        task: auto (by the answers), lm, classification, qa, generation or choice.
        batch_size: rows computed together; it changes no number.
        max_new_tokens: of a generated answer; by default 1.5 times the longest reference answer,
            and 16 more.
        base: also evaluate the model without its adapter, or what a run began with, and compare the
            two row by row.
        against: the same with another model.
        quiet: no progress.

    Returns:
        The metrics, with their 95% intervals under `intervals`; with `base` or `against` that
        model's under `base`, and under `comparison` for each metric the difference, its interval
        and a p-value.

    Raises:
        UserError: a bad file, model or task, or a model without a tokenizer.

    """
    return evaluate_model(
        model,
        data,
        adapter,
        options=EvalOptions(task, batch_size, max_new_tokens),
        base=base,
        against=against,
        reporter=Reporter(quiet),
    ).metrics


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
    """Return the model's answer to every prompt.

    Args:
        model: as in `load`, or a loaded pair.
        prompts: texts, or lists of messages with role and content. A text is a user's message where
            the tokenizer has a chat template, and is continued as it is where it has none.
        adapter: a PEFT adapter directory.
        max_new_tokens: the longest answer.
        temperature: 0 is greedy.
        top_k: sample only from the k most likely tokens; 0 is all.
        top_p: sample only from the most likely tokens that together reach probability p.
        min_p: sample only from tokens at least this share as likely as the most likely one.
        repetition_penalty: above 1 makes tokens less likely that were there before.
        stop: texts that end an answer and are not part of it.
        seed: seed of the draws.
        batch_size: prompts computed together.

    Raises:
        UserError: a bad model or prompt, or a model without a tokenizer.

    """
    result = generate_completions(
        model,
        prompts,
        adapter,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed),
        stop=stop,
        batch_size=batch_size,
    )
    return [completion.text for completion in result.completions]


def export(
    run_dir: str | Path,
    to: str = "peft",
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    push: str | None = None,
    exact: bool = False,
) -> Path:
    """Export what a run trained, verified; see `weights.export` and `weights.convert`.

    Args:
        run_dir: the run; of one that has not finished the newest checkpoint is exported.
        to: `peft` (the adapter), or with the adapter merged into its base `hf`, `gguf`, `meta`,
            `orbax` or another format of `weights.formats`.
        out: the directory to make; for gguf also a file that ends in .gguf.
        dtype: of merged weights: float32, bfloat16, float16, for gguf also q8_0; the base's by
            default.
        push: a repository of the hub to upload it to.
        exact: of an adapter, to keep each module's scale and rank as trained, which PEFT reads but
            vLLM and llama.cpp do not; by default it has one rank and one scale, and computes the
            same.

    Returns:
        `out`.

    Raises:
        UserError: not a run, no checkpoint, `out` exists, or a format that has no place for the
            model.
        RunError: the export does not compute what was trained.

    """
    return export_run(run_dir, out, to, dtype=dtype, push=push, exact=exact).path


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

    Returns:
        `out`.

    Raises:
        UserError: a bad model, `out` exists, or a format that has no place for the model.
        RunError: what was written is not the same model.

    """
    return convert_to(model, out, to, dtype=dtype, adapter=adapter, push=push).path


def plan(config: Config | dict | str | Path, on: str) -> Plan:
    """Compile a run's step for hardware that is not there: does it fit, and how fast may it be; see
    `planning.planner`.

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
    return config if isinstance(config, Config) else load_run(Path(config))
