"""K-quants: the mixture of llama.cpp, its rounding, and what an export says of both."""

import gguf
import numpy as np
import pytest

from jaxtune.core.errors import UserError
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.formats.gguf import quantize
from jaxtune.workflows.convert import convert_to
from tests.support import families, tools

pytestmark = pytest.mark.usefixtures("quick_compilation")

NORMAL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}


def types_of(path):
    return {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(path).tensors
        if len(tensor.shape) > 1
    }


# From llama_tensor_get_type_impl of llama.cpp (src/llama-quant.cpp): with 4 layers, of
# `use_more_bits` (i < n/8, i >= 7n/8, every third from the second on) layers 2 and 3.
def mixture(few):
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    expected = {f"blk.{layer}.{name}.weight": few for layer in range(4) for name in names}
    more = {f"blk.{layer}.{name}.weight" for layer in (2, 3) for name in ("attn_v", "ffn_down")}
    return expected | dict.fromkeys({*more, "output.weight"}, "Q6_K") | {"token_embd.weight": few}


@pytest.mark.parametrize(
    ("dtype", "few"), [("q4_k_m", "Q4_K"), pytest.param("q5_k_m", "Q5_K", marks=pytest.mark.slow),
                       pytest.param("q6_k", "Q6_K", marks=pytest.mark.slow)]
)  # fmt: skip
def test_a_k_quant_is_mixed_as_by_llama_cpp_and_says_how_far_it_is(dtype, few, tmp_path):
    families.save(tmp_path / "model", families.config("llama", **NORMAL))
    tools.byte_tokenizer().save_pretrained(tmp_path / "model")
    path = tmp_path / "out.gguf"
    result = convert_to(str(tmp_path / "model"), path, "gguf", dtype=dtype)
    assert types_of(path) == mixture(few)
    comparison = result.comparison
    assert comparison.torch_note is None
    assert comparison.divergence > 0
    assert 0 < comparison.same_choice <= 1


def test_types_where_rows_are_no_whole_blocks_and_of_other_families():
    def of(family, name, shape, dtype="q4_k_m", **changes):
        raw = families.config(family, **changes).to_dict()
        return quantize.stored_type(name, shape, dtype, from_hf(raw, "config.json")).name

    layer = "model.layers.0.self_attn"
    assert of("llama", f"{layer}.q_proj.weight", (64, 96)) == "Q5_0"
    assert of("llama", f"{layer}.q_proj.weight", (64, 96), "q5_k_m") == "Q5_1"
    assert of("llama", f"{layer}.q_proj.weight", (64, 96), "q6_k") == "Q8_0"
    assert of("llama", f"{layer}.q_proj.weight", (64, 40)) == "F16"
    assert of("llama", "lm_head.weight", (288, 96)) == "Q8_0"
    assert of("qwen2", "model.embed_tokens.weight", (288, 256)) == "Q6_K"  # the head too
    assert of("llama", "model.norm.weight", (256,)) == "F32"
    assert of("phi3", "model.layers.3.self_attn.qkv_proj.weight", (256, 256)) == "Q6_K"
    assert of("phi3", "model.layers.0.self_attn.qkv_proj.weight", (256, 256)) == "Q4_K"
    assert of("mixtral", f"{layer}.k_proj.weight", (256, 256), num_local_experts=8) == "Q8_0"
    assert of("mixtral", f"{layer}.o_proj.weight", (256, 256), num_local_experts=8) == "Q5_K"
    expert = "model.layers.3.block_sparse_moe.experts.1"
    assert of("mixtral", f"{expert}.w2.weight", (256, 256)) == "Q6_K"
    assert of("mixtral", f"{expert}.w1.weight", (256, 256)) == "Q4_K"
    assert of("mixtral", "model.layers.3.block_sparse_moe.gate.weight", (4, 256)) == "F32"
    assert of("llama", f"{layer}.v_proj.weight", (256, 256), num_hidden_layers=80) == "Q6_K"
    assert (
        of("llama", "model.layers.11.self_attn.v_proj.weight", (256, 256), num_hidden_layers=80)
        == "Q5_K"
    )


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_rows_are_rounded_one_by_one_in_any_number_of_parts(kind, monkeypatch):
    stored_as = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((7, 512)).astype(np.float32)
    whole = quantize.encode(values, stored_as)
    monkeypatch.setattr(quantize, "_CHUNK", 1024)
    np.testing.assert_array_equal(quantize.encode(values, stored_as), whole)
    np.testing.assert_array_equal(quantize.encode(values[3:5], stored_as), whole[3:5])
    again = gguf.quants.dequantize(whole, stored_as)
    error = np.sqrt(np.mean((again - values) ** 2))
    assert error < {"Q4_K": 0.09, "Q5_K": 0.05, "Q6_K": 0.025}[kind]


def test_without_llama_cpp_a_k_quant_is_refused_with_what_to_install(tmp_path, monkeypatch):
    quantize._quantize_chunk.cache_clear()
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install xllamacpp"):
        quantize.check_encoder("q4_k_m")
    quantize.check_encoder("q8_0")
