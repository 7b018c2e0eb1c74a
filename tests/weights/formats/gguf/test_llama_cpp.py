"""GGUF files in llama.cpp itself: the same next tokens with the same probabilities as transformers'
on the model they were written from; what llama.cpp cannot compute is not written.
"""

import importlib.util
from functools import partial

import numpy as np
import pytest

import jaxtune
from jaxtune.core.errors import RunError, UserError
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.formats.gguf import writer
from jaxtune.weights.formats.gguf.llama_cpp import ask_llama_cpp
from jaxtune.weights.formats.gguf.writer import check_expressible
from jaxtune.workflows.convert import convert_to
from tests.support import families, tools
from tests.support.cases import thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")

PHI = {"sliding_window": None, "hidden_size": 64}
GEMMA = {"query_pre_attn_scalar": 16}
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# llama.cpp chooses the divisors by the context it has room for, which is a multiple of 256.
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.5, 3.0, 7.0], "partial_rotary_factor": 0.375,
}  # fmt: skip
LONG_PHI = {
    **PHI, "rope_parameters": LONG, "max_position_embeddings": 1024,
    "original_max_position_embeddings": 300,
}  # fmt: skip
LONG_LLAMA = {
    "max_position_embeddings": 1024, "head_dim": 6,
    "rope_parameters": {
        **LONG, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 300,
    },
}  # fmt: skip
LLAMA3 = families.FAMILIES["llama"][1]["rope_parameters"]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
UNTIED = {"tie_word_embeddings": False}
GEMMA3_LINEAR = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 8.0},
}

# By name: the entry of `families`, what differs from it, and the length of the prompts.
MODELS = {
    "llama": ("llama", {}, 16),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}, 16),
    "llama, wide heads": ("llama", {"head_dim": 16, "tie_word_embeddings": True}, 16),
    "mistral": ("mistral_without_window", {}, 16),
    "mixtral": ("mixtral", {"sliding_window": None}, 16),
    "qwen2": ("qwen2", {}, 16),
    "qwen3": ("qwen3", {}, 16),
    "qwen3_moe": ("qwen3_moe", {}, 16),
    "phi3": ("phi3", PHI, 16),
    "phi3, a window as long as the context": ("phi3", PHI | {"sliding_window": 128}, 16),
    "gemma2": ("gemma2", GEMMA, 16),
    "gemma3": ("gemma3_pattern", GEMMA | {"final_logit_softcapping": None}, 16),
    "gemma3, capped": ("gemma3_pattern", GEMMA, 16),
    "gemma3, stretched": ("gemma3_pattern", GEMMA | {"rope_parameters": GEMMA3_LINEAR}, 16),
    "gemma3 with a head": ("gemma3_pattern", GEMMA | UNTIED, 16),
    "olmo2": ("olmo2", {}, 16),
    "smollm3": ("smollm3", {}, 16),
    "granite": ("granite", {}, 16),
    "granite, llama3": ("granite", {"rope_parameters": LLAMA3}, 16),
    "phi3 long, short text": ("phi3_long", LONG_PHI, 16),
    "phi3 long, long text": ("phi3_long", LONG_PHI, 400),
    "llama longrope, short text": ("llama", LONG_LLAMA, 16),
    "llama longrope, long text": ("llama", LONG_LLAMA, 400),
    "llama yarn, short text": ("llama", {"rope_parameters": YARN}, 16),
    "qwen2 yarn, long text": ("qwen2", {"rope_parameters": YARN}, 100),
    "qwen3 yarn, a factor of its own": (
        "qwen3", {"rope_parameters": YARN | {"attention_factor": 1.9}}, 16,
    ),
    "qwen3 yarn, DeepSeek's factor": (
        "qwen3", {"rope_parameters": YARN | {"mscale": 2.0, "mscale_all_dim": 0.5}}, 16,
    ),
    "olmo2 linear": ("olmo2", {"rope_parameters": LINEAR}, 16),
}  # fmt: skip
# llama.cpp looks Gemma's activation up in a table of 16 bits.
TOLERANCE = {"gemma2": 2e-3, "gemma3_pattern": 2e-3}


def save(directory, name, changes, **tokenizer):
    """Save a tiny model and its tokenizer; return transformers' model."""
    model = families.save(directory, families.config(name, **changes))
    tools.byte_tokenizer(merges=[("a", "b")], **tokenizer).save_pretrained(directory)
    return model


KEPT = (
    "llama", "gemma3, capped", "phi3 long, short text", "phi3 long, long text",
    "qwen3 yarn, a factor of its own",
)  # fmt: skip


