"""The loop: it moves batches in and metrics out, one step behind the device, and saves."""

import math
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.config.schema import Config
from jaxtune.core import distributed
from jaxtune.core.errors import Interrupted, RunError
from jaxtune.core.hardware import Memory, peak_flops, release_freed_memory
from jaxtune.data.batch import Batch
from jaxtune.data.loader import DeviceBatch
from jaxtune.tracking.metrics_log import DURING, MetricsLog, flops_per_token
from jaxtune.tracking.ownership import CONFIG
from jaxtune.tracking.progress import Task, training_text
from jaxtune.training.batch_source import BatchSource
from jaxtune.training.callbacks import Callback
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.interrupt import StopRequest, StopRequested
from jaxtune.training.optimizer import learning_rate_schedule
from jaxtune.training.profile import Profile
from jaxtune.training.setup import Setup, count_parameters
from jaxtune.training.state import TrainState
from jaxtune.training.step import StepMetrics, train_step
from jaxtune.training.watchdog import Watchdog

Evaluate = Callable[[TrainState], dict[str, float]]

_RECENT, _FEW, _DIVERGED = 50, 5, 1.5
"""Steps whose losses are remembered; after how few of them the rate is to blame; how many times the
least of them a loss is that diverges.
"""


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
        self._losses: deque[float] = deque(maxlen=_RECENT)

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
                f"stopped; the checkpoints before it are kept. {self._advise(loss)}"
            )
        self._losses.append(loss)
        self.task.update(step, training_text(row))
        return stop_reason

    def _advise(self, loss: float) -> str:
        """Return what probably made a loss or gradient that is not finite, and what to do."""
        if not self._losses:
            return (
                "It is the first step of this start, before which the weights had changed little "
                "or not at all: look at this step's rows, at the weights of model.source and "
                "adapter.init, or compute in float32 (model.compute_dtype=float32)."
            )
        if len(self._losses) < _FEW or self._losses[-1] > _DIVERGED * min(self._losses):
            return (
                f"The loss was {self._losses[0]:.3g} at first and {self._losses[-1]:.3g} before: "
                "training diverges. Lower optimizer.learning_rate or set optimizer.clip_norm, and "
                "start over with --fresh."
            )
        cause = "loss" if not math.isfinite(loss) else "gradient"
        return (
            f"The loss had not risen before, so the {cause} of one of this step's rows is probably "
            "not finite: look at them, or compute in float32 (model.compute_dtype=float32). If "
            "they are as they should be, lower optimizer.learning_rate and start over with --fresh."
        )

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
    stop: StopRequest | None = None,
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
        stop: the request to stop that `evaluate` looks at while it measures.

    Raises:
        Interrupted: Ctrl-C, SIGTERM or SIGHUP came; the state is saved.
        RunError: a loss or gradient that is not finite.

    """
    config, total = setup.config, source.num_steps
    program_for, recorder = _CompiledStep(setup), Recorder(setup, source, log, task, callbacks)
    done, stop = int(state.step), stop or StopRequest()
    pause = _Pause(config, done, total, recorder, checkpoints, evaluate=evaluate, stop=stop)
    profile = Profile(config.run.dir, config.run.profile)
    try:
        with stop, Watchdog(config.run.watchdog) as watchdog, closing(profile):
            watchdog.rest()
            stop_reason = pause.make_up(state, done)
            while done != total and stop_reason is None and pause.signalled is None:
                if (loaded := source.batch(done, state)) is None:
                    break
                program, peak = program_for(state, loaded.batch)
                profile.before()
                state, metrics = program(state, setup.frozen, loaded.batch)
                profile.after(metrics)
                done += 1
                stop_reason = pause.record_previous(Pending.of(loaded, peak, metrics))
                pause.signalled = stop.signalled()
                watchdog.alive(f"step {done + 1}")
                if done != total and pause.is_due(done):
                    watchdog.rest()
                    reason = pause(state, done, is_last=False)
                    stop_reason = stop_reason or reason
                    watchdog.alive(f"step {done + 1}")
            watchdog.rest()
            reason = pause(state, done, is_last=True)
            stop_reason = stop_reason or reason
            if pause.signalled is not None and stop_reason is None:
                checkpoints.wait()
                text = _how_to_go_on(setup, pause.signalled, done, total)
                raise Interrupted(pause.signalled, text)
    finally:
        for callback in callbacks:
            callback.on_end(done)
    return FitResult(state, done, stop_reason)


class _Pause:
    """What is done between two steps, when the device has nothing to do: a checkpoint, an
    evaluation.

    The checkpoint comes first, and an evaluation ends at once when a signal asks the run to stop:
    a machine that is taken back leaves half a minute. The run that goes on makes it up.

    Attributes:
        signalled: the signal that has asked the run to stop, if one has.

    """

    def __init__(
        self,
        config: Config,
        step: int,
        total: int | None,
        recorder: Recorder,
        checkpoints: Checkpoints,
        *,
        evaluate: Evaluate | None,
        stop: StopRequest,
    ) -> None:
        self._config, self._total, self._stop = config, total, stop
        self._recorder, self._checkpoints, self._evaluate = recorder, checkpoints, evaluate
        self._pending: Pending | None = None
        self._saved = self._evaluated = step
        self.signalled: int | None = None

    def record_previous(self, pending: Pending | None = None) -> str | None:
        """Record the step before this one; return why training shall end, if it shall."""
        previous, self._pending = self._pending, pending
        return self._recorder.record(previous) if previous else None

    def is_due(self, done: int) -> bool:
        """Return whether there is anything to do after this step."""
        return self._saves(done) or self._evaluates(done) or self.signalled is not None

    def make_up(self, state: TrainState, done: int) -> str | None:
        """Evaluate the state that a run goes on from, where the run that wrote it did not come to
        that; return why training shall end, if it shall.
        """
        is_last = done == self._total
        if not (self._evaluates_last(is_last) or (self._evaluates(done) and not is_last)):
            return None
        log = self._recorder.log
        is_logged = distributed.broadcast_from_main(lambda: log.evaluation_at(done) is not None)
        return None if is_logged else self._measure(state, done)

    def __call__(self, state: TrainState, done: int, *, is_last: bool) -> str | None:
        """Save, and evaluate; return why training shall end, if it shall."""
        stop_reason = self.record_previous()
        if self._saves(done) or is_last or stop_reason or self.signalled is not None:
            self._save(state, done)
        if self._evaluated != done and (
            self._evaluates_last(is_last) or (self._evaluates(done) and not is_last)
        ):
            stop_reason = self._measure(state, done) or stop_reason
            if self.signalled is not None or stop_reason:
                self._save(state, done)
        self._recorder.restart_clock()
        return stop_reason

    def _saves(self, done: int) -> bool:
        return done % self._config.checkpoint.every == 0

    def _evaluates(self, done: int) -> bool:
        every = self._config.train.eval_every
        return bool(self._evaluate and every and done and done % every == 0)

    def _evaluates_last(self, is_last: bool) -> bool:
        return is_last and self._evaluate is not None and self._config.checkpoint.best is not None

    def _save(self, state: TrainState, done: int) -> None:
        if self._saved == done:
            return
        self._saved = done
        self._recorder.log.sync()
        self._checkpoints.save(state)

    def _measure(self, state: TrainState, done: int) -> str | None:
        """Evaluate, unless a signal comes before it is done."""
        if self.signalled is not None or self._evaluate is None:
            return None
        try:
            metrics = self._evaluate(state)
        except StopRequested:
            self.signalled = self._stop.number
            return None
        self._evaluated = done
        return self._recorder.record_evaluation(state, done, metrics)


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
