"""The loop: it moves batches in and metrics out, one step behind the device, and saves."""

import math
import signal
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxtune.config.schema import Config
from jaxtune.core.errors import Interrupted, RunError
from jaxtune.core.hardware import Memory, give_back, peak_flops
from jaxtune.data.batch import Batch
from jaxtune.data.loader import BatchSchedule, batches, local_rows, on_devices
from jaxtune.tracking.metrics_log import MetricsLog, flops_per_token, perplexity
from jaxtune.tracking.progress import Task, training_text
from jaxtune.tracking.run_directory import CONFIG
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.interrupt import StopRequest
from jaxtune.training.optimizer import schedule
from jaxtune.training.profile import Profile
from jaxtune.training.setup import Setup, parameters
from jaxtune.training.state import TrainState
from jaxtune.training.step import StepMetrics, eval_step, train_step
from jaxtune.training.watchdog import Watchdog


@dataclass(frozen=True)
class Pending:
    """A step whose metrics are still on the device."""

    index: int
    tokens: int
    padding: int
    peak_bytes: int | None
    metrics: StepMetrics


class Recorder:
    """Turns the steps' metrics into rows of the log, and stops the run at the first that is not
    finite.
    """

    def __init__(self, setup: Setup, log: MetricsLog, task: Task) -> None:
        self.setup, self.log, self.task = setup, log, task
        rates = jax.vmap(schedule(setup.config.optimizer, len(setup.plan)))(
            np.arange(len(setup.plan))
        )
        self._rates = np.asarray(
            rates
        )  # all at once: asked for at every step, a device would have to finish the step first
        self._flops = flops_per_token(parameters(setup.frozen.base), parameters(setup.trainable))
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * setup.mesh.size if peak else None
        self._since = time.monotonic()

    def restart_clock(self) -> None:
        """Do not count what was done since the last row (an evaluation, a checkpoint) to the
        next step.
        """
        self._since = time.monotonic()

    def record(self, pending: Pending) -> None:
        """Fetch a step's metrics and write its row.

        Raises:
            RunError: the loss or the gradient is not finite.

        """
        metrics = jax.device_get(pending.metrics)
        loss, norm, supervised = (float(value) for value in metrics[:3])
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        step = pending.index + 1
        rate = pending.tokens / seconds
        row = {
            "split": "train",
            "step": step,
            "epoch": round(self.setup.plan.epoch(pending.index), 6),
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": float(self._rates[pending.index]),
            "supervised_tokens": supervised,
            "tokens": pending.tokens,
            "padding": pending.padding,
            "step_seconds": round(seconds, 4),
            "tokens_per_second": round(rate, 1),
            "mfu": round(rate * self._flops / self._peak, 4) if self._peak else None,
            "peak_bytes": pending.peak_bytes,
            **{name: float(value) for name, value in metrics.figures.items()},
        }
        self.log.write(row)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise RunError(
                f"Step {step}: the loss is {loss} and the gradient's norm {norm}. The run has "
                "stopped; the checkpoints before it are kept. "
                "Lower optimizer.learning_rate, set optimizer.clip_norm, or look at this step's "
                "rows, and start over with --fresh."
            )
        self.task.update(step, training_text(row))