@pytest.mark.parametrize("name", thinned(MODELS, *KEPT))
def test_llama_cpp_computes_the_same_as_transformers(name, tmp_path):
    family, changes, length = MODELS[name]
    model = save(tmp_path / "model", family, changes)
    path = tmp_path / "out.gguf"
    result = convert_to(str(tmp_path / "model"), path, "gguf")
    assert result.comparison.torch_note is None
    ids = np.random.default_rng(0).integers(32, 126, (4, length))
    logits = tools.torch_logits(model, ids)[:, -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    answers = ask_llama_cpp(path, ids.tolist(), context=256 if length < 256 else 512)
    for row, answer in enumerate(answers.likeliest):
        assert next(iter(answer)) == expected[row].argmax()
        assert len(answer) == 20
        for token, value in answer.items():
            assert abs(value - expected[row, token]) < TOLERANCE.get(family, 2e-4)


BIAS = {"attention_bias": True}
REFUSED = {
    "qwen3 attention_bias": ("qwen3", BIAS, "no place for attention_bias of qwen3"),
    "qwen3_moe attention_bias": ("qwen3_moe", BIAS, "no place for attention_bias"),
    "olmo2 attention_bias": ("olmo2", BIAS, "no place for attention_bias"),
    "gemma2 attention_bias": ("gemma2", BIAS, "no place for attention_bias"),
    "smollm3 mlp_bias": ("smollm3", {"mlp_bias": True}, "no place for mlp_bias of smollm3"),
    "olmo2 tied": ("olmo2", {"tie_word_embeddings": True}, "wants a head apart from the embedding"),
    "gemma2 untied": ("gemma2", UNTIED, "Train without the head"),
    "gemma2 uncapped": ("gemma2_uncapped", {}, "cannot leave out the soft-caps"),
    "qwen2 heads": ("qwen2", {"head_dim": 16}, r"\(64\) to be hidden_size \(32\)"),
    "phi3 heads": ("phi3", {"sliding_window": None, "head_dim": 16}, r"\(64\) to be hidden_size"),
    "phi3 window": ("phi3", {}, "no place for the sliding window of phi3"),
    "mistral window": ("mistral", {}, "no place for the sliding window of mistral"),
    "smollm3 windows": ("smollm3_windows", {}, "no place for the sliding window of smollm3"),
    "qwen2 llama3": ("qwen2", {"rope_parameters": LLAMA3}, "no rope_type llama3 for qwen2"),
    "gemma2 yarn": ("gemma2", {"rope_parameters": YARN}, "no rope_type yarn for gemma2"),
    "llama dynamic": ("llama", {"rope_parameters": DYNAMIC}, "no rope_type dynamic"),
    "yarn betas": (
        "qwen3", {"rope_parameters": YARN | {"beta_fast": 8.0}},
        "no place for beta_fast 8.0 of rope_type yarn",
    ),
    "yarn not truncated": (
        "qwen3", {"rope_parameters": YARN | {"truncate": False}}, "truncate False",
    ),
    "some experts": ("qwen3_moe_mixed", {}, "wants experts in every layer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_in_one_line(name):
    family, changes, message = REFUSED[name]
    raw = families.config(family, **changes).to_dict()
    architecture = families.AutoModelForCausalLM._model_mapping[type(families.config(family))]
    config = from_hf(raw | {"architectures": [architecture.__name__]}, "config.json")
    with pytest.raises(UserError, match=message) as error:
        check_expressible(config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "changes", "error", "message"),
    [
        ("olmo2", {"tie_word_embeddings": True}, UserError, r"cannot load .*output\.weight"),
        ("phi3", {"hidden_size": 64}, RunError, "llama.cpp computes something else"),
    ],
)
def test_what_no_rule_refuses_is_not_written_unless_llama_cpp_computes_it(
    family, changes, error, message, tmp_path, monkeypatch
):
    """Read back by jaxtune, both are the models that were to be written."""
    save(tmp_path / "model", family, changes)
    monkeypatch.setattr(writer, "_reason_against", lambda *arguments: None)
    with pytest.raises(error, match=message):
        jaxtune.convert(str(tmp_path / "model"), tmp_path / "out.gguf", to="gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_an_export_says_why_llama_cpp_was_not_asked(tmp_path, monkeypatch):
    save(tmp_path / "model", "llama", {})
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare" / name).write_bytes((tmp_path / "model" / name).read_bytes())
    convert = partial(convert_to, to="gguf")
    without = convert(str(tmp_path / "bare"), tmp_path / "bare.gguf").comparison
    assert (without.torch_difference, without.torch_note) == (
        None,
        "its server wants a tokenizer, and the model has none",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    comparison = convert(str(tmp_path / "model"), tmp_path / "out.gguf").comparison
    assert (comparison.torch_difference, comparison.torch_note) == (None, "xllamacpp not installed")
