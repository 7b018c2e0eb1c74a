"""Whole runs from the command line, in processes of their own: micro-batches, kills, signals, a
NaN, a second start.
"""

import json
import random
import signal
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from jaxtune.config.schema import DataSection
from jaxtune.data.prepare import prepare
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.tracking.record import read_config
from jaxtune.tracking.run_directory import RunDirectory
from jaxtune.training.checkpoint import steps_saved
from jaxtune.weights.peft import open_adapter
from tests.support import tools
from tests.support.cases import thinned

TIMES = {"step_seconds", "tokens_per_second", "mfu"}


def command(directory, model, rows, **keys):
    options = {
        "model.source": model, "data.train": rows, "run.dir": directory, "data.max_length": 96,
        "optimizer.learning_rate": 5e-3,
        "train.batch_size": 4, "adapter.rank": 4, "checkpoint.every": 3,
    } | {key.replace("__", "."): value for key, value in keys.items()}  # fmt: skip
    return [
        sys.executable,
        "-m",
        "jaxtune",
        "train",
        *(f"{key}={value}" for key, value in options.items()),
    ]


def start(*arguments, **keys):
    return subprocess.Popen(
        command(*arguments, **keys),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=tools.child_environment(),
    )


def finish(*arguments, **keys):
    process = start(*arguments, **keys)
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def train(*arguments, **keys):
    code, out, err = finish(*arguments, **keys)
    assert code == 0, err
    return out + err


def record(directory):
    rows = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_metrics(Path(directory))
    ]
    return rows, (Path(directory) / "adapter" / "adapter_model.safetensors").read_bytes()


def losses(directory):
    return np.asarray(
        [row["loss"] for row in read_metrics(Path(directory)) if row["split"] == "train"]
    )


def factors(directory):
    return {
        name: tensor.all()
        for name, tensor in open_adapter(Path(directory) / "adapter").tensors.items()
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tools.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tools.sums(64))


def wait_for_step(process, directory, step):
    while process.poll() is None and not any(
        row["step"] >= step for row in read_metrics(Path(directory)) if row["split"] == "train"
    ):
        time.sleep(0.02)


def test_killed_three_times_it_ends_bit_identical(chat_model, rows, tmp_path):
    keys = {
        "train__steps": 40, "train__micro_batch_size": 2, "adapter__dropout": 0.1,
        "data__eval": rows, "train__eval_every": 10, "train__seed": 7,
    }  # fmt: skip
    train(tmp_path / "whole", chat_model, rows, **keys)
    draw = random.Random()
    kills = sorted(draw.sample(range(1, 39), 3))
    for step in kills:
        process = start(tmp_path / "killed", chat_model, rows, **keys)
        wait_for_step(process, tmp_path / "killed", step)
        time.sleep(draw.random() * 0.2)
        process.kill()
        process.communicate()
    train(tmp_path / "killed", chat_model, rows, **keys)
    whole, killed = record(tmp_path / "whole"), record(tmp_path / "killed")
    steps = [row["step"] for row in killed[0] if row["split"] == "train"]
    assert steps == list(range(1, 41)), kills
    for left, right in zip(whole[0], killed[0], strict=True):
        assert left == right, kills
    assert whole[1] == killed[1], kills


