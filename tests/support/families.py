"""Tiny random models of every family, made by transformers."""

from types import SimpleNamespace

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_COMMON = {
    "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
_LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 3.0, 7.0],
}  # fmt: skip
_GEMMA = {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 24}
_MOE = {"num_experts_per_tok": 2}

# name: (model_type, changes)
FAMILIES = {
    "llama": ("llama", {"rope_parameters": _LLAMA3}),
    "mistral": ("mistral", {"sliding_window": 7, "head_dim": 16}),
    "mistral_without_window": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_windows": (
        "qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
    "gemma2": ("gemma2", _GEMMA | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 3.0}),
    "gemma2_uncapped": (
        "gemma2",
        _GEMMA | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3": (
        "gemma3_text",
        _GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
            },
        },
    ),
    "gemma3_pattern": (
        "gemma3_text",
        _GEMMA | {"num_hidden_layers": 7, "final_logit_softcapping": 5.0},
    ),
    "phi3": ("phi3", {"sliding_window": 9}),
    "phi3_long": (
        "phi3",
        {
            "rope_parameters": _LONG | {"partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 20,
            "tie_word_embeddings": True,
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {}),
    "smollm3_windows": (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layers": [1, 0, 0, 1]},
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.2,
            "residual_multiplier": 0.22,
            "logits_scaling": 8.0,
            "attention_bias": True,
        },
    ),
    "mixtral": ("mixtral", _MOE | {"num_local_experts": 4, "sliding_window": 7}),
    "qwen3_moe": (
        "qwen3_moe",
        _MOE
        | {"num_experts": 4, "moe_intermediate_size": 24, "head_dim": 16, "norm_topk_prob": True},
    ),
    "qwen3_moe_mixed": (
        "qwen3_moe",
        _MOE
        | {
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "head_dim": 16,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 1,
        },
    ),
}


def config(name, **changes):
    kind, own = FAMILIES[name]
    return AutoConfig.for_model(kind, **(_COMMON | {"initializer_range": 0.2} | own | changes))


def model(config, seed=0):
    """A random model whose norms and biases are not what they start as; eager, since Gemma 2's
    sdpa drops the soft-cap.
    """
    torch.manual_seed(seed)
    found = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return found


def save(directory, config, seed=0):
    found = model(config, seed)
    found.save_pretrained(directory)
    return found


def on_disk(model):
    """Parameters by the names they have in files, with experts one by one; each with its
    gradient as `.grad`.
    """
    found = {}
    for name, value in model.named_parameters():
        if ".experts." not in name or value.dim() != 3:
            found[name] = value
            continue
        stem, kind = name.rsplit(".", 1)
        parts = {"gate_up_proj": ["gate_proj", "up_proj"], "down_proj": ["down_proj"]}[kind]
        if model.config.model_type == "mixtral":
            stem = stem.replace(".mlp.", ".block_sparse_moe.")
            parts = [
                {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[part] for part in parts
            ]
        for expert in range(value.shape[0]):
            cut = zip(parts, value.grad[expert].chunk(len(parts)), strict=True)
            found |= {
                f"{stem}.{expert}.{part}.weight": SimpleNamespace(grad=grad) for part, grad in cut
            }
    if model.config.model_type == "mixtral":
        found = {
            name.replace(".mlp.gate.", ".block_sparse_moe.gate."): value
            for name, value in found.items()
        }
    return found


def old_dialect(raw):
    """The keys of RoPE as transformers 4 wrote them."""
    rope = raw.pop("rope_parameters")
    if raw["model_type"] == "gemma3_text":
        local, whole = rope["sliding_attention"], rope["full_attention"]
        raw["rope_local_base_freq"], raw["rope_theta"] = (
            local["rope_theta"],
            whole.pop("rope_theta"),
        )
        raw["rope_scaling"] = None if whole["rope_type"] == "default" else whole
        return
    raw["rope_theta"] = rope.pop("rope_theta")
    if raw["model_type"] == "phi3":
        raw["partial_rotary_factor"] = rope.pop("partial_rotary_factor", 1.0)
        rope.pop("original_max_position_embeddings", None)
    kind = rope.pop("rope_type", "default")
    raw["rope_scaling"] = (
        None if kind == "default" else {"type": "su" if kind == "longrope" else kind, **rope}
    )
