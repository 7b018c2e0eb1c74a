"""The report holds what the run holds, and fetches nothing."""

import json
import re
import shutil
import subprocess

import pytest

from jaxtune.config.load import dump, load_config
from jaxtune.core.errors import UserError
from jaxtune.report.page import write_report


@pytest.fixture
def run(tmp_path):
    directory = tmp_path / "run <1>"
    directory.mkdir()
    (directory / "config.yaml").write_text(dump(load_config()))
    common = {
        "split": "eval",
        "task": "classification",
        "rows": 3,
        "perplexity": 2.0,
        "macro_f1": 0.5,
        "accuracy_greedy": 0.25,
    }
    table = {"classes": ["a", "b"], "rows_true_columns_predicted": [[1, 0], [1, 1]]}
    rows = [
        {**common, "step": 0, "loss": 2.125, "accuracy": 0.125, "confusion": table, "intervals": {}}
    ]
    rows += [
        {
            "split": "train",
            "step": n,
            "loss": 2 - n / 10,
            "learning_rate": 1e-4,
            "grad_norm": 1.0,
            "tokens_per_second": 9.0,
        }
        for n in range(1, 8)
    ]
    rows.append(
        {
            **common,
            "step": 7,
            "loss": 0.5625,
            "accuracy": 0.875,
            "confusion": table,
            "intervals": {"accuracy": [0.75, 0.9375]},
        }
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


def own(path):
    """The page without plotly's code."""
    return re.sub(r"<script>.*?</script>", "", path.read_text(), count=1, flags=re.DOTALL)


def test_page(run, tmp_path):
    page = own(write_report([run], tmp_path / "report.html"))
    for text in (
        "2.125",
        "0.5625",
        "0.875",
        "0.75 to 0.9375",
        "after-text",
        "run &lt;1&gt;",
        "learning_rate: 0.0002",
    ):
        assert text in page
    assert "<script>alert" not in page
    assert "b&lt;b&gt;" in page
    assert "run <1>" not in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert page.count("Plotly.newPlot") == 6  # four curves and two confusion matrices


def test_several_runs_on_one_page(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "config.yaml").write_text(
        dump(load_config(overrides=["adapter.rank=4", "run.dir=elsewhere"]))
    )
    rows = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    rows[-1] |= {"accuracy": 0.625, "chrf": 0.4375, "intervals": {"accuracy": [0.5, 0.6875]}}
    (other / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = own(write_report([run, other], tmp_path / "both.html"))
    assert page.count("<h2>Configuration</h2>") == 2
    compared = page[page.index("<h2>Compared") : page.index("<h2>Training")]
    for text in (
        "0.875 (0.75 to 0.9375)",
        "0.625 (0.5 to 0.6875)",
        "0.4375",
        "adapter.rank",
        ">16<",
        ">4<",
    ):
        assert text in compared
    assert "run.dir" not in compared
    assert "learning_rate" not in compared
    assert (
        page.count("Plotly.newPlot") == 4 + 2 * 2
    )  # curves over each other, and each one's confusion matrices
    same = own(write_report([run, run], tmp_path / "same.html"))
    assert "All keys are the same" in same


def test_figures_on_the_way_answers_and_mistakes(run, tmp_path):
    with (run / "metrics.jsonl").open("a") as file:
        for step, value in ((2, 0.25), (4, 0.5)):
            file.write(
                json.dumps({"split": "eval", "step": step, "loss": 1.0, "token_f1": value}) + "\n"
            )
    predictions = [
        {
            "place": "f:1",
            "prompt": [{"role": "user", "content": "2+2?"}],
            "wanted": "4",
            "said": "4",
        },
        {
            "place": "f:2",
            "prompt": [{"role": "user", "content": "3+3?"}],
            "wanted": "6",
            "said": "<seven>",
        },
    ]
    (run / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in predictions))
    page = own(write_report([run], tmp_path / "report.html"))
    assert page.count("Plotly.newPlot") == 7
    assert "token_f1" in page
    assert "1 of 2 rows" in page
    assert "&lt;seven&gt;" in page
    assert "2+2?" not in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_every_plot_is_drawn_in_a_browser(run, tmp_path):
    """Without a network, and without a word on the console."""
    page = write_report([run, run], tmp_path / "report.html")
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--proxy-server=127.0.0.1:9",
        "--virtual-time-budget=9000",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [
            "chromium",
            *options,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            f"file://{page}",
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.count('class="main-svg"') >= 8
    assert done.stdout.count('class="plot-container plotly"') == 8
    said = [
        line for line in done.stderr.splitlines() if "CONSOLE" in line and "chrome://" not in line
    ]
    assert not said


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has no metrics yet"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
