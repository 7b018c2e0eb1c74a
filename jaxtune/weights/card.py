"""The model card: the `README.md` of an export."""

from jaxtune.weights.formats.format import Format
from jaxtune.weights.source import Source
from jaxtune.weights.verify import Comparison


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
        checked = f"{checker} not run ({comparison.torch_note})"
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
library_name: {export_format.library}
{_base_model(source)}
---
{export_format.description} Made by jaxtune from `{source.name}`.{merged}

```python
{export_format.usage(source)}
```
{about}
## Verified before it was written

Over {comparison.tokens} tokens of text, logits up to {largest} differ from the original's by
{comparison.reload_difference:.1e} when read again by jaxtune, {checked}.{rounded}
"""


def _base_model(source: Source) -> str:
    """Return the card's line on the base, which must be the id of a repository without revision:
    the hub refuses a card with anything else.
    """
    if (repository := source.repository) is None:
        return "# base_model is left out: it was no model of the hub"
    return f"base_model: {repository[0]}"
