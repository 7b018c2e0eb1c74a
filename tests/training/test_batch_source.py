"""The seams of the loop: a batch source that makes batches from the state, and callbacks."""

from datetime import date

import chex
import jax
import numpy as np
import pytest

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.mesh import make_mesh
from jaxtune.data.loader import DeviceBatch
from jaxtune.objectives.objective import Objective, Sums
from jaxtune.objectives.sft import sft
from jaxtune.tracking.metrics_log import DURING, MetricsLog, phase_of, read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import checkpoint_directory
from jaxtune.training import setup
from jaxtune.training.batch_source import ScheduledBatches, to_devices
from jaxtune.training.callbacks import Callback
from jaxtune.training.checkpoint import Checkpoints, steps_saved
from jaxtune.training.loop import fit
from jaxtune.training.setup import build_setup
from tests.support import tools
from tests.support.steps import LENGTH, batch_of

pytestmark = pytest.mark.usefixtures("quick_compilation")
STEPS = 8
TIMES = ("step_seconds", "tokens_per_second", "mfu", "peak_bytes")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tools.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tools.sums(32))


def config(directory, model, rows, *keys):
    common = {
        "model.source": model, "data.train": rows, "run.dir": directory, "data.max_length": 64,
        "optimizer.learning_rate": 1e-2, "optimizer.schedule": "constant", "train.batch_size": 4,
        "train.steps": STEPS, "adapter.rank": 4, "checkpoint.every": 3,
    }  # fmt: skip
    return load_config(overrides=[*(f"{key}={value}" for key, value in common.items()), *keys])


class FromState:
    """Batches drawn by what the state is: its step, and the size of what has been learned."""

    def __init__(self, parts, num_steps=STEPS, last=None):
        self.mesh, self.num_steps, self.last = parts.mesh, num_steps, last
        self.seen = []

    def batch(self, index, state):
        if index == self.last:
            return None
        step, learned = int(state.step), float(sum(map(self._size, self._leaves(state))))
        self.seen.append((index, step, learned))
        random = np.random.default_rng([step, int(learned * 1e6)])
        rows = [
            (random.integers(0, 256, LENGTH + 1), random.random(LENGTH + 1) < 0.5) for _ in range(4)
        ]
        return to_devices(index, batch_of(rows), 1, self.mesh, learned=learned)

    def epoch(self, index):
        return float(index + 1)

    def _leaves(self, state):
        return jax.tree.leaves(state.trainable)

    def _size(self, leaf):
        return np.abs(np.asarray(leaf)).sum()


class Watch(Callback):
    def __init__(self, stop_after=None, kill_after=None):
        self.rows, self.evaluations, self.ended = [], [], []
        self.stop_after, self.kill_after = stop_after, kill_after

    def on_step(self, row):
        self.rows.append(row)
        if row["step"] == self.kill_after:
            raise KeyboardInterrupt
        return "enough is enough" if row["step"] == self.stop_after else None

    def on_evaluation(self, step, metrics, state):
        self.evaluations.append((step, metrics["loss"], int(state.step)))

    def on_end(self, step):
        self.ended.append(step)


def train(config, source_of=FromState, callbacks=(), **options):
    """What `fit` gives, run as a program of one's own would run it; goes on where it can."""
    reporter = Reporter(quiet=True)
    parts = build_setup(config, reporter, date(2026, 1, 1))
    checkpoints = Checkpoints(checkpoint_directory(config))
    directory = checkpoints.path.parent
    begins = checkpoints.latest is None
    state = parts.initial() if begins else checkpoints.restore(parts.state_layout)
    log, source = MetricsLog(directory, int(state.step)), source_of(parts)
    try:
        with jax.set_mesh(parts.mesh), reporter.task("Training", STEPS) as task:
            result = fit(
                parts,
                state,
                source,
                log=log,
                checkpoints=checkpoints,
                task=task,
                callbacks=callbacks,
                **options,
            )
        checkpoints.wait()
    finally:
        log.close()
        checkpoints.close()
    return result, source


def logged(directory):
    return [
        {name: value for name, value in row.items() if name not in TIMES}
        for row in read_metrics(directory)
    ]


def leaves(state):
    return jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))


def test_batches_made_from_the_state_train_and_go_on_bit_identically(chat_model, rows, tmp_path):
    """Killed between two checkpoints, so that batches are made anew from a restored state."""
    whole, source = train(config(tmp_path / "whole", chat_model, rows))
    assert [(index, step) for index, step, _ in source.seen] == [(n, n) for n in range(STEPS)]
    assert len({learned for _, _, learned in source.seen}) == STEPS
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "cut", chat_model, rows), callbacks=[Watch(kill_after=5)])
    again, after = train(config(tmp_path / "cut", chat_model, rows))
    assert after.seen == source.seen[3:]
    assert again.step == whole.step == STEPS
    chex.assert_trees_all_equal(leaves(again.state), leaves(whole.state))
    assert logged(tmp_path / "cut") == logged(tmp_path / "whole")
    for row, (_, _, learned) in zip(logged(tmp_path / "whole"), source.seen, strict=True):
        assert row["learned"] == learned
        assert row["tokens"] == 4 * LENGTH
        assert row["epoch"] == row["step"]


