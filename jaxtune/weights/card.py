"""The model card: the `README.md` of an export."""

from jaxtune.weights.source import OverriddenSource, Source
from jaxtune.weights.verify import Comparison

_MADE = {
    "peft": "A LoRA adapter, in PEFT's format.",
    "hf": "A model in Hugging Face's format.",
    "gguf": "A model in GGUF, for llama.cpp and what is built on it.",
    "meta": "A model in the format of Meta's own code.",
    "orbax": "A model as an orbax checkpoint, one array a tensor, by Hugging Face's names.",
}
_USE = {
    "peft": """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base})
model = PeftModel.from_pretrained(base, "path/of/this/directory")""",
    "hf": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/of/this/directory")""",
    "gguf": """import jaxtune

model, tokenizer = jaxtune.load("path/of/the/file.gguf")""",
}
_USE["meta"] = _USE["orbax"] = """import jaxtune

model, tokenizer = jaxtune.load("path/of/this/directory")"""


def card(source: Source, to: str, result: Comparison, about: str, adapted: bool) -> str:
    """The text of the card.

    Args:
        source: the base.
        to: `peft` or a format of `weights.convert`.
        result: what was verified.
        about: data, hyperparameters and metrics, as Markdown; may be empty.
        adapted: whether an adapter is merged into the weights.

    """
    found = source.transformers() or {"pretrained_model_name_or_path": source.name}
    base = f'"{source.name}"'
    if "gguf_file" in found:
        base = f'"{found["pretrained_model_name_or_path"]}", gguf_file="{found["gguf_file"]}"'
    whose = "PEFT" if to == "peft" else "transformers"
    size, use = source.config_json()["vocab_size"], _USE[to]
    if (
        to == "peft"
        and isinstance(source, OverriddenSource)
        and source.base.config_json()["vocab_size"] != size
    ):
        use = use.replace(
            "\nmodel =",
            f"\nbase.resize_token_embeddings({size})  # the adapter has the new tokens' "
            "rows\nmodel =",
        )
    torch = (
        f"{result.torch_difference:.1e} by {whose}"
        if result.torch_difference is not None
        else f"{whose} not run ({result.torch_note})"
    )
    library = "peft" if to == "peft" else "transformers"
    merged = " An adapter is merged into it, in float32." if adapted and to != "peft" else ""
    return f"""---
library_name: {library}
base_model: {source.name}
---
{_MADE[to]} Made by jaxtune from `{source.name}`.{merged}

```python
{use.format(base=base)}
```
{about}
## Verified before it was written

Over {result.tokens} tokens of text, logits up to {result.largest_logit:.1f} differ from the original's by
{result.reload_difference:.1e} when read again by jaxtune, {torch}.
"""
