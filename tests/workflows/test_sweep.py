"""A search: chosen by Optuna, killed and continued, pruned, failed, and its page."""

import json
import subprocess
import sys
import time
from pathlib import Path

import jax
import optuna
import pytest
import yaml
from optuna.trial import TrialState

from jaxtune.cli.main import main
from jaxtune.config.load import dump, load_config, load_sweep
from jaxtune.core.errors import Interrupted, UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.report.sweep import importance
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import read_config
from jaxtune.training import setup
from jaxtune.workflows import sweep
from jaxtune.workflows.search_space import build_space, resolve_values
from tests.support import tools

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture
def base(chat_model, tmp_path):
    rows = [
        tools.write_rows(tmp_path / f"{name}.jsonl", tools.sums(count, seed=count))
        for name, count in (("train", 32), ("eval", 8))
    ]
    keys = {
        "model.source": chat_model, "data.train": rows[0], "data.eval": rows[1],
        "data.max_length": 96, "train.batch_size": 4,
        "train.steps": 4, "train.eval_every": 2, "train.samples": 0, "adapter.rank": 2,
    }  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(dump(load_config(overrides=[f"{key}={value}" for key, value in keys.items()])))
    return path


def described(tmp_path, **changes):
    keys = {
        "trials": 4,
        "dir": str(tmp_path / "sweep"),
        "parameters": {
            "optimizer.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
            "adapter.targets": [["q_proj"], "all-linear"],
        },
    } | changes
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(keys))
    return path


def search(base, description):
    return sweep.sweep(base, description, Reporter(quiet=True))


def test_each_trial_is_a_run_and_the_best_is_known(base, tmp_path):
    study = search(base, described(tmp_path))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 4
    losses = []
    for trial in study.trials:
        directory = tmp_path / "sweep" / "trials" / f"{trial.number + 1:03}"
        config = read_config(directory)
        assert config.optimizer.learning_rate == trial.params["optimizer.learning_rate"]
        assert config.adapter.targets == (
            trial.params["adapter.targets"]
            if trial.params["adapter.targets"] == "all-linear"
            else ["q_proj"]
        )
        assert (directory / "adapter").is_dir()
        rows = read_metrics(directory)
        losses.append(next(row["loss"] for row in reversed(rows) if "task" in row))
        assert rows[0].get("measured_in") == (None if trial.number == 0 else "001")
    assert [trial.value for trial in study.trials] == pytest.approx(losses)
    assert study.best_value == pytest.approx(min(losses))
    page = (tmp_path / "sweep" / "report.html").read_text()
    for text in (
        "4 of 4 trials, by loss",
        "Importance of keys",
        'href="trials/003/report.html"',
        "loss by adapter.targets",
    ):
        assert text in page
    assert set(importance(study, ["optimizer.learning_rate", "adapter.targets"])) == {
        "optimizer.learning_rate",
        "adapter.targets",
    }
    (tmp_path / "sweep" / "report.html").unlink()
    assert main(["report", str(tmp_path / "sweep")]) == 0
    assert "4 of 4 trials, by loss" in (tmp_path / "sweep" / "report.html").read_text()
    assert len(search(base, described(tmp_path)).trials) == 4  # nothing is left to do
    assert len(search(base, described(tmp_path, trials=5)).trials) == 5
    with pytest.raises(UserError, match="holds a search with another metric"):
        search(base, described(tmp_path, metric="token_f1"))


@pytest.mark.slow
def test_killed_in_the_middle_it_goes_on_to_the_same_end(base, tmp_path):
    """The trial that was killed is trained to its end, in its own directory, and those after it
    are as if nothing had been.
    """
    whole = search(base, described(tmp_path, dir=str(tmp_path / "whole")))
    description = described(tmp_path, dir=str(tmp_path / "killed"))
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxtune", "sweep", str(base), str(description)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=tools.child_environment() | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    end = time.monotonic() + 300
    while not any(row["step"] >= 1 for row in read_metrics(tmp_path / "killed" / "trials" / "002")):
        assert time.monotonic() < end
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.kill()
    process.communicate()
    study = optuna.load_study(
        storage=f"sqlite:///{tmp_path / 'killed' / 'study.db'}", study_name=None
    )
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.RUNNING]
    study = search(base, description)
    assert [trial.params for trial in study.trials] == [trial.params for trial in whole.trials]
    assert [trial.value for trial in study.trials] == pytest.approx(
        [trial.value for trial in whole.trials], rel=1e-5
    )
    assert [trial.user_attrs["starts"] for trial in study.trials] == [1, 2, 1, 1]


@pytest.mark.slow
def test_a_worse_trial_ends_early(base, tmp_path):
    rates = {
        "optimizer.learning_rate": [3e-2, 2.5e-2, 2e-2, 1.5e-2, 1e-2, 1e-9]
    }  # the median wants five before it
    study = search(
        base, described(tmp_path, parameters=rates, sampler="grid", pruner="median", trials=9)
    )
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 5 + [
        TrialState.PRUNED
    ]  # all combinations there are
    for trial in study.trials[5:]:
        directory = tmp_path / "sweep" / "trials" / f"{trial.number + 1:03}"
        assert max(row["step"] for row in read_metrics(directory)) == 2
        assert not (directory / "adapter").exists()
    assert "ended early" in (tmp_path / "sweep" / "report.html").read_text()


