"""A whole run: evaluate, train, evaluate, export, report."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune.config.schema import Config
from jaxtune.core import runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json, read_jsonl, refuse_existing, write_json, write_jsonl
from jaxtune.core.mesh import make_mesh
from jaxtune.data.chat import prompt_ids
from jaxtune.data.formats import Conversation
from jaxtune.data.inspect import histogram
from jaxtune.data.prepare import conversations
from jaxtune.evals.evaluate import evaluate
from jaxtune.generate.engine import Engine
from jaxtune.models.decoder import CausalLM
from jaxtune.report.page import write_report
from jaxtune.train.checkpoint import Checkpoints
from jaxtune.train.loop import Evaluator, fit
from jaxtune.train.metrics import MetricsLog, read_metrics
from jaxtune.train.progress import Reporter
from jaxtune.train.rundir import (
    ADAPTER,
    DATA_SUMMARY,
    REPORT,
    SAMPLES,
    VERIFICATION,
    RunDirectory,
    first_day,
    is_run,
    read_config,
)
from jaxtune.train.setup import Setup, adopt_adapter, setup
from jaxtune.train.step import TrainState, init_state
from jaxtune.weights.convert import convert_model
from jaxtune.weights.export import export_adapter
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.verify import TEXT, Comparison, padded, texts_of
from jaxtune.weights.vocabulary import for_adapter, tokenizer_for

_SAMPLES, _SAMPLE_TOKENS = 5, 64
_OPENING = 200  # characters of a text that are asked to be continued
_VERIFY_ROWS, _VERIFY_TOKENS = 4, 128


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        dir: its directory.
        adapter: the PEFT adapter.
        before, after: metrics on the evaluation data; None where there is none.
        verification: what the export was compared on.

    """

    dir: Path
    adapter: Path
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    verification: Comparison

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_metrics(self.dir)


def run(config: Config, reporter: Reporter, *, fresh: bool = False) -> Run:
    """Train as `config` says, or go on where an earlier call was stopped.

    Raises:
        UserError, RunFailure, Interrupted: see `api.train` and `train.loop.fit`.

    """
    runtime.start()
    config = adopt_adapter(config)
    day = date.today() if fresh else first_day(config.run.dir)
    parts = setup(config, reporter, day)
    plans = (("data.train", parts.plan), ("data.eval", parts.eval_plan))
    directory = RunDirectory(config, {key: plan.examples.digest for key, plan in plans if plan}, day, fresh)
    try:
        with jax.set_mesh(parts.mesh):
            return _run(parts, directory.path, reporter)
    finally:
        directory.close()


def export_run(
    directory: Path, out: Path, reporter: Reporter, to: str = "peft", dtype: str | None = None
) -> tuple[Path, Comparison]:
    """A verified export of a run: its adapter, or its base with the adapter merged.

    A finished run is its adapter, and needs its data no more; of an unfinished one the newest checkpoint counts.

    Args:
        directory: the run.
        out: what to make.
        reporter: progress.
        to: `peft`, or a format of `weights.convert`.
        dtype: of merged weights; the base's by default.

    Raises:
        UserError: not a run, no checkpoint yet, or a format that has no place for the model.
        RunFailure: the export is not what was trained.

    """
    runtime.start()
    if not is_run(directory):
        raise UserError(f"{directory} is not a run directory: it has no config.yaml.")
    config = read_config(directory)
    if (directory / ADAPTER).is_dir():
        return out, _export_finished(config, directory, out, to, dtype)
    parts = setup(config, reporter, first_day(directory))
    checkpoints = Checkpoints(directory, config.checkpoint.keep)
    try:
        if checkpoints.latest is None:
            raise UserError(f"{directory} has no checkpoint yet. Train first: jaxtune train {directory}/config.yaml")
        state = checkpoints.restore(_initial(parts))
    finally:
        checkpoints.close()
    with jax.set_mesh(parts.mesh):
        if to == "peft":
            return out, _export(parts, state, out, replace=False)
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(scratch), parts.model(state.trainable), parts.source.name)
            adapter, about = open_adapter(scratch), _about(config, directory)
            tokenizer = parts.tokenizer
            return out, convert_model(
                out, parts.source, to, parts.mesh, dtype=dtype, adapter=adapter, tokenizer=tokenizer, about=about
            )