def test_a_source_of_unknown_length_ends_the_run(chat_model, rows, tmp_path):
    """Also beyond the steps over which the schedule goes, and after the last checkpoint."""
    watch = Watch()
    result, _ = train(
        config(tmp_path / "run", chat_model, rows),
        lambda parts: FromState(parts, num_steps=None, last=STEPS + 2),
        [watch],
    )
    assert result.step == STEPS + 2
    assert result.stopped_by is None
    assert watch.ended == [STEPS + 2]
    assert [row["step"] for row in watch.rows] == list(range(1, STEPS + 3))
    assert steps_saved(config(tmp_path / "run", chat_model, rows))[-1] == STEPS + 2
    nothing, source = train(
        config(tmp_path / "run", chat_model, rows),
        lambda parts: FromState(parts, num_steps=None, last=STEPS + 2),
    )
    assert nothing.step == STEPS + 2
    assert not source.seen


def test_scheduled_batches_are_the_schedules_wherever_they_begin(chat_model, rows, tmp_path):
    parts = build_setup(config(tmp_path / "run", chat_model, rows), Reporter(quiet=True))
    source = ScheduledBatches(parts.schedule, 2, parts.mesh)
    for index in (0, 1, 2, 5, 6, 7, 3):
        loaded = source.batch(index)
        assert isinstance(loaded, DeviceBatch)
        assert loaded.index == index
        for part, expected in zip(loaded.batch, parts.schedule.batch(index), strict=True):
            if expected is not None:
                np.testing.assert_array_equal(part, expected.reshape(2, 2, *expected.shape[1:]))
    assert source.batch(STEPS) is None


def test_callbacks_see_every_row_and_every_evaluation(chat_model, rows, tmp_path):
    watch = Watch()
    keys = (f"data.eval={rows}", "train.eval_every=3")
    result = jaxtune.train(config(tmp_path / "run", chat_model, rows, *keys), [watch], quiet=True)
    assert watch.rows == [row | {"mfu": None} for row in result.metrics if row["split"] == "train"]
    during = [row for row in result.metrics if phase_of(row) == DURING]
    assert watch.evaluations == [
        (row["step"], row["loss"], row["step"]) for row in [result.before, *during]
    ]
    assert [step for step, *_ in watch.evaluations] == [0, 3, 6]
    assert watch.ended == [STEPS]


def test_a_callback_ends_the_run_as_if_it_were_done(chat_model, rows, tmp_path, capsys):
    """It answers when the next step is under way: that one is the last."""
    watch = Watch(stop_after=4)
    keys = (f"data.eval={rows}", "train.eval_every=2", "checkpoint.best=loss")
    result = jaxtune.train(config(tmp_path / "run", chat_model, rows, *keys), callbacks=[watch])
    assert [row["step"] for row in watch.rows] == [1, 2, 3, 4]
    assert watch.ended == [4]
    assert result.after["step"] == 4
    assert result.adapter.is_dir()
    assert steps_saved(config(tmp_path / "run", chat_model, rows))[-1] == 4
    assert "enough is enough: training ends here" in capsys.readouterr().err
    later = Watch(stop_after=5)
    jaxtune.train(config(tmp_path / "run", chat_model, rows, *keys), [later], quiet=True)
    assert [row["step"] for row in later.rows] == [5, 6]  # 6 was under way
    assert steps_saved(config(tmp_path / "run", chat_model, rows))[-1] == 6
    assert [step for step, *_ in later.evaluations] == [6]


def test_an_error_in_a_callback_ends_the_run(chat_model, rows, tmp_path):
    watch, other = Watch(kill_after=2), Watch()
    with pytest.raises(KeyboardInterrupt):
        train(config(tmp_path / "run", chat_model, rows), callbacks=[other, watch])
    assert other.ended == watch.ended == [3]


def test_an_objective_and_metrics_of_ones_own(chat_model, rows, tmp_path):
    def doubled(models, batch, options, shared):
        loss, weight, _ = sft(models.policy, batch, options)
        return Sums(2 * loss, weight, {"doubled": 2 * loss})

    keys = (f"data.eval={rows}", "train.eval_task=generation")
    shared = {"quiet": True, "metrics": {"answers": len}}
    plain, twice = (
        jaxtune.train(
            config(tmp_path / name, chat_model, rows, *keys), objective=objective, **shared
        )
        for name, objective in (("plain", None), ("twice", Objective(doubled)))
    )
    first, second = (run.metrics[1] for run in (plain, twice))
    assert second["loss"] == pytest.approx(2 * first["loss"], rel=1e-5)
    assert second["doubled"] == second["loss"]
    assert plain.before["answers"] == plain.after["answers"] == 32.0
