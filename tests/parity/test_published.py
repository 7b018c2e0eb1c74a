"""The key sets of published models' `config.json`, made small: each is understood, and means
what transformers takes it to mean.
"""

import json

import numpy as np
import pytest
from transformers import AutoConfig

from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import families, tools

pytestmark = pytest.mark.usefixtures("quick_compilation")

_ALL = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
_LLAMA = _ALL | {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "rms_norm_eps": 1e-5,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
}
_MISTRAL = _ALL | {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "max_position_embeddings": 32768,
}
_QWEN = _ALL | {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "max_position_embeddings": 32768,
    "max_window_layers": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
_QWEN3 = _QWEN | {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 16,
    "rope_scaling": None,
    "sliding_window": None,
}
_GEMMA = _ALL | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "cache_implementation": "hybrid",
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 24,
    "rms_norm_eps": 1e-6,
}
_PHI = _ALL | {
    "model_type": "phi3",
    "architectures": ["Phi3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "original_max_position_embeddings": 4096,
    "pad_token_id": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
KNOWN_CONFIGS = {
    "Llama 1": _LLAMA
    | {
        "max_sequence_length": 2048,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "pad_token_id": 0,
    },
    "Llama 3.2": _LLAMA
    | {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": [2, 3, 4],
        "head_dim": 16,
        "mlp_bias": False,
        "rope_theta": 500000.0,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
    },
    "SmolLM2": _LLAMA
    | {
        "attention_bias": False,
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_theta": 100000,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        "max_position_embeddings": 8192,
    },
    "Mistral 7B v0.1": _MISTRAL | {"sliding_window": 6},
    "Mistral Nemo": _MISTRAL
    | {
        "sliding_window": None,
        "head_dim": 24,
        "attention_dropout": 0.0,
        "max_position_embeddings": 1024000,
    },
    "Qwen2.5": _QWEN,
    "Qwen2.5 Math": _QWEN | {"use_mrope": False, "sliding_window": 4096},
    "Qwen2 with windows": _QWEN | {"use_sliding_window": True, "sliding_window": 6},
    "Qwen2.5 with YaRN": _QWEN
    | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    "Qwen3": _QWEN3,
    "Qwen3 30B-A3B": _QWEN3
    | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
    },
    "Gemma 2": _GEMMA
    | {
        "model_type": "gemma2",
        "architectures": ["Gemma2ForCausalLM"],
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "eos_token_id": [1, 107],
        "hidden_act": "gelu_pytorch_tanh",
        "rope_theta": 10000.0,
        "sliding_window": 6,
        "sliding_window_size": 6,
    },
    "Gemma 3 1B": _GEMMA
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 6,
        "sliding_window_pattern": 6,
    },
    "Gemma 3 270M": _GEMMA
    | {
        "model_type": "gemma3_text",
        "architectures": ["Gemma3ForCausalLM"],
        "_sliding_window_pattern": 6,
        "rope_local_base_freq": 10000,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "rope_theta": 1000000,
        "sliding_window": 6,
        "use_bidirectional_attention": False,
    },
    "Phi-3 mini 4k": _PHI
    | {"rope_scaling": None, "sliding_window": 7, "max_position_embeddings": 4096},
    "Phi-3.5 mini": _PHI
    | {
        "rope_scaling": {"long_factor": [1.5] * 8, "short_factor": [1.1] * 8, "type": "longrope"},
        "sliding_window": 262144,
        "max_position_embeddings": 131072,
    },
    "Phi-4 mini": _PHI
    | {
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 0.75,
        "sliding_window": 262144,
        "rope_scaling": {"long_factor": [1.5] * 6, "short_factor": [1.1] * 6, "type": "longrope"},
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "OLMo 2": _ALL
    | {
        "model_type": "olmo2",
        "architectures": ["Olmo2ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500000,
        "tie_word_embeddings": False,
        "use_cache": False,
        "max_position_embeddings": 4096,
    },
    "SmolLM3": _ALL
    | {
        "model_type": "smollm3",
        "architectures": ["SmolLM3ForCausalLM"],
        "attention_bias": False,
        "bos_token_id": None,
        "layer_types": ["full_attention"] * 6,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0, 1, 1],
        "pad_token_id": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": True,
    },
    "Granite 3": _ALL
    | {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "attention_multiplier": 0.1,
        "embedding_multiplier": 12.0,
        "logits_scaling": 8.0,
        "residual_multiplier": 0.22,
        "mlp_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 131072,
    },
    "Mixtral": _MISTRAL
    | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "rope_theta": 1000000.0,
    },
}
SMALL = {
    "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 6,
    "num_key_value_heads": 2, "vocab_size": 160,
    "transformers_version": "4.45.0",
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN_CONFIGS)
def test_a_published_configuration_means_what_transformers_says(name, tmp_path, one_device):
    raw = KNOWN_CONFIGS[name] | SMALL
    config = AutoConfig.for_model(
        **json.loads(json.dumps(raw)) | {"initializer_range": 0.2, "torch_dtype": "float32"}
    )
    reference = families.save(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert from_hf(raw, name).num_layers == 6
    ids = np.random.default_rng(0).integers(0, 160, (2, 20))
    expected = tools.torch_logits(reference, ids)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(
        load_model(resolve(str(tmp_path)), one_device)(ids), expected, atol=2e-4, rtol=0
    )
