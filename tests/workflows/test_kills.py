"""Kill -9 at random moments, from loading to the report: the end is bit-identical, and nothing is
left over. JAXTUNE_KILLS says how many moments (60 for a long run).
"""

import os
import random
import subprocess
import sys
import time

import pytest

from jaxtune.tracking.metrics_log import read_metrics
from tests.support import tools

KILLS = int(os.environ.get("JAXTUNE_KILLS", "5"))
TIMES = {"step_seconds", "tokens_per_second", "mfu", "peak_bytes"}
NOT_COMPARED = {"metrics.superseded.jsonl", ".lock"}


def start(directory, model, rows):
    keys = {
        "model.source": model, "data.train": rows, "data.eval": rows, "run.dir": directory,
        "data.max_length": 96, "train.steps": 12, "train.batch_size": 4, "train.eval_every": 4,
        "adapter.rank": 4, "checkpoint.every": 3, "checkpoint.best": "loss", "train.seed": 3,
        "train.samples": 1,
    }  # fmt: skip
    arguments = [f"{key}={value}" for key, value in keys.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "jaxtune", "train", "--quiet", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=tools.child_environment(),
    )  # fmt: skip


def finish(process):
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors


def names(directory):
    """The files of a run; of checkpoints, which orbax names, the folders."""
    found = {path.relative_to(directory) for path in directory.rglob("*")}
    return {
        str(path)
        for path in found
        if path.name not in NOT_COMPARED
        and not (path.parts[0] == "checkpoints" and len(path.parts) > 2)
    }


def numbers(directory):
    rows = [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_metrics(directory)
    ]
    return rows, (directory / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_killed_at_random_moments_a_run_ends_as_if_it_had_not_been(chat_model, tmp_path):
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(48))
    whole = tmp_path / "whole"
    finish(start(whole, chat_model, rows))
    began = time.monotonic()
    finish(start(tmp_path / "timed", chat_model, rows))  # what it compiled is kept now
    duration = time.monotonic() - began
    draw, kills, attempt, moments = random.Random(), 0, 0, []
    while kills < KILLS:
        attempt += 1
        directory = tmp_path / f"killed-{attempt}"
        for _ in range(4):  # so that it also comes to its end
            process, moment = start(directory, chat_model, rows), draw.uniform(0, duration)
            moments.append(round(moment, 2))
            try:
                process.wait(timeout=moment)
            except subprocess.TimeoutExpired:
                process.kill()
                kills += 1
            process.communicate()
        finish(start(directory, chat_model, rows))
        for left, right in zip(numbers(whole), numbers(directory), strict=True):
            assert left == right, moments
        assert names(directory) == names(whole), moments
