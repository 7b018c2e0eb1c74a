"""Early stopping, the best state by a metric of the task, answers during training, and trackers."""

from pathlib import Path

import jax
import pytest

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_jsonl
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.metrics_log import DURING, evals_since_best, phase_of, read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.training import setup
from jaxtune.training.callbacks import Callback
from jaxtune.training.checkpoint import steps_saved
from jaxtune.workflows.train import run
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    letters = [tools.chat(row["messages"][0]["content"], "zq") for row in tools.sums(16, seed=1)]
    return tools.write_rows(folder / "rows.jsonl", tools.sums(48)), tools.write_rows(
        folder / "letters.jsonl", letters
    )


def config(directory, model, files, **further):
    keys = {
        "model.source": model, "data.train": files[0], "data.eval": files[1], "run.dir": directory,
        "data.max_length": 96,
        "optimizer.learning_rate": 5e-2, "train.batch_size": 4, "train.steps": 30,
        "train.eval_every": 2, "adapter.rank": 4,
        "checkpoint.every": 100,
    } | {key.replace("__", "."): value for key, value in further.items()}  # fmt: skip
    return load_config(overrides=[f"{key}={value}" for key, value in keys.items()])


def evaluations(directory):
    return {row["step"]: row for row in read_metrics(Path(directory)) if phase_of(row) == DURING}


def test_training_ends_when_the_evaluation_gets_no_better(chat_model, files, tmp_path, capsys):
    """The longer it trains on sums, the less it expects letters."""
    result = jaxtune.train(config(tmp_path / "run", chat_model, files, train__patience=2))
    rows = evaluations(result.dir)
    losses = [row["loss"] for row in rows.values()]
    last = max(rows)
    assert last < 20  # of 30 steps
    assert losses.index(min(losses)) == len(losses) - 3
    assert max(row["step"] for row in result.metrics) == last == result.after["step"]
    assert steps_saved(config(tmp_path / "run", chat_model, files))[-1] == last
    assert "No better loss in 2 evaluations (train.patience)" in capsys.readouterr().err
    before = (result.dir / "metrics.jsonl").read_bytes()
    again = jaxtune.train(config(tmp_path / "run", chat_model, files, train__patience=2))
    assert (again.dir / "metrics.jsonl").read_bytes() == before
    longer = jaxtune.train(config(tmp_path / "run", chat_model, files, train__patience=50))
    assert max(evaluations(longer.dir)) > last  # more patience goes on with it


@pytest.mark.slow
def test_patience_outlives_a_kill(chat_model, files, tmp_path):
    """Stopped between two evaluations, it ends at the same step as the one that was not."""

    class Killed(Exception):
        pass

    whole = jaxtune.train(
        config(tmp_path / "whole", chat_model, files, train__patience=2, checkpoint__every=3)
    )
    last = max(evaluations(whole.dir))

    class Kill(Callback):
        def on_evaluation(self, step, metrics, state):
            if step == last - 2:
                raise Killed

    with pytest.raises(Killed):
        run(
            config(tmp_path / "killed", chat_model, files, train__patience=2, checkpoint__every=3),
            Reporter(True),
            callbacks=[Kill()],
        )
    result = jaxtune.train(
        config(tmp_path / "killed", chat_model, files, train__patience=2, checkpoint__every=3),
        quiet=True,
    )
    assert max(evaluations(result.dir)) == last
    assert {step: row["loss"] for step, row in evaluations(result.dir).items()} == {
        step: row["loss"] for step, row in evaluations(whole.dir).items()
    }


def test_counting_evaluations():
    def rows(*values, name="loss"):
        return [{"split": "eval", "step": n + 1, name: value} for n, value in enumerate(values)]

    assert evals_since_best([], "loss") == 0
    assert evals_since_best(rows(3, 2, 1), "loss") == 0
    assert evals_since_best(rows(3, 1, 2, 1), "loss") == 2  # as good is no better
    assert evals_since_best(rows(1, 2, 3, name="accuracy"), "accuracy") == 0
    assert evals_since_best(rows(3, 1, 2, name="accuracy"), "accuracy") == 2
    after = {
        "split": "eval",
        "step": 9,
        "task": "lm",
        "loss": 0.5,
    }  # measured otherwise, after training
    assert evals_since_best([*rows(3, 1, 2), after], "loss") == 1
    assert (
        evals_since_best([*rows(3, 1, 2), {"split": "train", "step": 4, "loss": 0.1}], "loss") == 1
    )