def _export_finished(config: Config, directory: Path, out: Path, to: str, dtype: str | None) -> Comparison:
    adapter, mesh = open_adapter(directory / ADAPTER), make_mesh()
    source, about, kind = for_adapter(resolve(config.model.source), adapter), _about(config, directory), config.model
    tokenizer = tokenizer_for(source, adapter)
    if to != "peft":
        return convert_model(out, source, to, mesh, dtype=dtype, adapter=adapter, tokenizer=tokenizer, about=about)
    refuse_existing(out)
    model = load_model(source, mesh, dtype=kind.dtype, compute=kind.compute_dtype)
    attach(model, adapter, mesh)
    texts = texts_of(tokenizer, model.config.vocab_size)
    return export_adapter(out, model, source, tokenizer, texts, mesh, dtype=kind.dtype, compute=kind.compute_dtype, about=about)


def _run(parts: Setup, directory: Path, reporter: Reporter) -> Run:
    config, total = parts.config, len(parts.plan)
    write_json(directory / DATA_SUMMARY, _data_summary(parts))
    checkpoints = Checkpoints(directory, config.checkpoint.keep)
    state = _initial(parts)
    if checkpoints.latest is not None:
        state = checkpoints.restore(state)
        reporter.say(f"Going on after step {int(state.step)} of {total} ({directory})")
    log = MetricsLog(directory, int(state.step))
    try:
        before = _measured(parts, state, log, directory, 0, reporter)
        samples = _samples_before(parts, state, directory)
        on_the_way = _evaluation(parts, log, reporter)
        with reporter.task("Training", total, int(state.step)) as task:
            state = fit(parts, state, log, checkpoints, task, on_the_way)
        checkpoints.wait()
        after = _measured(parts, state, log, directory, total, reporter)
    finally:
        log.close()
        checkpoints.close()
    model = parts.model(state.trainable)
    for sample, text in zip(samples, _answers(parts, model, samples), strict=True):
        sample["after"] = text
    write_jsonl(directory / SAMPLES, samples)
    reporter.say("Exporting the adapter, reloading it and comparing logits")
    verification = _export(parts, state, directory / ADAPTER, replace=True)
    write_json(directory / VERIFICATION, verification.as_dict())
    write_report([directory], directory / REPORT)
    return Run(directory, directory / ADAPTER, before, after, verification)


def _initial(parts: Setup) -> TrainState:
    """The state before the first step. Its leaves are copies: the step donates its state, and `parts` is used again."""
    state = init_state(jax.tree.map(jnp.copy, parts.trainable), parts.optimizer, parts.config.train.seed)
    everywhere = NamedSharding(parts.mesh, PartitionSpec())

    def place(leaf: Any) -> Any:
        return leaf if isinstance(leaf.sharding, NamedSharding) else jax.device_put(leaf, everywhere)

    return jax.tree.map(place, state)


def _measured(
    parts: Setup, state: TrainState, log: MetricsLog, directory: Path, step: int, reporter: Reporter
) -> dict[str, Any] | None:
    """The evaluation before (step 0) or after training: from the log where an earlier call has it, else made and logged."""
    if parts.eval_plan is None:
        return None
    found = [row for row in read_metrics(directory) if row["split"] == "eval" and row["step"] == step and "task" in row]
    if found:
        return found[0]
    with reporter.task("Evaluating before" if step == 0 else "Evaluating after", 1) as bar:
        model = parts.model(state.trainable)
        result = evaluate(model, parts.tokenizer, parts.source.stop_ids(), parts.config.data, progress=bar.update_of)
    row = {"split": "eval", "step": step, "epoch": _epoch(parts, step), **result}
    log.write(row)
    return row


def _evaluation(parts: Setup, log: MetricsLog, reporter: Reporter) -> Callable[[TrainState, int], None]:
    """The evaluation on the way: the loss."""
    plan = parts.eval_plan
    if plan is None:
        return lambda state, step: None
    evaluator = Evaluator(parts, plan)

    def measure(state: TrainState, step: int) -> None:
        result = evaluator(state)
        log.write({"split": "eval", "step": step, "epoch": _epoch(parts, step), **result})
        reporter.say(f"step {step}: evaluation loss {result['loss']:.4f}, perplexity {result['perplexity']:.3f}")

    return measure


def _epoch(parts: Setup, step: int) -> float:
    return round(parts.plan.epoch(step - 1), 6) if step else 0.0


