"""A whole run: evaluate, train, evaluate, export, report."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import jax

from jaxtune.config.loading import dump
from jaxtune.config.schema import Config
from jaxtune.core import processes, runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_jsonl, write_json, write_jsonl
from jaxtune.data.chat import prompt_ids
from jaxtune.data.formats import Conversation
from jaxtune.data.inspect import histogram
from jaxtune.data.prepare import conversations
from jaxtune.evals.evaluate import Asked, evaluate
from jaxtune.exporting import export_trained, output
from jaxtune.generate.engine import Engine
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.objective import REJECTED
from jaxtune.report.page import write_report
from jaxtune.train.checkpoint import Best, Checkpoints, checkpoints_of
from jaxtune.train.inputs import comparison
from jaxtune.train.loop import Evaluator, fit
from jaxtune.train.methods import adopt_adapter
from jaxtune.train.metrics import MetricsLog, NoLog, read_metrics
from jaxtune.train.progress import Reporter
from jaxtune.train.rundir import (
    ADAPTER,
    DATA_SUMMARY,
    MODEL,
    REPORT,
    SAMPLES,
    VERIFICATION,
    RunDirectory,
    first_day,
    recall,
)
from jaxtune.train.setup import Setup, setup
from jaxtune.train.step import TrainState
from jaxtune.weights.verify import Comparison

_SAMPLES, _SAMPLE_TOKENS = 5, 64
_OPENING = 200  # characters of a text that are asked to be continued
_VERIFY_ROWS, _VERIFY_TOKENS = 4, 128


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        dir: its directory.
        adapter: the PEFT adapter; None where the weights themselves trained.
        model: the trained model in Hugging Face's format; None where an adapter trained.
        before, after: metrics on the evaluation data; None where there is none.
        verification: what the export was compared on.

    """

    dir: Path
    adapter: Path | None
    model: Path | None
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
    with processes.ending_together():
        config = adopt_adapter(config)
        day = date.fromisoformat(processes.from_lead(lambda: _begun(config, fresh)))
        parts = setup(config, reporter, day)
        plans = (("data.train", parts.plan), ("data.eval", parts.eval_plan))
        digests = {key: plan.examples.digest for key, plan in plans if plan}
        processes.alike("configuration", dump(config))
        processes.alike("training or evaluation data", str(digests))
        processes.together("agreed")
        directory = RunDirectory(config, digests, day, fresh) if processes.is_lead() else None
        processes.together("run directory")
        try:
            with jax.set_mesh(parts.mesh):
                return _run(parts, Path(config.run.dir), reporter, directory.keep_copy if directory else None)
        finally:
            if directory:
                directory.close()


def _begun(config: Config, fresh: bool) -> str:
    """The day the run began."""
    if fresh:
        return str(date.today())
    recall(config)
    return str(first_day(config.run.dir))


def _run(parts: Setup, directory: Path, reporter: Reporter, keep_copy: Callable[[], None] | None) -> Run:
    config, total = parts.config, len(parts.plan)
    _write(write_json, directory / DATA_SUMMARY, _data_summary(parts))
    checkpoints = Checkpoints(checkpoints_of(config), config.checkpoint.keep, reporter.say, keep_copy)
    best = Best(checkpoints_of(config), config.checkpoint.best, reporter.say) if config.checkpoint.best else None
    begins = checkpoints.latest is None
    state = parts.initial() if begins else checkpoints.restore(parts.layout)
    parts.release()
    if not begins:
        reporter.say(f"Going on after step {int(state.step)} of {total} ({directory})")
    log = MetricsLog(directory, int(state.step)) if processes.is_lead() else NoLog()
    try:
        before = _measured(parts, state, log, directory, 0, reporter)
        samples = _samples_before(parts, state, directory)
        on_the_way = _evaluation(parts, log, best, reporter)
        with reporter.task("Training", total, int(state.step)) as task:
            state = fit(parts, state, log, checkpoints, task, on_the_way)
        checkpoints.wait()
        if best is not None and best.step not in (None, total):
            reporter.say(f"The evaluation was best after step {best.step} ({best.metric} {best.value:.4f}): that state is taken")
            state = best.restore(parts.layout)
        after = _measured(parts, state, log, directory, total, reporter)
    finally:
        log.close()
        for opened in (checkpoints, best):
            if opened is not None:
                opened.close()
    model = parts.model(state)
    for sample, text in zip(samples, _answers(parts, model, samples), strict=True):
        sample["after"] = text
    _write(write_jsonl, directory / SAMPLES, samples)
    del state  # the export loads the model again, and the optimizer's moments are not needed any more
    kind = output(config)
    reporter.say(
        f"Exporting the {'weights' if kind == MODEL else 'adapter'}, reloading {'them' if kind == MODEL else 'it'} and comparing logits"
    )
    with processes.own_place(directory / kind) as out:
        verification = export_trained(parts, model, out, replace=True)
    _write(write_json, directory / VERIFICATION, verification.as_dict())
    _write(write_report, [directory], directory / REPORT)
    adapter, weights = (directory / name if kind == name else None for name in (ADAPTER, MODEL))
    return Run(directory, adapter, weights, before, after, verification)


