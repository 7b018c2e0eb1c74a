"""The report holds what the run holds, and fetches nothing."""

import json
import re

import pytest

from jaxtune.config.loading import dump, load_config
from jaxtune.core.errors import UserError
from jaxtune.report.page import write_report


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run <1>"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(load_config()))
    common = {"split": "eval", "task": "classification", "rows": 3, "perplexity": 2.0, "macro_f1": 0.5, "accuracy_greedy": 0.25}
    table = {"classes": ["a", "b"], "rows_true_columns_predicted": [[1, 0], [1, 1]]}
    rows = [{**common, "step": 0, "loss": 2.125, "accuracy": 0.125, "confusion": table, "intervals": {}}]
    rows += [
        {"split": "train", "step": n, "loss": 2 - n / 10, "learning_rate": 1e-4, "grad_norm": 1.0, "tokens_per_second": 9.0}
        for n in range(1, 8)
    ]
    rows.append(
        {**common, "step": 7, "loss": 0.5625, "accuracy": 0.875, "confusion": table, "intervals": {"accuracy": [0.75, 0.9375]}}
    )
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {
        "prompt": [{"role": "user", "content": "<script>alert(1)</script>"}],
        "wanted": "w",
        "before": "b<b>",
        "after": "after-text",
    }
    (directory / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return directory


def test_page(run, tmp_path):
    page = write_report([run], tmp_path / "report.html").read_text()
    own = re.sub(r"<script>.*?</script>", "", page, count=1, flags=re.DOTALL)  # without plotly's code
    for text in ("2.125", "0.5625", "0.875", "0.75 to 0.9375", "after-text", "run &lt;1&gt;", "learning_rate: 0.0002"):
        assert text in own
    assert "<script>alert" not in own
    assert "b&lt;b&gt;" in own
    assert "run <1>" not in own
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", own)
    assert own.count("Plotly.newPlot") == 6  # four curves and two confusion matrices


def test_several_runs_on_one_page(run, tmp_path):
    page = write_report([run, run], tmp_path / "both.html").read_text()
    assert page.count("<h2>Configuration</h2>") == 2


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has no metrics yet"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
