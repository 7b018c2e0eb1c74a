"""Checkpoints that are damaged, kept elsewhere, the best of all, or cannot be written; and a
step that hangs.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import yaml
from etils import epath

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.errors import Interrupted, UserError
from jaxtune.core.files import read_jsonl
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.record import read_config
from jaxtune.training import checkpoint, setup
from jaxtune.training.checkpoint import steps_saved
from jaxtune.training.interrupt import StopRequest
from tests.support import tools
from tests.support.cases import thinned

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tools.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tools.sums(48))


def config(directory, model, rows, **further):
    keys = {
        "model.source": model, "data.train": rows, "run.dir": directory, "data.max_length": 64,
        "optimizer.learning_rate": 5e-3,
        "train.batch_size": 4, "train.steps": 9, "adapter.rank": 4, "checkpoint.every": 3,
        "checkpoint.keep": 3,
    } | {key.replace("__", "."): value for key, value in further.items()}  # fmt: skip
    return load_config(overrides=[f"{key}={value}" for key, value in keys.items()])


def trained(directory):
    return {row["step"]: row["loss"] for row in read_metrics(directory) if row["split"] == "train"}


@pytest.fixture(scope="module")
def finished(chat_model, rows, tmp_path_factory):
    """A whole run, as it was before its export."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setup, "make_mesh", lambda *sizes: make_mesh(devices=jax.devices()[:1]))
        jaxtune.train(config(directory, chat_model, rows), quiet=True)
    return directory


def copied(finished, directory):
    """The finished run in another place, with a configuration that says so."""
    shutil.copytree(finished, directory)
    raw = yaml.safe_load((directory / "config.yaml").read_text())
    raw["run"]["dir"] = str(directory)
    (directory / "config.yaml").write_text(yaml.safe_dump(raw))
    return read_config(directory)