@pytest.mark.parametrize(
    "number", thinned([signal.SIGINT, signal.SIGTERM, signal.SIGHUP], signal.SIGHUP)
)
def test_a_signal_saves_and_says_how_to_go_on(number, chat_model, rows, tmp_path):
    keys = {"train__steps": 300, "checkpoint__every": 1000}
    process = start(tmp_path / "run", chat_model, rows, **keys)
    wait_for_step(process, tmp_path / "run", 4)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"Go on with: jaxtune train {tmp_path / 'run'}/config.yaml" in err
    (saved,) = steps_saved(read_config(tmp_path / "run"))
    assert saved == read_metrics(tmp_path / "run")[-1]["step"] >= 4
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow
def test_micro_batches_and_packing_change_nothing(chat_model, rows, tmp_path):
    """Sixteen rows of one length, so that packed (two a row) and unpacked batches can hold the
    same examples.
    """
    same = [tools.chat(f"{n % 10}+{n // 10}?", f"{n % 10 + n // 10:02}") for n in range(64)]
    path = tools.write_rows(tmp_path / "same.jsonl", same)
    keys = {"data__shuffle": "false", "optimizer__warmup": 0, "checkpoint__every": 1000}
    (length,) = set(prepare(DataSection(train=path), tools.byte_tokenizer()).lengths.tolist())
    runs = {
        f"micro{micro}": {
            "train__batch_size": 8,
            "train__micro_batch_size": micro,
            "data__packing": "false",
        }
        for micro in (1, 2, 4, 8)
    }
    runs["packed"] = {"train__batch_size": 4, "data__max_length": 2 * length}
    for name, changes in runs.items():
        train(tmp_path / name, chat_model, path, **(keys | changes))
    expected = losses(tmp_path / "micro8")
    assert len(expected) == 8
    assert expected[-1] < expected[0]
    for name in runs:
        np.testing.assert_allclose(losses(tmp_path / name), expected, rtol=2e-5, err_msg=name)
        for key, value in factors(tmp_path / name).items():
            np.testing.assert_allclose(
                value, factors(tmp_path / "micro8")[key], atol=2e-4, err_msg=f"{name} {key}"
            )


def test_a_nan_stops_the_run_names_the_step_and_keeps_the_checkpoint_before(
    chat_model, rows, tmp_path
):
    code, _, err = finish(
        tmp_path / "run", chat_model, rows,
        optimizer__learning_rate=1e30, optimizer__clip_norm="null", optimizer__warmup=0,
        checkpoint__every=1, train__steps=30,
    )  # fmt: skip
    assert code == 1
    last = read_metrics(tmp_path / "run")[-1]
    assert f"Step {last['step']}: the loss is" in err
    assert "training diverges. Lower optimizer.learning_rate" in err
    assert last["loss"] is None or last["grad_norm"] is None
    assert steps_saved(read_config(tmp_path / "run"))[-1] == last["step"] - 1


def test_a_second_start_trains_nothing_again_and_another_config_is_refused(
    chat_model, rows, tmp_path
):
    keys = {"train__steps": 6, "data__eval": rows}
    train(tmp_path / "run", chat_model, rows, **keys)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert "Going on after step 6 of 6" in train(tmp_path / "run", chat_model, rows, **keys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    code, _, err = finish(tmp_path / "run", chat_model, rows, **(keys | {"train__seed": 1}))
    assert code == 2
    assert "train.seed (0 there, 1 now)" in err
    assert "--fresh" in err
    train(tmp_path / "run", chat_model, rows, **(keys | {"train__micro_batch_size": 2}))
    files = {
        "config.yaml",
        "env.json",
        "run.json",
        ".lock",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "samples.jsonl",
        "predictions.jsonl",
        "report.html",
        "data.json",
        "verification.json",
    }
    assert {path.name for path in (tmp_path / "run").iterdir()} == files
    samples = [
        json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert len(samples) == 5
    assert all({"prompt", "wanted", "before", "after"} <= sample.keys() for sample in samples)
    RunDirectory(read_config(tmp_path / "run"), {}, date(2026, 1, 1), fresh=True).close()
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    markers = {"run.json", "checkpoints", "checkpoints/run.json", ".lock"}
    assert left == {"config.yaml", "env.json"} | markers


@pytest.mark.slow
def test_the_checkpoint_restores_on_another_number_of_devices(chat_model, rows, tmp_path):
    keys = {"train__steps": 8, "train__batch_size": 8, "checkpoint__every": 4}
    train(tmp_path / "whole", chat_model, rows, **keys)
    process = start(tmp_path / "moved", chat_model, rows, **keys)
    wait_for_step(process, tmp_path / "moved", 5)
    process.kill()
    process.communicate()
    process = subprocess.Popen(
        [*command(tmp_path / "moved", chat_model, rows, **keys), "mesh.tensor=2"],
        stderr=subprocess.PIPE, text=True,
        env=tools.child_environment() | {"JAX_NUM_CPU_DEVICES": "4"},
    )  # fmt: skip
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    np.testing.assert_allclose(losses(tmp_path / "moved"), losses(tmp_path / "whole"), rtol=2e-5)
