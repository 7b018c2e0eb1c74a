"""`config.json`: what transformers writes is understood, and what no model can have is one clear
error before anything is computed.
"""

import json
import shutil

import pytest
from transformers import AutoConfig

from jaxtune.core.errors import UserError
from jaxtune.models.families.from_hf import from_hf
from jaxtune.models.families.table import FAMILIES
from jaxtune.weights.load import check_source
from jaxtune.weights.source import resolve
from tests.support import tools

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 288,
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
# What PretrainedConfig.to_dict() of transformers 4.57 adds to every file.
OF_TRANSFORMERS_4 = {
    "return_dict": True, "output_hidden_states": False, "torchscript": False, "pruned_heads": {},
    "chunk_size_feed_forward": 0, "is_decoder": False, "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False, "finetuning_task": None, "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0}, "prefix": None, "sep_token_id": None, "max_length": 20,
    "min_length": 0, "do_sample": False, "early_stopping": False, "num_beams": 1,
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0,
    "length_penalty": 1.0, "no_repeat_ngram_size": 0, "num_return_sequences": 1,
    "num_beam_groups": 1, "diversity_penalty": 0.0, "tf_legacy_loss": False, "use_bfloat16": False,
    "remove_invalid_values": False, "_name_or_path": "", "transformers_version": "4.57.3",
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_keys_that_transformers_writes_are_known(kind):
    """Its defaults of each family, in the dialects of 4 and 5."""
    config = AutoConfig.for_model(kind)
    raw = json.loads(json.dumps(config.to_dict())) | {"architectures": None}
    expected = from_hf(raw, kind)
    assert from_hf(OF_TRANSFORMERS_4 | raw, kind) == expected
    heads = config.num_attention_heads // config.num_key_value_heads
    assert from_hf(raw | {"num_key_value_groups": heads}, kind) == expected
    if kind in ("qwen3", "qwen3_moe"):
        assert from_hf(raw | {"use_qk_norm": True}, kind) == expected
    if kind == "qwen3_moe":
        both = {"num_experts": 128, "num_local_experts": 128}
        assert from_hf(raw | both, kind) == expected
    if kind == "gemma3_text":
        both = {"sliding_window_pattern": 6, "_sliding_window_pattern": 6}
        assert from_hf(raw | both, kind) == expected


@pytest.mark.parametrize(
    "wrong", [{"num_key_value_groups": 3}, {"use_qk_norm": True}, {"qk_layernorm": True}]
)
def test_a_key_that_changes_the_model_stays_refused(wrong):
    with pytest.raises(UserError, match=f"config.json: keys .* understand: {next(iter(wrong))}"):
        from_hf(LLAMA | wrong, "config.json")


ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip
WRONG = [
    *(("hidden_size", value) for value in ("32", 32.0, [32], True, -1, 0, 10**30, {}, {"a": [[]]})),
    *(("num_hidden_layers", value) for value in (10**9, "3", True, 0, [3])),
    ("vocab_size", -288),
    ("num_attention_heads", 64),
    ("num_key_value_heads", 1.5),
    ("rms_norm_eps", "1e-5"),
    ("rms_norm_eps", float("nan")),
    ("rms_norm_eps", -1.0),
    ("rope_theta", float("inf")),
    ("rope_theta", 0),
    ("rope_theta", [10000.0]),
    ("tie_word_embeddings", "false"),
    ("attention_bias", 1),
    ("hidden_act", 3),
    ("hidden_act", ["silu"]),
    ("model_type", {"a": 1}),
    ("architectures", "LlamaForCausalLM"),
    ("layer_types", "full_attention"),
    ("layer_types", [1, 2, 3]),
    ("rope_scaling", 8.0),
    ("rope_scaling", [ROPE]),
    ("rope_scaling", ROPE | {"factor": "8"}),
    ("rope_scaling", ROPE | {"factor": None}),
    ("rope_scaling", ROPE | {"factor": float("nan")}),
    ("rope_scaling", ROPE | {"rope_type": ["llama3"]}),
    ("rope_scaling", ROPE | {"low_freq_factor": 4.0}),
    ("rope_parameters", {"rope_theta": True}),
    ("max_position_embeddings", [2048]),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=lambda value: repr(value)[:30])
def test_a_value_that_no_model_can_have_is_one_line(key, value):
    with pytest.raises(UserError, match=r"a/config\.json: .*") as error:
        from_hf(LLAMA | {key: value}, "a/config.json")
    named = {"rope_scaling": "factor|rope_type|rope_scaling"}.get(key, key)
    assert any(name in str(error.value) for name in named.split("|"))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "hidden_act", "attention_bias"])
def test_null_is_as_if_the_key_were_not_there(key):
    assert from_hf(LLAMA | {key: None}, "config.json") == from_hf(LLAMA, "config.json")


def test_dialects_that_disagree_are_refused():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}, "rope_theta": 6.0}
    with pytest.raises(UserError, match="rope_parameters says something else about rope_theta"):
        from_hf(LLAMA | both, "config.json")


@pytest.mark.parametrize(("text", "message"), [
    ("[1]", "not a JSON object"),
    ("[" * 100_000, "not valid JSON"),
    ('{"hidden_size": 1' + "0" * 5000 + "}", "not valid JSON"),
    ("7", "not a JSON object"),
])  # fmt: skip
def test_a_file_that_is_no_configuration(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        resolve(str(tmp_path)).config_json()


def test_layers_are_counted_against_the_weights(chat_model, tmp_path):
    shutil.copy(chat_model / "model.safetensors", tmp_path)
    raw = tools.json_file(chat_model / "config.json") | {"num_hidden_layers": 9_000}
    tools.write_json_file(tmp_path / "config.json", raw)
    with pytest.raises(UserError, match="num_hidden_layers is 9000, and the weights have 3 layers"):
        check_source(resolve(str(tmp_path)))


@pytest.mark.parametrize("value", ["2", True, -1, 2.0, [[2]], ["</s>"], {"id": 2}, 10**12])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_stop_tokens_are_token_ids(name, value, tmp_path):
    tools.write_json_file(tmp_path / "config.json", LLAMA)
    tools.write_json_file(tmp_path / name, LLAMA | {"eos_token_id": value})
    with pytest.raises(UserError, match=rf"{name}: eos_token_id = .* is neither a token id nor"):
        resolve(str(tmp_path)).stop_ids()