def _sample_rows(parts: Setup) -> list[dict[str, Any]]:
    """The first rows to evaluate on, or else to train on, as prompts; of a text, its first words."""
    data, found = parts.config.data, []
    for row in conversations(data, "train" if parts.eval_plan is None else "eval"):
        prompt, wanted = row.prompt, row.answer
        if row.text:
            text = row.messages[0]["content"]
            prompt, wanted = [{"role": "user", "content": text[:_OPENING]}], text[_OPENING : 3 * _OPENING]
        sample = {"place": str(row.place), "prompt": prompt, "wanted": wanted, "plain": row.plain, "text": row.text}
        sample |= {"options": dict(row.options)} if row.options else {}
        if prompt and _is_prompt(parts, sample):
            found.append(sample)
        if len(found) == _SAMPLES:
            break
    return found


def _is_prompt(parts: Setup, sample: dict[str, Any]) -> bool:
    try:
        return bool(prompt_ids(parts.tokenizer, _asked(sample)))
    except UserError:  # a row that data.on_error=skip left out of training too
        return False


def _asked(sample: dict[str, Any]) -> Conversation:
    plain, text = sample.get("plain", True), sample.get("text", False)
    return Conversation(sample["place"], sample["prompt"], plain, text, sample.get("options", {}))


def _samples_before(parts: Setup, state: TrainState, directory: Path) -> list[dict[str, Any]]:
    """Prompts with the answers wanted and the answers before training; read back where an earlier call wrote them."""
    if (directory / SAMPLES).exists():
        return read_jsonl(directory / SAMPLES)
    rows = _sample_rows(parts)
    for row, text in zip(rows, _answers(parts, parts.model(state.trainable), rows), strict=True):
        row["before"] = text
    write_jsonl(directory / SAMPLES, rows)
    return rows


def _answers(parts: Setup, model: CausalLM, samples: list[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    ids = [prompt_ids(parts.tokenizer, _asked(sample)) for sample in samples]
    engine = Engine(model, parts.source.stop_ids(), batch=max(len(ids), 2))
    return parts.tokenizer.batch_decode(engine.generate(ids, _SAMPLE_TOKENS), skip_special_tokens=True)


def _export(parts: Setup, state: TrainState, out: Path, *, replace: bool) -> Comparison:
    texts = [item.ids[:_VERIFY_TOKENS].tolist() for item in parts.plan.examples.items[:_VERIFY_ROWS]]
    texts += [parts.tokenizer(text)["input_ids"] for text in TEXT]
    model, kind = parts.model(state.trainable), parts.config.model
    return export_adapter(
        out,
        model,
        parts.source,
        parts.tokenizer,
        padded(texts),
        parts.mesh,
        dtype=kind.dtype,
        compute=kind.compute_dtype,
        about=_about(parts.config, Path(parts.config.run.dir)),
        replace=replace,
    )


def _about(config: Config, directory: Path) -> str:
    """Data, hyperparameters and metrics for a model card."""
    data = read_json(directory / DATA_SUMMARY)
    rows, names = data["train"]["rows"], {part: _source_names(config, part) for part in ("train", "eval")}
    lines = ["## Data", "", f"- trained on {names['train']}: {rows} rows"]
    lines += [f"- evaluated on {names['eval'] or config.data.split}: {data['eval']['rows']} rows"] if "eval" in data else []
    kept = config.model_dump(mode="json", include={"adapter", "optimizer", "train", "data"}, exclude={"data": {"train", "eval"}})
    lines += ["", "## Hyperparameters", "", "```yaml", yaml.safe_dump(kept, sort_keys=False).rstrip(), "```"]
    rows = [row for row in read_metrics(directory) if row["split"] == "eval" and "task" in row]
    if rows:
        names = [name for name, value in rows[-1].items() if isinstance(value, float) and name != "epoch"]
        lines += [
            "",
            "## Metrics on the evaluation data",
            "",
            "| step | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        lines += [f"| {row['step']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |" for row in rows]
    return "\n" + "\n".join(lines) + "\n"


def _source_names(config: Config, part: Any) -> str:
    """The sources' names without their folders."""
    return ", ".join(f"`{Path(entry.source).name}`" for entry in config.data.entries(part))


def _data_summary(parts: Setup) -> dict[str, Any]:
    plans = {"train": parts.plan, "eval": parts.eval_plan}
    return {
        name: {
            **plan.examples.summary(),
            "packing_efficiency": round(plan.efficiency(), 4),
            "steps": len(plan),
            "lengths": histogram(plan.examples.lengths),
        }
        for name, plan in plans.items()
        if plan
    }
