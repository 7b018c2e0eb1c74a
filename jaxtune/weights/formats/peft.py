"""An adapter in PEFT's format, beside its base; `weights.peft` reads and writes it."""

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
        base = f'"{name}"' + (f', revision="{revision}"' if revision else "")
        if "gguf_file" in arguments:
            base = (
                f'"{arguments["pretrained_model_name_or_path"]}", '
                f'gguf_file="{arguments["gguf_file"]}"'
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


FORMAT = PeftFormat()
