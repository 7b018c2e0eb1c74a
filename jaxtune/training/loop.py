"""The loop: it moves batches in and metrics out, one step behind the device, and saves."""

import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.core.errors import Interrupted, RunError
from jaxtune.core.hardware import Memory, peak_flops, release_freed_memory
from jaxtune.data.batch import Batch
from jaxtune.data.loader import DeviceBatch
from jaxtune.tracking.metrics_log import DURING, MetricsLog, flops_per_token
from jaxtune.tracking.progress import Task, training_text
from jaxtune.tracking.run_directory import CONFIG
from jaxtune.training.batch_source import BatchSource
from jaxtune.training.callbacks import Callback
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.interrupt import StopRequest
from jaxtune.training.optimizer import learning_rate_schedule
from jaxtune.training.profile import Profile
from jaxtune.training.setup import Setup, count_parameters
from jaxtune.training.state import TrainState
from jaxtune.training.step import StepMetrics, train_step
from jaxtune.training.watchdog import Watchdog

Evaluate = Callable[[TrainState], dict[str, float]]


@dataclass(frozen=True)
class FitResult:
    """What came of training.

    Attributes:
        state: the state after the last step.
        step: optimizer steps done.
        stopped_by: why a callback ended training; None where it went to the end.

    """

    state: TrainState
    step: int
    stopped_by: str | None


@dataclass(frozen=True)
class Pending:
    """A step whose metrics are still on the device; its batch is not held.

    Attributes:
        index, tokens, padding, batch_metrics: see `DeviceBatch`.
        peak_bytes: what the program takes of a device's memory, where that is known.
        metrics: the step's own.

    """

    index: int
    tokens: int
    padding: int
    batch_metrics: Mapping[str, float]
    peak_bytes: int | None
    metrics: StepMetrics

    @classmethod
    def of(cls, loaded: DeviceBatch, peak_bytes: int | None, metrics: StepMetrics) -> "Pending":
        """Return the pending step on this batch."""
        return cls(loaded.index, loaded.tokens, loaded.padding, loaded.metrics, peak_bytes, metrics)


class Recorder:
    """Turns the steps' metrics into rows of the log, and stops the run at the first that is not
    finite.
    """

    def __init__(
        self,
        setup: Setup,
        source: BatchSource,
        log: MetricsLog,
        task: Task,
        callbacks: Sequence[Callback],
    ) -> None:
        self.source, self.log, self.task, self.callbacks = source, log, task, callbacks
        self._schedule = learning_rate_schedule(setup.config.optimizer, setup.num_steps)
        self._rates = self._first_rates(source.num_steps or setup.num_steps)
        self._flops = flops_per_token(
            count_parameters(setup.frozen.base), count_parameters(setup.trainable)
        )
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * setup.mesh.size if peak else None
        self._since = time.monotonic()

    def restart_clock(self) -> None:
        """Do not count what was done since the last row (an evaluation, a checkpoint) to the
        next step.
        """
        self._since = time.monotonic()

    def record(self, pending: Pending) -> str | None:
        """Fetch a step's metrics, write its row and show it to the callbacks.

        Returns:
            Why training shall end, where a callback says so.

        Raises:
            RunError: the loss or the gradient is not finite.

        """
        metrics = jax.device_get(pending.metrics)
        loss, norm, supervised = (float(value) for value in metrics[:3])
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        step, speed = pending.index + 1, pending.tokens / seconds
        row = {
            "split": "train",
            "step": step,
            "epoch": round(self.source.epoch(pending.index), 6),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": self._rate(pending.index),
            "supervised_tokens": supervised,
            "tokens": pending.tokens,
            "padding": pending.padding,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(speed, 1),
            "mfu": round(speed * self._flops / self._peak, 4) if self._peak else None,
            "peak_bytes": pending.peak_bytes,
            **{name: float(value) for name, value in metrics.extra.items()},
            **pending.batch_metrics,
        }
        self.log.write(row)
        stop_reason = _first_reason(callback.on_step(row) for callback in self.callbacks)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"Step {step}: the loss is {loss} and the gradient's norm {norm}. The run has "
                "stopped; the checkpoints before it are kept. Lower optimizer.learning_rate, set "
                "optimizer.clip_norm, or look at this step's rows, and start over with --fresh."
            )
        self.task.update(step, training_text(row))
        return stop_reason

    def record_evaluation(
        self, state: TrainState, step: int, metrics: dict[str, float]
    ) -> str | None:
        """Write the row of an evaluation during training and show it to the callbacks.

        Returns:
            Why training shall end, where a callback says so.

        """
        epoch = round(self.source.epoch(step - 1), 6)
        row = {"split": "eval", "step": step, "epoch": epoch, "phase": DURING}
        self.log.write(row | metrics)
        return _first_reason(
            callback.on_evaluation(step, metrics, state) for callback in self.callbacks
        )

    def _rate(self, index: int) -> float:
        if index >= len(self._rates):  # of a source whose length is not known
            self._rates = self._first_rates(2 * index)
        return float(self._rates[index])

    def _first_rates(self, count: int) -> np.ndarray:
        """Return the learning rates of this many steps, all at once: asked for at every step, a
        device would have to finish the step first.
        """
        return np.asarray(jax.vmap(self._schedule)(np.arange(count)))


