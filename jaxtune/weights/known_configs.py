"""The `config.json` of a few popular gated models, so that planning needs neither a license nor a
network.
"""

from typing import Any

_LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "num_key_value_heads": 8,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}


def _llama(
    embed: int, mlp: int, layers: int, heads: int, factor: float = 8.0, **further: Any
) -> dict[str, Any]:
    sizes = {
        "hidden_size": embed,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    return {
        **_LLAMA,
        **sizes,
        "rope_scaling": {**scaling, "original_max_position_embeddings": 8192},
        **further,
    }


KNOWN_CONFIGS = {
    "meta-llama/Llama-3.2-1B": _llama(
        2048, 8192, 16, 32, 32.0, head_dim=64, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.2-3B": _llama(
        3072, 8192, 28, 24, 32.0, head_dim=128, tie_word_embeddings=True
    ),
    "meta-llama/Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "meta-llama/Llama-3.1-70B": _llama(8192, 28672, 80, 64),
    "meta-llama/Llama-3.3-70B": _llama(8192, 28672, 80, 64),
    "meta-llama/Llama-3.1-405B": _llama(16384, 53248, 126, 128),
}
"""By hub id, without the suffix -Instruct: an instruction-tuned model has the same architecture."""
