"""The report holds what the run holds, and fetches nothing."""

import json
import re
import shutil
import subprocess

import pytest

from jaxtune.config.load import dump, load_config
from jaxtune.core.errors import UserError
from jaxtune.report.charts import curve
from jaxtune.report.page import write_report

CHART = 'class="plotly-graph-div"'
NEEDS_BROWSER = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="chromium is not installed"
)


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
    assert page.count(CHART) == 6  # four curves and two confusion matrices


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
        page.count(CHART) == 4 + 2 * 2
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
    assert page.count(CHART) == 7
    assert "token_f1" in page
    assert "1 of 2 rows" in page
    assert "&lt;seven&gt;" in page
    assert "2+2?" not in page


def in_browser(page, folder):
    """What Chromium makes of a page without a network, and what it says on its console."""
    options = [
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--proxy-server=127.0.0.1:9",
        "--virtual-time-budget=9000",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        ["chromium", *options, f"--user-data-dir={folder}", "--dump-dom", f"file://{page}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stderr.splitlines()
    return done.stdout, [line for line in lines if "CONSOLE" in line and "chrome://" not in line]


@NEEDS_BROWSER
def test_every_plot_is_drawn_in_a_browser(run, tmp_path):
    """Without a network, and without a word on the console."""
    page = write_report([run, run], tmp_path / "report.html")
    dom, said = in_browser(page, tmp_path / "profile")
    assert dom.count('class="main-svg"') >= 8
    assert dom.count('class="plot-container plotly"') + dom.count("js-plotly-plot") >= 8
    assert not said


PAYLOAD = (
    "</script></pre></style></title>\"'><b class=payload>%s</b>"
    "<script>document.documentElement.dataset.hit = '%s'</script>"
    "<img src=x onerror=\"document.documentElement.dataset.hit = '%s'\">"
)


def paths_in(value, path=()):
    """Yield the path of each field of a JSON value: first of the whole, then of what is in it."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    for key, item in items:
        yield from paths_in(item, (*path, key))


def script(name):
    return PAYLOAD % (name, name, name)


def replaced(value, path, name, kind):
    """A JSON value with a script in a field, or as the field's name."""
    value = json.loads(json.dumps(value))
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if kind == "key" and isinstance(inner, dict):
        inner[script(name)] = inner.pop(path[-1])
    else:
        inner[path[-1]] = script(name)
    return value


def all_replaced(value, name, kept=("split", "step", "phase")):
    """A JSON value with a script in every field that holds no other, and as one more name."""
    if isinstance(value, list):
        return [all_replaced(item, f"{name}.{n}") for n, item in enumerate(value)]
    if not isinstance(value, dict):
        return script(name)
    fields = {
        key: item if key in kept else all_replaced(item, f"{name}.{key}")
        for key, item in value.items()
    }
    return fields | {script(f"{name}.key"): 0.5}


@pytest.fixture
def full_run(run):
    """A run directory with all of the files that a page reads."""
    part = {"rows": 3, "source": "f.jsonl", "lengths": {"edges": [0, 8, 16], "counts": [1, 2]}}
    files = {
        "data.json": {"train": part, "eval": part},
        "env.json": {"layout": 1, "python": "3", "versions": {"jax": "1"}, "devices": {"count": 1}},
        "verification.json": {
            "tokens": 9,
            "largest_logit": 2.5,
            "reload_difference": 1e-7,
            "torch_difference": 1e-6,
            "torch_note": None,
        },
    }
    for name, value in files.items():
        (run / name).write_text(json.dumps(value))
    message = {"role": "user", "content": "2+2?"}
    row = {"place": "f:1", "prompt": [message], "wanted": "4", "said": "5", "chosen": "6"}
    (run / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    sample = {"prompt": [message], "wanted": "w", "before": "b", "after": "a"}
    sample["during"] = [{"step": 3, "text": "t"}]
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        during = {"split": "eval", "phase": "during", "step": 3, "loss": 1.0, "token_f1": 0.5}
        file.write(json.dumps(during) + "\n")
    return run


def rows_of(run):
    """The values in a run directory's JSON files, by file and line."""
    lines = {
        path.name: path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        for path in sorted(run.glob("*.json*"))
    }
    return {name: [json.loads(line) for line in texts] for name, texts in lines.items()}


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_a_field_of_any_type_is_escaped(full_run, tmp_path):
    """A script in one field of one file at a time, or as the field's name."""
    runs = []
    for name, rows in rows_of(full_run).items():
        for path in paths_in(rows):
            if name == "metrics.jsonl" and 0 < path[0] < 7:
                continue  # the rows of training are alike
            for kind in ("value", "key"):
                copy = shutil.copytree(full_run, tmp_path / f"{len(runs)}")
                write_rows(copy / name, replaced(rows, path, len(runs), kind))
                runs.append(copy)
    assert len(runs) > 150
    text = write_report([full_run, *runs], tmp_path / "report.html").read_text()
    assert "&lt;b class=payload&gt;" in text
    assert not re.search("<b class=payload|<img src=x", text)


@NEEDS_BROWSER
def test_no_field_of_any_file_runs_a_script(full_run, tmp_path):
    """All fields at once; and without the page's policy nothing would run either."""
    hostile = shutil.copytree(full_run, tmp_path / "hostile")
    for name, rows in rows_of(full_run).items():
        write_rows(hostile / name, all_replaced(rows, name))
    text = write_report([full_run, hostile], tmp_path / "report.html").read_text()
    assert len(re.findall("&lt;b class=payload&gt;", text)) >= 40
    page = tmp_path / "without-policy.html"
    page.write_text(text.replace("Content-Security-Policy", "nothing"))
    dom, said = in_browser(page, tmp_path / "profile")
    assert "&lt;b class=payload&gt;" in dom
    titles = re.findall(r'<text class="gtitle".*?</text>', dom)
    assert any("&lt;b class=payload&gt;" in title for title in titles)  # not read as plotly's tags
    assert not re.search(r"data-hit|<(b|b [^>]*)class=.?payload|<img src=.?x", dom)
    assert not said


@NEEDS_BROWSER
def test_the_policy_stops_a_script_that_were_not_escaped(run, tmp_path):
    page = write_report([run], tmp_path / "report.html")
    script = "<script>document.documentElement.dataset.hit = 1</script><img src=x onerror=hit()>"
    page.write_text(page.read_text().replace("after-text", script))
    dom, said = in_browser(page, tmp_path / "profile")
    assert "data-hit" not in dom
    assert len([line for line in said if "Content Security Policy" in line]) >= 2


def test_halves_of_characters_and_deep_values_do_no_harm(full_run, tmp_path):
    with (full_run / "metrics.jsonl").open("a") as file:
        file.write('{"split": "eval", "step": 4, "phase": "during", "\\ud800": 0.5}\n')
    assert "\\ud800" in own(write_report([full_run], tmp_path / "report.html"))
    (full_run / "env.json").write_text('{"a": ' + "[" * 900 + "]" * 900 + "}")
    try:
        write_report([full_run], tmp_path / "report.html")
    except UserError as error:
        assert "nested too deeply" in str(error)  # noqa: PT017 (or it is shown)


def test_numbers_that_are_texts_are_shown_as_texts(full_run, tmp_path):
    """In a configuration, too, and in the name of the directory."""
    directory = full_run.rename(full_run.with_name("<script>alert(1)</script>".replace("/", "-")))
    with (directory / "config.yaml").open("a") as file:
        file.write("# </pre><script>alert(2)</script>\n")
    page = own(write_report([directory], tmp_path / "report.html"))
    assert "<script>alert" not in page
    assert page.count("&lt;script&gt;alert") == 3  # title, heading, configuration


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a run directory"):
        write_report([tmp_path], tmp_path / "report.html")
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match="has no metrics yet"):
        write_report([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_plotly_is_given_no_tags():
    """It reads tags in its texts, and shows escaped ones as they are."""
    figure = curve("<b>loss</b>", {"<i>run</i>": ([1], [2.0])})
    drawn = json.loads(figure.partition('json">')[2].partition("</script>")[0])
    assert drawn["layout"]["title"]["text"] == "&lt;b&gt;loss&lt;/b&gt;"
    assert drawn["data"][0]["name"] == "&lt;i&gt;run&lt;/i&gt;"