@pytest.mark.slow
def test_the_best_by_a_metric_of_the_task_is_exported(chat_model, files, tmp_path, capsys):
    """It learns to answer a, and then b: rows in the order of the file. Of what it is asked, a
    is right three times in four.
    """
    questions = [row["messages"][0]["content"] for row in tools.sums(64)]

    def rows(name, answers):
        return tools.write_rows(
            tmp_path / name, [tools.chat(*row) for row in zip(questions, answers, strict=False)]
        )

    held_out = rows("eval.jsonl", "aaab" * 4)
    further = {
        "data__train": rows("rows.jsonl", "a" * 24 + "b" * 40), "data__eval": held_out,
        "data__shuffle": "false", "data__packing": "false",
        "checkpoint__best": "accuracy", "train__eval_task": "classification", "train__steps": 16,
        "optimizer__warmup": 0,
        "optimizer__schedule": "constant", "optimizer__learning_rate": 1e-2,
    }  # fmt: skip
    result = jaxtune.train(config(tmp_path / "run", chat_model, files, **further))
    accuracy = {step: row["accuracy"] for step, row in evaluations(result.dir).items()}
    best = max(accuracy, key=accuracy.get)
    assert accuracy[best] > accuracy[16]
    assert (
        f"The evaluation was best after step {best} (accuracy {accuracy[best]:.4f})"
        in capsys.readouterr().err
    )
    assert result.after["accuracy"] == pytest.approx(accuracy[best])
    assert {"accuracy", "loss"} <= evaluations(result.dir)[2].keys()
    assert jaxtune.evaluate(str(result.dir), held_out, task="classification")[
        "accuracy"
    ] == pytest.approx(accuracy[best])
    wrong = config(
        tmp_path / "wrong", chat_model, files, **(further | {"checkpoint__best": "rouge_l"})
    )
    with pytest.raises(
        UserError,
        match=r"checkpoint\.best = rouge_l: the evaluation \(classification\) has loss, .*accuracy",
    ):
        jaxtune.train(wrong, quiet=True)
    assert not steps_saved(wrong)


def test_dropout_is_off_in_every_evaluation(chat_model, files, tmp_path):
    """On the way, after training, and from the exported adapter the metrics are the same, by the
    loss and by what is generated.
    """
    further = {
        "adapter__dropout": 0.5,
        "train__steps": 4,
        "train__eval_every": 4,
        "checkpoint__best": "token_f1",
        "data__eval": files[0],
    }
    result = jaxtune.train(config(tmp_path / "run", chat_model, files, **further), quiet=True)
    (on_the_way,) = evaluations(result.dir).values()
    again = jaxtune.evaluate(str(result.dir), files[0])
    for name in ("loss", "exact_match", "token_f1"):
        assert on_the_way[name] == pytest.approx(result.after[name], rel=1e-6)
        assert again[name] == pytest.approx(result.after[name], rel=1e-5)


def test_answers_on_the_way(chat_model, files, tmp_path):
    result = jaxtune.train(
        config(tmp_path / "run", chat_model, files, train__samples=2, train__steps=10), quiet=True
    )
    samples = read_jsonl(result.dir / "samples.jsonl")
    assert len(samples) == 2
    for sample in samples:
        assert [answer["step"] for answer in sample["during"]] == [2, 4, 6, 8]
        assert {"before", "after"} <= sample.keys()
    page = (result.dir / "report.html").read_text()
    assert "after step 4" in page
    nothing = jaxtune.train(
        config(tmp_path / "none", chat_model, files, train__samples=0, train__steps=2), quiet=True
    )
    assert read_jsonl(nothing.dir / "samples.jsonl") == []


def test_trackers_get_the_rows_of_the_log(chat_model, files, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(name, value)
    settings = config(
        tmp_path / "run",
        chat_model,
        files,
        train__steps=4,
        run__trackers="[tensorboard, wandb, trackio]",
    )
    result = jaxtune.train(settings, quiet=True)
    board = EventAccumulator(str(result.dir / "tensorboard"))
    board.Reload()
    for split, name in (
        ("train", "loss"),
        ("train", "learning_rate"),
        ("eval", "loss"),
        ("eval", "perplexity"),
    ):
        logged = [(row["step"], row[name]) for row in result.metrics if row["split"] == split]
        tensors = [
            (event.step, float(event.tensor_proto.float_val[0]))
            for event in board.Tensors(f"{split}/{name}")
        ]
        assert tensors == [(step, pytest.approx(value, rel=1e-6)) for step, value in logged]
    assert list((result.dir / "wandb").glob("offline-run-*/run-*.wandb"))
    assert list((tmp_path / "trackio").rglob("*.db"))


def test_a_tracker_that_fails_costs_no_run(chat_model, files, tmp_path, monkeypatch, capsys):
    from tensorboard.summary import Writer

    def broken(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(Writer, "add_scalar", broken)
    settings = config(
        tmp_path / "run", chat_model, files, train__steps=2, run__trackers="[tensorboard]"
    )
    assert jaxtune.train(settings).after
    assert (
        capsys.readouterr().err.count(
            "tensorboard takes no more metrics: OSError: the disk is gone"
        )
        == 1
    )
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'jaxtune\[track\]'"):
        jaxtune.train(
            config(tmp_path / "other", chat_model, files, run__trackers="[wandb]"), quiet=True
        )
    assert not (tmp_path / "other").exists()
