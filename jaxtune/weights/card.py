"""The model card: the `README.md` of an export.

Names of models, files and metrics are data: in a card they stand as code, which no Markdown, HTML
or YAML can end.
"""

import re

import yaml

from jaxtune.weights.formats.format import Format
from jaxtune.weights.source import Source
from jaxtune.weights.verify import Comparison

_ONE_LINE = 1 << 20


def model_card(
    export_format: Format, source: Source, comparison: Comparison, about: str, *, is_merged: bool
) -> str:
    """Return the text of the card.

    Args:
        export_format: what the export is written in.
        source: the base.
        comparison: what was verified.
        about: data, hyperparameters and metrics, as Markdown; may be empty.
        is_merged: whether an adapter is merged into the weights.

    """
    checker = export_format.checked_by
    if comparison.torch_difference is None:
        checked = f"{checker} not run ({code(comparison.torch_note or '')})"
    else:
        checked = f"{comparison.torch_difference:.1e} by {checker}"
    rounded = ""
    if comparison.divergence is not None and comparison.same_choice is not None:
        rounded = (
            " Its numbers are rounded: beside the original, the next token's distribution diverges "
            f"by {comparison.divergence:.2e} nats (KL, mean over the texts), and the likeliest "
            f"token is the same after {comparison.same_choice:.1%} of the tokens."
        )
    largest = f"{comparison.largest_logit:.1f}"
    merged = " An adapter is merged into it, in float32." if is_merged else ""
    return f"""---
{_header(export_format, source)}---
{export_format.description} Made by jaxtune from {code(source.name)}.{merged}

{code_block(export_format.usage(source), "python")}
{about}
## Verified before it was written

Over {comparison.tokens} tokens of text, logits up to {largest} differ from the original's by
{comparison.reload_difference:.1e} when read again by jaxtune, {checked}.{rounded}
"""


def _header(export_format: Format, source: Source) -> str:
    """Return the card's metadata; the base must be the id of a repository without revision: the hub
    refuses a card with anything else.
    """
    header = {"library_name": export_format.library}
    repository = source.repository
    if repository is not None:
        header["base_model"] = repository[0]
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=_ONE_LINE)
    note = "# base_model is left out: it was no model of the hub\n"
    return text + (note if repository is None else "")


def code(text: str) -> str:
    """Return a text as Markdown's code within a line, whatever it holds."""
    line = " ".join(text.split())
    fence = "`" * (_longest_run(line) + 1)
    padding = " " if "`" in line or not line else ""
    return f"{fence}{padding}{line}{padding}{fence}"


def code_block(text: str, language: str) -> str:
    """Return a text as Markdown's block of code, whatever it holds."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)
