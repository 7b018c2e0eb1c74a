"""A run directory made before run directories had a layout version goes on, and is read as ever.

`tests/fixtures/layout-0` was made by the release 0.1.0 on one CPU device: `stopped` was killed
after step 5 of 8 and has a checkpoint of step 3, `finished` is the same run undisturbed (without
its checkpoints and its page), `expected` its adapter and metrics.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxtune
from jaxtune.cli.main import main
from jaxtune.tracking.metrics_log import read_metrics
from tests.support import tools

FIXTURE = Path(__file__).parents[1] / "fixtures" / "layout-0"
TIMES = ("step_seconds", "tokens_per_second", "mfu", "peak_bytes")


@pytest.fixture
def earlier(tmp_path, monkeypatch):
    shutil.copytree(FIXTURE, tmp_path / "earlier")
    monkeypatch.chdir(tmp_path / "earlier")
    return tmp_path / "earlier"


def test_it_goes_on_to_the_end_it_would_have_had(earlier):
    """On the machine that made it, to the bit; elsewhere, to rounding."""
    done = tools.jaxtune("train", "stopped/config.yaml", "--quiet", cwd=earlier)
    assert done.returncode == 0, done.stderr
    adapters = [
        load_file(folder / "adapter_model.safetensors")
        for folder in (earlier / "stopped" / "adapter", earlier / "expected")
    ]
    assert adapters[0].keys() == adapters[1].keys()
    for name, tensor in adapters[1].items():
        np.testing.assert_allclose(adapters[0][name], tensor, rtol=1e-4, atol=1e-6, err_msg=name)
    rows = [
        [row for row in read_metrics(folder) if row["split"] == "train"]
        for folder in (earlier / "stopped", earlier / "expected")
    ]
    assert [row["step"] for row in rows[0]] == list(range(1, 9))
    for row, expected in zip(*rows, strict=True):
        numbers = {key: value for key, value in expected.items() if key not in TIMES}
        assert {key: row[key] for key in numbers if key != "split"} == pytest.approx(
            {key: value for key, value in numbers.items() if key != "split"}, rel=1e-5
        )
    assert json.loads((earlier / "stopped" / "env.json").read_text())["layout"] >= 1


def test_it_is_evaluated_generated_from_exported_and_reported(earlier, capsys):
    recorded = read_metrics(earlier / "finished")[-1]
    metrics = jaxtune.evaluate("finished", "test.jsonl", task="lm")
    assert metrics["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    assert len(jaxtune.generate("finished", ["1+1?"], max_new_tokens=4)) == 1
    out = jaxtune.export("finished", to="peft", out=earlier / "adapter")
    exported, kept = (
        load_file(folder / "adapter_model.safetensors") for folder in (out, earlier / "expected")
    )
    assert all(np.array_equal(tensor, exported[name]) for name, tensor in kept.items())
    assert main(["report", "finished", "--out", "page.html"]) == 0
    page = (earlier / "page.html").read_text()
    assert f"{recorded['loss']:.4f}"[:5] in page
    capsys.readouterr()


def test_a_newer_layout_is_refused(earlier, capsys):
    path = earlier / "stopped" / "env.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layout": 99}))
    before = sorted(path.relative_to(earlier) for path in earlier.rglob("*"))
    assert main(["train", "stopped/config.yaml", "--quiet"]) == 2
    assert "layout 99" in capsys.readouterr().err
    assert sorted(path.relative_to(earlier) for path in earlier.rglob("*")) == before