def fit(
    setup: Setup,
    state: TrainState,
    source: BatchSource,
    *,
    log: MetricsLog,
    checkpoints: Checkpoints,
    task: Task,
    evaluate: Evaluate | None = None,
    callbacks: Sequence[Callback] = (),
) -> FitResult:
    """Train from `state` until the source ends, or until a callback says that it is enough.

    Args:
        setup: the run.
        state: where it begins; donated.
        source: gives the batches.
        log: gets a row a step and one an evaluation.
        checkpoints: gets a checkpoint every `checkpoint.every` steps and at the end.
        task: the progress bar.
        evaluate: measures the state every `train.eval_every` steps; after the last one only where
            the best state is kept.
        callbacks: see every row and every evaluation, in this order.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the state is saved.
        RunError: a loss or gradient that is not finite.

    """
    config, total = setup.config, source.num_steps
    program_for, recorder = _CompiledStep(setup), Recorder(setup, source, log, task, callbacks)
    done, stop_reason = int(state.step), None
    pause = _Pause(done, recorder, checkpoints, evaluate)
    profile = Profile(config.run.dir, config.run.profile)
    try:
        with StopRequest() as stop, Watchdog(config.run.watchdog) as watchdog, closing(profile):
            while done != total and stop_reason is None:
                if (loaded := source.batch(done, state)) is None:
                    break
                program, peak = program_for(state, loaded.batch)
                profile.before()
                state, metrics = program(state, setup.frozen, loaded.batch)
                profile.after(metrics)
                done += 1
                stop_reason = pause.record_previous(Pending.of(loaded, peak, metrics))
                signalled = stop.after(done)
                watchdog.alive(f"step {done + 1}")
                if done == total:
                    break
                evaluates = config.train.eval_every and done % config.train.eval_every == 0
                saves = done % config.checkpoint.every == 0 or signalled
                if evaluates or saves:
                    watchdog.rest()
                    reason = pause(state, done, evaluates=bool(evaluates), saves=bool(saves))
                    stop_reason = stop_reason or reason
                    watchdog.alive(f"step {done + 1}")
                if signalled and stop_reason is None:
                    checkpoints.wait()
                    raise Interrupted(signalled, _how_to_go_on(setup, signalled, done, total))
            watchdog.rest()
            reason = pause(state, done, evaluates=config.checkpoint.best is not None, saves=True)
    finally:
        for callback in callbacks:
            callback.on_end(done)
    return FitResult(state, done, stop_reason or reason)


class _Pause:
    """What is done between two steps, when the device has nothing to do: an evaluation, a
    checkpoint.
    """

    def __init__(
        self, step: int, recorder: Recorder, checkpoints: Checkpoints, evaluate: Evaluate | None
    ) -> None:
        self._recorder, self._checkpoints, self._evaluate = recorder, checkpoints, evaluate
        self._pending: Pending | None = None
        self._saved = self._evaluated = step

    def record_previous(self, pending: Pending | None = None) -> str | None:
        """Record the step before this one; return why training shall end, if it shall."""
        previous, self._pending = self._pending, pending
        return self._recorder.record(previous) if previous else None

    def __call__(self, state: TrainState, done: int, *, evaluates: bool, saves: bool) -> str | None:
        """Evaluate, and save; return why training shall end, if it shall."""
        stop_reason = self.record_previous()
        if evaluates and self._evaluate and self._evaluated != done:
            self._evaluated = done
            reason = self._recorder.record_evaluation(state, done, self._evaluate(state))
            stop_reason = stop_reason or reason
        if (saves or stop_reason) and self._saved != done:
            self._saved = done
            self._recorder.log.sync()
            self._checkpoints.save(state)
        self._recorder.restart_clock()
        return stop_reason


class _CompiledStep:
    """The step compiled once a batch shape, with what it takes of a device's memory."""

    def __init__(self, setup: Setup) -> None:
        self._frozen, decay = setup.frozen, setup.config.train.ema
        self._step = train_step(setup.spec, setup.optimizer, decay, setup.state_layout)
        self._programs: dict[tuple[int, ...], tuple[Any, int | None]] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[Any, int | None]:
        """Return the program for this batch and its peak memory in bytes, where that is known."""
        shape = batch.input_ids.shape
        if shape not in self._programs:
            program = self._step.lower(state, self._frozen, batch).compile()
            release_freed_memory()
            memory = Memory.of(program)
            self._programs[shape] = program, memory and memory.peak
        return self._programs[shape]


def _first_reason(reasons: Iterable[str | None]) -> str | None:
    """Return the first answer of the callbacks that ends training, after all were called."""
    return next((reason for reason in list(reasons) if reason is not None), None)


def _how_to_go_on(setup: Setup, number: int, step: int, total: int | None) -> str:
    of_total = "" if total is None else f" of {total}"
    return (
        f"{signal.Signals(number).name}: stopped after step {step}{of_total}; it is saved.\n"
        f"Go on with: jaxtune train {setup.config.run.dir}/{CONFIG}"
    )