def _write(write: Callable[..., Any], *arguments: Any) -> None:
    """Write what only one process of a run writes."""
    if processes.is_lead():
        write(*arguments)


def _measured(
    parts: Setup, state: TrainState, log: MetricsLog, directory: Path, step: int, reporter: Reporter
) -> dict[str, Any] | None:
    """The evaluation before (step 0) or after training: from the log where an earlier call has it, else made and logged."""
    if parts.eval_plan is None:
        return None
    found = processes.from_lead(lambda: _logged(directory, step))
    if found:
        return found
    with reporter.task("Evaluating before" if step == 0 else "Evaluating after", 1) as bar:
        model = parts.model(state)
        if parts.config.on_pairs:
            result = {"task": "preference", "rows": parts.eval_plan.examples.rows, **Evaluator(parts, parts.eval_plan)(state)}
        else:
            asked = Asked(progress=bar.update_of)
            result = evaluate(model, parts.tokenizer, parts.source.stop_ids(), parts.config.data, asked).figures()
    row = {"split": "eval", "step": step, "epoch": _epoch(parts, step), **result}
    log.write(row)
    return row


def _logged(directory: Path, step: int) -> dict[str, Any] | None:
    rows = (row for row in read_metrics(directory) if row["split"] == "eval" and row["step"] == step and "task" in row)
    return next(rows, None)


def _evaluation(parts: Setup, log: MetricsLog, best: Best | None, reporter: Reporter) -> Callable[[TrainState, int], None]:
    """The evaluation on the way: the loss, by which the best state may be kept."""
    plan = parts.eval_plan
    if plan is None:
        return lambda state, step: None
    evaluator = Evaluator(parts, plan)

    def measure(state: TrainState, step: int) -> None:
        result = evaluator(state)
        log.write({"split": "eval", "step": step, "epoch": _epoch(parts, step), **result})
        reporter.say(f"step {step}: evaluation " + ", ".join(f"{name} {value:.4f}" for name, value in result.items()))
        if best is not None:
            best.offer(state, result)

    return measure


def _epoch(parts: Setup, step: int) -> float:
    return round(parts.plan.epoch(step - 1), 6) if step else 0.0


def _sample_rows(parts: Setup) -> list[dict[str, Any]]:
    """The first rows to evaluate on, or else to train on, as prompts; of a text, its first words."""
    data, found = parts.config.data, []
    for row in conversations(data, "train" if parts.eval_plan is None else "eval", comparison=comparison(parts.config)):
        if row.label == REJECTED:
            continue
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
    found = processes.from_lead(lambda: read_jsonl(directory / SAMPLES) if (directory / SAMPLES).exists() else None)
    if found is not None:
        return found
    rows = _sample_rows(parts)
    for row, text in zip(rows, _answers(parts, parts.model(state), rows), strict=True):
        row["before"] = text
    _write(write_jsonl, directory / SAMPLES, rows)
    return rows


def _answers(parts: Setup, model: CausalLM, samples: list[dict[str, Any]]) -> list[str]:
    if not samples:
        return []
    ids = [prompt_ids(parts.tokenizer, _asked(sample)) for sample in samples]
    engine = Engine(model, parts.source.stop_ids(), batch=max(len(ids), 2))
    return parts.tokenizer.batch_decode(engine.generate(ids, _SAMPLE_TOKENS), skip_special_tokens=True)


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