def damage_truncated(checkpoint):
    largest = max(
        (path for path in checkpoint.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def damage_missing(checkpoint):
    largest = max(
        (path for path in checkpoint.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.unlink()


def damage_nonsense(checkpoint):
    """Of the same size, so that its own reader must notice."""
    for path in checkpoint.rglob("*"):
        if path.is_file():
            path.write_bytes(bytes(len(path.read_bytes())))


@pytest.mark.parametrize(
    "damage", thinned([damage_truncated, damage_missing, damage_nonsense], damage_truncated)
)
def test_of_a_damaged_checkpoint_the_one_before_is_used(finished, damage, tmp_path, capsys):
    here = copied(finished, tmp_path / "run")
    assert steps_saved(here) == [3, 6, 9]
    damage(tmp_path / "run" / "checkpoints" / "9")
    result = jaxtune.train(here)
    said = capsys.readouterr().err
    assert "WARNING: the checkpoint of step 9 cannot be used" in said
    assert "Going on after step 6 of 9" in said
    assert trained(result.dir) == trained(finished)
    assert steps_saved(here) == [3, 6, 9]
    assert (tmp_path / "run" / "checkpoints" / "bad" / "9").is_dir()
    files = [
        directory / "adapter" / "adapter_model.safetensors" for directory in (result.dir, finished)
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    noted = json.loads((tmp_path / "run" / "checkpoints" / "sizes" / "9.json").read_text())
    assert noted == {
        str(path.relative_to(tmp_path / "run" / "checkpoints" / "9")): path.stat().st_size
        for path in (tmp_path / "run" / "checkpoints" / "9").rglob("*")
        if path.is_file()
    }


def test_without_a_whole_checkpoint_there_is_advice(finished, tmp_path):
    here = copied(finished, tmp_path / "run")
    for step in (3, 6, 9):
        damage_truncated(tmp_path / "run" / "checkpoints" / str(step))
    with pytest.raises(UserError, match=r"no checkpoint can be read\. Start over with --fresh"):
        jaxtune.train(here, quiet=True)


def test_a_full_disk_is_a_clear_error_and_the_checkpoint_before_stays(
    chat_model, finished, rows, tmp_path
):
    """Files may not grow beyond a few KB, as if the disk were full."""
    here = copied(finished, tmp_path / "run")
    for step in (6, 9):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    before = {
        path: path.read_bytes()
        for path in (tmp_path / "run" / "checkpoints" / "3").rglob("*")
        if path.is_file()
    }
    command = f"ulimit -f 20; exec {sys.executable} -m jaxtune train {tmp_path}/run/config.yaml"
    environment = tools.child_environment() | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(
        ["bash", "-c", command],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    said = [
        line for line in done.stderr.splitlines() if line.startswith("jaxtune:")
    ]  # threads of orbax print beside it
    assert len(said) == 1, done.stderr
    assert "a checkpoint cannot be written" in said[0]
    assert "the one of step 3 is complete. Make room" in said[0]
    assert {path: path.read_bytes() for path in before} == before
    assert steps_saved(here) == [3]
    result = jaxtune.train(here, quiet=True)
    assert trained(result.dir) == trained(finished)


def test_checkpoints_elsewhere_bring_the_record_to_a_new_machine(
    chat_model, rows, finished, tmp_path
):
    elsewhere = config(
        tmp_path / "run",
        chat_model,
        rows,
        checkpoint__dir=tmp_path / "bucket",
        train__eval_every=4,
        data__eval=rows,
    )
    stopping = elsewhere.model_copy(
        update={"train": elsewhere.train.model_copy(update={"steps": 9})}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxtune.workflows.train.export_trained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            jaxtune.train(stopping, quiet=True)
    assert not (tmp_path / "run" / "checkpoints").exists()
    shutil.rmtree(tmp_path / "run")
    shutil.rmtree(tmp_path / "bucket" / "9")
    result = jaxtune.train(elsewhere, quiet=True)
    assert trained(result.dir) == trained(finished)
    assert [row["step"] for row in result.metrics if row["split"] == "eval"] == [0, 4, 8, 9]
    other = config(
        tmp_path / "other", chat_model, rows, checkpoint__dir=tmp_path / "bucket", adapter__rank=8
    )
    with pytest.raises(UserError, match=r"holds the checkpoints of the run in .*/run\. Set"):
        jaxtune.train(other, quiet=True)
    (tmp_path / "run").rename(tmp_path / "gone")
    with pytest.raises(
        UserError,
        match=r"holds a run with another configuration: .*adapter.rank \(4 there, 8 now\)",
    ):
        jaxtune.train(other, quiet=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match=r"gs://nowhere/x cannot be reached: .*gcsfs"):
        jaxtune.train(
            config(tmp_path / "cloud", chat_model, rows, checkpoint__dir="gs://nowhere/x"),
            quiet=True,
        )


def interrupted(*arguments, **options):
    raise KeyboardInterrupt


def test_the_state_with_the_best_evaluation_is_kept_and_exported(
    chat_model, rows, tmp_path, capsys
):
    """The longer it trains on sums, the less it expects letters."""
    letters = [tools.chat(row["messages"][0]["content"], "zq") for row in tools.sums(16, seed=1)]
    held_out = tools.write_rows(tmp_path / "held_out.jsonl", letters)
    further = {
        "checkpoint__best": "loss",
        "train__eval_every": 2,
        "data__eval": held_out,
        "optimizer__learning_rate": 5e-2,
    }
    result = jaxtune.train(config(tmp_path / "run", chat_model, rows, **further))
    on_the_way = {
        row["step"]: row["loss"]
        for row in result.metrics
        if row["split"] == "eval" and "task" not in row
    }
    assert list(on_the_way) == [2, 4, 6, 8, 9]
    best = min(on_the_way, key=on_the_way.get)
    assert best != 9
    assert (
        f"The evaluation was best after step {best} (loss {on_the_way[best]:.4f})"
        in capsys.readouterr().err
    )
    assert result.after["loss"] == pytest.approx(on_the_way[best], rel=1e-4)
    assert jaxtune.evaluate(str(result.dir), held_out)["loss"] == pytest.approx(
        on_the_way[best], rel=1e-4
    )
    del further["checkpoint__best"]
    again = jaxtune.train(config(tmp_path / "run", chat_model, rows, **further), quiet=True)
    assert again.after["loss"] == pytest.approx(on_the_way[9], rel=1e-4)
    assert jaxtune.evaluate(str(again.dir), held_out)["loss"] == pytest.approx(
        again.after["loss"], rel=1e-5
    )
    assert [row["loss"] for row in again.metrics if row.get("phase") == "after"] == [
        again.after["loss"]
    ]
    card = (again.dir / "adapter" / "README.md").read_text()
    assert f"{again.after['loss']:.4f}" in card
    assert f"{result.after['loss']:.4f}" not in card
    further["checkpoint__best"] = "loss"
    for keys, message in (
        ({"checkpoint__best": "loss"}, "checkpoint.best needs evaluations"),
        ({**further, "checkpoint__best": "margin"}, "checkpoint.best=margin is for preferences"),
        (
            {**further, "checkpoint__best": "chrf", "train__objective": "dpo"},
            "of preferences checkpoint.best is loss, accuracy or margin",
        ),
        ({"train__patience": 2}, "train.patience counts evaluations"),
    ):
        with pytest.raises(UserError, match=message):
            config(tmp_path / "run", chat_model, rows, **keys)


def test_a_signal_during_an_evaluation_saves_and_what_is_lost_is_made_again(
    chat_model, rows, tmp_path, monkeypatch, capsys
):
    """The signal comes in the second evaluation; then files are damaged as a crash may."""
    further = {
        "data__eval": rows, "train__eval_every": 3, "checkpoint__every": 1000,
        "checkpoint__best": "loss", "train__samples": 2,
    }  # fmt: skip
    whole = jaxtune.train(config(tmp_path / "whole", chat_model, rows, **further), quiet=True)

    class Signalled(StopRequest):
        def check(self):
            if any(row["step"] == 6 for row in read_metrics(tmp_path / "cut")):
                os.kill(os.getpid(), signal.SIGTERM)
            super().check()

    with monkeypatch.context() as patch:
        patch.setattr("jaxtune.workflows.train.StopRequest", Signalled)
        with pytest.raises(Interrupted, match="SIGTERM: stopped after step 6 of 9; it is saved"):
            jaxtune.train(config(tmp_path / "cut", chat_model, rows, **further), quiet=True)
    here = read_config(tmp_path / "cut")
    assert steps_saved(here) == [6]
    evaluated = [row["step"] for row in read_metrics(tmp_path / "cut") if row["split"] == "eval"]
    assert evaluated == [0, 3]
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[1:]))  # the one before training
    (tmp_path / "cut" / "samples.jsonl").write_bytes(bytes(500))
    (tmp_path / "cut" / "config.yaml").unlink()
    (tmp_path / "cut" / "data.json").write_text("{")
    done = jaxtune.train(here)
    said = capsys.readouterr().err
    for lost in ("config.yaml was lost", "data.json was lost", "what was measured before training"):
        assert lost in said
    evaluations = [
        {row["step"]: row["loss"] for row in run.metrics if row["split"] == "eval"}
        for run in (whole, done)
    ]
    assert evaluations[0] == evaluations[1]
    assert trained(done.dir) == trained(whole.dir)
    samples = [
        [(row["before"], row["after"]) for row in read_jsonl(run.dir / "samples.jsonl")]
        for run in (whole, done)
    ]
    assert samples[0] == samples[1]
    files = [run.dir / "adapter" / "adapter_model.safetensors" for run in (whole, done)]
    assert files[0].read_bytes() == files[1].read_bytes()
    shutil.rmtree(tmp_path / "cut" / "checkpoints")
    with pytest.raises(UserError, match=r"holds a run whose checkpoints are not in .*checkpoints"):
        jaxtune.train(here, quiet=True)


def test_sizes_are_noted_of_files_whose_owner_has_no_name(tmp_path, monkeypatch):
    """As in a container that is given the number of a user."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr("pwd.getpwuid", unknown)
    (tmp_path / "part").write_text("12345")
    assert checkpoint._sizes(epath.Path(tmp_path)) == {"part": 5}


def test_a_hung_run_prints_where_it_stands_and_ends(finished, tmp_path):
    copied(finished, tmp_path / "run")
    for step in (6, 9):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    code = (
        "import time, jaxtune.cli.main as main, jaxtune.training.batch_source as batch_source\n"
        "whole = batch_source.batches\n"
        "def hanging(*arguments):\n"
        "    for number, loaded in enumerate(whole(*arguments)):\n"
        "        if number == 2: time.sleep(1000)\n"
        "        yield loaded\n"
        "batch_source.batches = hanging\n"
        f"raise SystemExit(main.main(['train', r'{tmp_path / 'run' / 'config.yaml'}', "
        "'run.watchdog=25']))\n"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=tools.child_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 1, done.stderr
    assert time.monotonic() - began < 150
    assert "jaxtune: step 6 is not done after 25 s; every thread stands at:" in done.stderr
    assert "in hanging" in done.stderr
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .startswith("jaxtune: step 6 was not done after 25 s, so the run was ended")
    )
    assert json.dumps(sorted(trained(tmp_path / "run"))) == "[1, 2, 3, 4]"
    np.testing.assert_equal(trained(tmp_path / "run")[4], trained(finished)[4])
