"""What stands in a model card is text, whatever a model, a file or a metric is called."""

import html
import json

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from jaxtune.config.load import load_config
from jaxtune.weights.card import code, code_block, model_card
from jaxtune.weights.formats.hf import HuggingFaceDirectory
from jaxtune.weights.formats.peft import FORMAT as PEFT
from jaxtune.weights.verify import Comparison
from jaxtune.workflows.export import describe_run

HOSTILE = [
    "plain/name",
    "a\nlicense: mit\n---\n<script>alert(1)</script>",
    "x```\n<script>alert(1)</script>\n```",
    "``<b class=payload>``",
    """'"; import os; "`~~~ # | [click](javascript:alert(1))""",
    "yes",
    "1e5",
    "{a: b}",
    "\u2028<img src=x onerror=alert(1)>",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_stays_a_text(tmp_path, name):
    (tmp_path / "config.json").write_text('{"vocab_size": 8}')
    source = HuggingFaceDirectory(name, tmp_path)
    comparison = Comparison(9, 1.0, 0.0, None, f"no PEFT: {name}")
    run = tmp_path / "run"
    run.mkdir()
    (run / "data.json").write_text('{"train": {"rows": 3}}')
    rows = [{"split": "eval", "step": step, "task": "lm", name: 0.5} for step in (0, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config()
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"train": name}),
            "adapter": config.adapter.model_copy(update={"targets": name}),
        }
    )
    about = describe_run(config, run)
    text = model_card(PEFT, source, comparison, about, is_merged=False)
    card = ModelCard(text)
    of_hub = {"base_model": name} if name == HOSTILE[0] else {}
    assert card.data.to_dict() == {"library_name": "peft"} | of_hub
    page = MarkdownIt("commonmark").enable("table").render(card.text)
    assert not any(tag in page for tag in ("<script", "<b ", "<img", "<a "))
    assert page.count("<h2>") == 4
    assert page.count("<table>") == 1
    block = page.partition('<pre><code class="language-python">')[2].partition("</code>")[0]
    compile(html.unescape(block), "card", "exec")


def test_plain_names_look_as_before():
    assert code("org/name") == "`org/name`"
    assert code_block("x = 1", "python") == "```python\nx = 1\n```"
