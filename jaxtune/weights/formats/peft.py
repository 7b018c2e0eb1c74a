"""An adapter in PEFT's format, beside its base; `weights.peft` reads and writes it."""

import json

from jaxtune.weights.formats.format import Format
from jaxtune.weights.source import OverriddenSource, Source


class PeftFormat(Format):
    """What PEFT's `save_pretrained` writes."""

    name = "peft"
    description = "An adapter, in PEFT's format."
    library = "peft"
    checked_by = "PEFT"
    keeps_adapter = True

    def usage(self, source: Source) -> str:
        """See Format."""
        arguments = source.pretrained_arguments() or {"pretrained_model_name_or_path": source.name}
        name, revision = source.repository or (source.name, None)
        base = _quoted(name) + (f", revision={_quoted(revision)}" if revision else "")
        if "gguf_file" in arguments:
            base = (
                f"{_quoted(arguments['pretrained_model_name_or_path'])}, "
                f"gguf_file={_quoted(arguments['gguf_file'])}"
            )
        size = source.config_json()["vocab_size"]
        is_resized = (
            isinstance(source, OverriddenSource) and source.base.config_json()["vocab_size"] != size
        )
        resizing = (
            f"\nbase.resize_token_embeddings({size})  # the adapter has the new tokens' rows"
            if is_resized
            else ""
        )
        return f"""from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base}){resizing}
model = PeftModel.from_pretrained(base, "path/of/this/directory")"""


def _quoted(text: str) -> str:
    """Return a text as a literal of Python; as JSON writes it, it is one."""
    return json.dumps(text, ensure_ascii=False)


FORMAT = PeftFormat()
