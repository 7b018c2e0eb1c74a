"""The loop beside the device: what it waits for, how often it fetches, what it compiles, what it
records on request.
"""

import jax
import pytest
from jax._src.array import ArrayImpl

from jaxtune.config.load import load_config
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.training import loop, setup
from jaxtune.weights import export
from jaxtune.workflows.train import run
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")
EPOCHS = 3


@pytest.fixture
def train(tmp_path, monkeypatch, chat_model):
    """Trains on one device, rows packed."""
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
    monkeypatch.setattr(export, "why_not_torch", lambda source, *packages: "not the subject here")
    monkeypatch.setattr("jaxtune.core.runtime.start", lambda *_: None)
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(40))

    def call(*keys):
        common = [
            f"model.source={chat_model}",
            f"run.dir={tmp_path / 'run'}",
            f"data.train={rows}",
            "data.max_length=96",
        ]
        return run(
            load_config(overrides=[*common, "train.batch_size=4", f"train.epochs={EPOCHS}", *keys]),
            Reporter(quiet=True),
        )

    return call


@pytest.fixture
def events(monkeypatch):
    """What happens in the loop, in order: steps dispatched, rows recorded, arrays fetched,
    programs compiled.
    """
    happened = []

    def watched(owner, name, event):
        original = getattr(owner, name)

        def call(*arguments, **keys):
            happened.append(event)
            return original(*arguments, **keys)

        monkeypatch.setattr(owner, name, call)

    watched(loop._CompiledStep, "__call__", "dispatch")
    watched(loop.Recorder, "record", "record")
    value = ArrayImpl._value

    def fetched(array):
        happened.append("fetch")
        return value.fget(array)

    monkeypatch.setattr(ArrayImpl, "_value", property(fetched))

    def compiled(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            happened.append("compile")

    jax.monitoring.register_event_duration_secs_listener(compiled)
    yield happened
    jax.monitoring.unregister_event_duration_listener(compiled)


def between(events):
    """The events from the third dispatch to the last."""
    places = [at for at, event in enumerate(events) if event == "dispatch"]
    return events[places[2] : places[-1]], len(places)


def test_a_step_is_recorded_after_the_next_is_dispatched_and_little_is_fetched(train, events):
    train("checkpoint.every=1000")
    during, steps = between(events)
    assert steps > 2 * EPOCHS
    assert [event for event in during if event != "fetch"] == ["dispatch", "record"] * (steps - 3)
    assert during.count("fetch") <= 3 * (steps - 3)  # loss, norm, number of supervised tokens


def test_nothing_is_compiled_after_the_first_steps(train, events):
    """Packed rows have one shape, whatever the epoch; so have a checkpoint and an evaluation
    after the first.
    """
    train("checkpoint.every=1000")
    assert "compile" not in between(events)[0]


def test_learning_rates_are_the_schedules(train):
    from jaxtune.training.optimizer import learning_rate_schedule

    result = train("optimizer.warmup=3")
    rows = [row for row in read_metrics(result.dir) if row["split"] == "train"]
    rate = learning_rate_schedule(
        load_config(overrides=["optimizer.warmup=3"]).optimizer, len(rows)
    )
    assert [row["learning_rate"] for row in rows] == pytest.approx(
        [float(rate(step)) for step in range(len(rows))]
    )


def test_a_profile_is_written_on_request(train):
    result = train("run.profile=2")
    assert list((result.dir / "profile").rglob("*.xplane.pb"))
    assert list((result.dir / "profile").rglob("perfetto_trace.json.gz"))
