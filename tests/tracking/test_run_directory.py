"""Layouts of run directories: earlier ones are continued and read, newer ones refused."""

import json
from datetime import date
from pathlib import Path

import pytest

from jaxtune.config.load import dump, load_config
from jaxtune.core.errors import UserError
from jaxtune.report.page import write_report
from jaxtune.tracking.metrics_log import evals_since_best, phase_of
from jaxtune.tracking.record import LAYOUT, read_config
from jaxtune.tracking.run_directory import RunDirectory

TRAIN = {"split": "train", "step": 1, "epoch": 1.0, "loss": 2.0, "grad_norm": 1.0}
TRAIN |= {"learning_rate": 1e-3, "tokens_per_second": 9.0}
OLD = [
    {"split": "eval", "step": 0, "epoch": 0.0, "task": "lm", "rows": 3, "loss": 3.0},
    TRAIN,
    {"split": "eval", "step": 1, "epoch": 1.0, "loss": 2.5, "perplexity": 12.2},
    {"split": "eval", "step": 1, "epoch": 1.0, "task": "lm", "rows": 3, "loss": 2.4},
]
PHASES = ["before", None, "during", "after"]


@pytest.fixture
def config(tmp_path):
    return load_config(overrides=["model.source=none", "data.train=none", f"run.dir={tmp_path}"])


def open_directory(config, **options):
    RunDirectory(config, {"data.train": "abc"}, date(2026, 1, 1), **options).close()
    return json.loads((Path(config.run.dir) / "env.json").read_text())


def write_environment(config, **changes):
    path = Path(config.run.dir) / "env.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_run_of_an_earlier_version_is_continued_and_reported(config, tmp_path):
    assert open_directory(config)["layout"] == LAYOUT == 1
    environment = json.loads((tmp_path / "env.json").read_text())
    del environment["layout"]
    (tmp_path / "env.json").write_text(json.dumps(environment))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in OLD))
    assert read_config(tmp_path) == config
    page = write_report([tmp_path], tmp_path / "report.html").read_text()
    assert "before" in page
    assert open_directory(config)["layout"] == LAYOUT


def test_a_run_of_a_newer_version_is_refused_with_both_versions(config, tmp_path):
    open_directory(config)
    write_environment(config, layout=LAYOUT + 1, versions={"jaxtune": "9.8"})
    (tmp_path / "config.yaml").write_text(dump(config) + "unheard_of: 1\n")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(TRAIN) + "\n")
    message = r"written by jaxtune 9\.8 with layout 2; this is jaxtune \d.*up to 1\. Upgrade"
    for refused in (
        lambda: read_config(tmp_path),
        lambda: open_directory(config),
        lambda: write_report([tmp_path], tmp_path / "report.html"),
    ):
        with pytest.raises(UserError, match=message):
            refused()
    assert json.loads((tmp_path / "env.json").read_text())["layout"] == LAYOUT + 1
    assert open_directory(config, fresh=True)["layout"] == LAYOUT


def test_an_evaluations_phase_is_known_of_old_rows_and_new(config):
    assert [phase_of(row) for row in OLD] == PHASES
    new = [
        row | ({} if phase is None else {"phase": phase})
        for row, phase in zip(OLD, PHASES, strict=True)
    ]
    new[2]["task"] = "generation"  # its phase says what counts, not its task
    assert [phase_of(row) for row in new] == PHASES
    assert evals_since_best([*OLD, OLD[2] | {"step": 2}], "loss") == 1
    assert evals_since_best([*new, new[2] | {"step": 2}], "loss") == 1
