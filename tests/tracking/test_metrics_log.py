"""metrics.jsonl where a run goes on: each step once, and what does not count any more set aside."""

import json
import math

from jaxtune.tracking.metrics_log import (
    SUPERSEDED,
    MetricsLog,
    evals_since_best,
    is_better,
    read_metrics,
)


def row(step, **more):
    return {"split": "train", "step": step, "loss": 1.0} | more


def write(directory, *lines):
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (directory / "metrics.jsonl").write_text(text)


def test_rows_of_steps_to_be_done_again_are_set_aside(tmp_path):
    write(tmp_path, row(1), row(2), row(3), '{"split": "train", "st')
    said = []
    log = MetricsLog(tmp_path, 2, warn=said.append)
    log.write(row(3, loss=0.5))
    log.close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    aside = (tmp_path / SUPERSEDED).read_text().splitlines()
    assert aside == [json.dumps(row(3)), '{"split": "train", "st']
    assert len(said) == 1
    assert "2 rows" in said[0]


def test_damage_in_the_middle_costs_only_what_is_damaged(tmp_path):
    """A machine that lost power may leave zeros where lines were."""
    write(tmp_path, row(1), "\0" * 40, '{"step": "2", "split": 1}', "[]", row(3), row(4))
    said = []
    MetricsLog(tmp_path, 4, warn=said.append).close()
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 3, 4]
    assert "3 rows" in said[0]
    assert "the rows of 1 steps are lost (the first is step 2)" in said[1]


def test_a_whole_log_is_not_touched(tmp_path):
    write(tmp_path, row(1), row(2))
    before = (tmp_path / "metrics.jsonl").stat().st_mtime_ns
    MetricsLog(tmp_path, 2, warn=lambda text: 1 / 0).close()
    assert (tmp_path / "metrics.jsonl").stat().st_mtime_ns == before
    assert not (tmp_path / SUPERSEDED).exists()


def test_a_lost_log_is_said(tmp_path):
    said = []
    MetricsLog(tmp_path, 3, warn=said.append).close()
    assert "the rows of 3 steps are lost" in said[0]


def test_an_evaluation_that_is_not_finite_is_never_the_best():
    evaluations = [
        {"split": "eval", "step": step, "phase": "during", "accuracy": value}
        for step, value in enumerate([0.5, None, math.nan, 0.4], 1)
    ]
    assert evals_since_best(evaluations, "accuracy") == 3
    assert evals_since_best(evaluations[1:], "accuracy") == 0
    assert is_better(0.5, None, "loss")
    assert is_better(0.4, 0.5, "loss")
    assert not is_better(0.6, 0.5, "loss")
    assert not is_better(math.nan, None, "loss")
    assert not is_better(math.inf, 0.5, "accuracy")
    assert is_better(0.6, math.nan, "accuracy")