def test_a_trial_that_fails_costs_only_itself(base, tmp_path):
    parameters = {
        "optimizer.learning_rate": [1e30, 1e-3],
        "optimizer.clip_norm": [None],
        "optimizer.warmup": [0],
    }
    study = search(base, described(tmp_path, parameters=parameters, sampler="grid"))
    states = {trial.params["optimizer.learning_rate"]: trial for trial in study.trials}
    assert states[1e30].state == TrialState.FAIL
    assert "the loss is" in states[1e30].user_attrs["reason"]
    assert states[1e-3].state == TrialState.COMPLETE
    assert "failed: Step" in (tmp_path / "sweep" / "report.html").read_text()


@pytest.mark.slow
def test_the_same_values_again_are_not_trained_again(base, tmp_path):
    study = search(
        base, described(tmp_path, parameters={"adapter.rank": [2, 4]}, sampler="random", trials=5)
    )
    seen = {}
    for trial in study.trials:
        first = seen.setdefault(trial.params["adapter.rank"], trial)
        assert trial.value == first.value
        assert trial.user_attrs.get("same as") == (None if first is trial else first.number)
    assert len(list((tmp_path / "sweep" / "trials").iterdir())) == len(seen)


def test_what_cannot_be_searched_is_said_before_anything_is_trained(base, tmp_path):
    for changes, message in (
        (
            {"parameters": {"optimizer.learning_rat": [1]}},
            "unknown key 'optimizer.learning_rat'. Did you mean 'optimizer.learning_rate'",
        ),
        ({"parameters": {"optimizer.schedule": ["cosine", "sine"]}}, "optimizer.schedule = 'sine'"),
        ({"parameters": {"run.dir": ["a", "b"]}}, "run.dir is not searched"),
        (
            {"parameters": {"adapter.rank": {"low": 8, "high": 2}}},
            r"low \(8\) must be below high \(2\)",
        ),
        ({"parameters": {}}, "parameters"),
        ({"metrics": "loss"}, "unknown key 'metrics'. Did you mean 'metric'"),
        ({"sampler": "grid"}, "sampler: grid takes lists of values"),
        ({"pruner": "median", "metric": "token_f1"}, "needs token_f1 during training"),
        ({"storage": "nosuch://x"}, "storage: nosuch://x cannot be used"),
    ):
        with pytest.raises(UserError, match=message):
            search(base, described(tmp_path, **changes))
        assert not (tmp_path / "sweep" / "trials").exists()
    with pytest.raises(UserError, match=r"metric: rouge_l: the evaluation has loss, .*exact_match"):
        search(base, described(tmp_path, metric="rouge_l"))
    assert not (tmp_path / "sweep" / "trials").exists()
    assert search(
        base, described(tmp_path, metric="token_f1", trials=1)
    ).best_trial  # mended in place


def test_every_trial_failed(base, tmp_path):
    with pytest.raises(UserError, match=r"Every trial failed\. .*data.max_length"):
        search(base, described(tmp_path, parameters={"data.max_length": [2, 3]}, sampler="grid"))


def test_one_that_is_stopped_again_and_again_is_not_given_up(base, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted(15, "stopped")

    description = described(tmp_path, trials=1)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run", stopped)
        for _ in range(5):
            with pytest.raises(
                Interrupted,
                match=r"Stopped in trial 1; what was done is kept\.\nGo on with: jaxtune sweep",
            ):
                search(base, description)
    assert search(base, description).best_trial.user_attrs["starts"] == 1


@pytest.mark.slow
def test_one_that_brings_the_program_down_is_given_up(base, tmp_path, monkeypatch):
    class Down(BaseException):
        pass

    def down(*_, **__):
        raise Down

    description = described(tmp_path, trials=2)
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "run", down)
        for _ in range(3):
            with pytest.raises(Down):
                search(base, description)
    study = search(base, description)
    assert [trial.state for trial in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].user_attrs["reason"] == "the program ended 3 times while it ran"


def test_whole_numbers_and_nested_keys(tmp_path):
    nested = {
        "adapter": {"rank": {"low": 2, "high": 8}},
        "optimizer": {"betas": [[0.9, 0.99], [0.9, 0.999]]},
    }
    description = load_sweep(described(tmp_path, parameters=nested))
    assert set(description.parameters) == {"adapter.rank", "optimizer.betas"}
    space = build_space(description)
    assert isinstance(space["adapter.rank"], optuna.distributions.IntDistribution)
    values = resolve_values(description, {"adapter.rank": 3, "optimizer.betas": "[0.9, 0.99]"})
    assert values["optimizer.betas"] == [0.9, 0.99]


@pytest.mark.slow
def test_from_the_command_line(base, tmp_path):
    done = tools.jaxtune(
        "sweep", base, described(tmp_path, trials=2), "--json", tmp_path / "result.json"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["best"]["value"] == min(trial["value"] for trial in result["trials"])
    assert Path(result["best"]["run"], "report.html").exists()
    assert "Trial 2 of 2: adapter.targets=" in done.stderr