def fit(
    setup: Setup,
    state: TrainState,
    log: MetricsLog,
    checkpoints: Checkpoints,
    task: Task,
    evaluate: Callable[[TrainState, int], bool],
) -> TrainState:
    """Train from `state` to the end of the plan, or until an evaluation says that it is enough.

    Args:
        setup: the run.
        state: where it begins; donated.
        log: gets a row a step.
        checkpoints: gets a checkpoint every `checkpoint.every` steps and at the end.
        task: the progress bar.
        evaluate: called with the state every `train.eval_every` steps, and says whether training
            shall end; after the last step only where the best state is kept.

    Raises:
        Interrupted: Ctrl-C or SIGTERM came; the state is saved.
        RunError: a loss or gradient that is not finite.

    """
    config, total = setup.config, len(setup.plan)
    compiled = _Compiled(setup)
    recorder = Recorder(setup, log, task)
    pending: Pending | None = None
    profile = Profile(config.run.dir, config.run.profile)
    with StopRequest() as stop, Watchdog(config.run.watchdog) as watchdog, closing(profile):
        for loaded in batches(setup.plan, int(state.step), setup.micro_batches, setup.mesh):
            run, peak = compiled(state, loaded.batch)
            profile.before()
            state, metrics = run(state, setup.frozen, loaded.batch)
            profile.after(metrics)
            if pending:
                recorder.record(pending)
            pending = Pending(loaded.index, loaded.tokens, loaded.padding, peak, metrics)
            done = loaded.index + 1
            evaluates = _evaluates(config, done, total)
            saves = done % config.checkpoint.every == 0 or done == total
            stopped = stop.after(done)
            watchdog.alive(f"step {done + 1}")
            if evaluates or saves or stopped:
                recorder.record(pending)
                pending = None
                watchdog.rest()
                enough = evaluates and evaluate(state, done)
                if saves or stopped or enough:
                    log.sync()
                    checkpoints.save(state)
                if enough:
                    return state
                recorder.restart_clock()
                watchdog.alive(f"step {done + 1}")
            if stopped and done < total:
                checkpoints.wait()
                raise Interrupted(stopped, _how_to_go_on(setup, stopped, done))
    return state


def _evaluates(config: Config, done: int, total: int) -> bool:
    """Whether there is an evaluation on the way after so many steps."""
    every = config.train.eval_every
    if done == total:
        return config.checkpoint.best is not None
    return bool(every) and done % (every or 1) == 0


class _Compiled:
    """The step compiled once a batch shape, with what it takes of a device's memory."""

    def __init__(self, setup: Setup) -> None:
        self._frozen = setup.frozen
        self._step = train_step(setup.spec, setup.optimizer, setup.config.train.ema, setup.layout)
        self._programs: dict[tuple[int, ...], tuple[Any, int | None]] = {}

    def __call__(self, state: TrainState, batch: Batch) -> tuple[Any, int | None]:
        shape = batch.input_ids.shape
        if shape not in self._programs:
            program = self._step.lower(state, self._frozen, batch).compile()
            give_back()
            found = Memory.of(program)
            self._programs[shape] = program, found and found.peak
        return self._programs[shape]


class Evaluator:
    """The objective over all evaluation rows: sums of losses and weights, divided once.

    Args:
        setup: the run; its `eval_plan` must be there.

    """

    def __init__(self, setup: Setup, plan: BatchSchedule) -> None:
        self.setup, self.plan = setup, plan
        self._step = eval_step(setup.spec)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """The loss with the objective's other figures; of supervised training in nats per
        supervised token, and perplexity.
        """
        sums, leaves = [], self.setup.best(state)
        wanted = local_rows(self.plan.layout.rows, 1, self.setup.mesh)
        for index in range(len(self.plan)):
            batch = on_devices(self.plan.batch(index, wanted), 1, self.setup.mesh)
            sums.append(
                self._step(leaves, self.setup.frozen, jax.tree.map(lambda part: part[0], batch))
            )
        loss, weight, figures = jax.tree.map(
            lambda *parts: float(np.sum(np.asarray(parts, np.float64))), *jax.device_get(sums)
        )
        found = {"loss": loss / weight}
        found |= {} if self.setup.config.on_pairs else {"perplexity": perplexity(loss / weight)}
        return found | {name: value / weight for name, value in figures.items()}


def _how_to_go_on(setup: Setup, number: int, step: int) -> str:
    directory = setup.config.run.dir
    return (
        f"{signal.Signals(number).name}: stopped after step {step} of {len(setup.plan)}; it is "
        "saved.\n"
        f"Go on with: jaxtune train {directory}/{CONFIG}"
    )
