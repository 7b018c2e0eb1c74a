"""Every format out: read again here and by others, identical where nothing was rounded."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from jaxtune import convert
from jaxtune.core.errors import RunError, UserError
from jaxtune.weights.convert import convert_model
from jaxtune.weights.formats import hf
from jaxtune.weights.peft import open_adapter
from jaxtune.weights.source import resolve
from tests.support import families, peft_side, tools
from tests.support.cases import thinned
from tests.support.directories import IDS, assert_identical, json_or_text, logits, tensors_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


FOR_TRANSFORMERS_4 = {
    "torch_dtype", "rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor",
    "num_experts",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", thinned(families.FAMILIES, "llama", "qwen2", "gemma3", "phi3_long", "qwen3_moe_mixed")
)
def test_hugging_face_there_and_back_is_byte_identical(name, tmp_path):
    families.save(tmp_path / "a", families.config(name))
    convert(str(tmp_path / "a"), tmp_path / "b", to="hf")
    assert_identical(tmp_path / "a", tmp_path / "b")
    before, after = (json.loads((tmp_path / place / "config.json").read_text()) for place in "ab")
    assert before.items() <= after.items()
    assert after.keys() - before.keys() <= FOR_TRANSFORMERS_4


def test_mixed_dtypes_shards_and_the_files_beside_the_weights_survive(
    chat_model, tmp_path, monkeypatch
):
    source = shutil.copytree(chat_model, tmp_path / "a")
    tools.rewrite_tensors(
        source,
        lambda tensors: {
            name: t.to(torch.bfloat16) if "mlp" in name else t for name, t in tensors.items()
        },
    )
    (source / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [257, 259], "temperature": 0.5})
    )
    monkeypatch.setattr(hf, "SHARD_BYTES", 20_000)
    convert(str(source), tmp_path / "b")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 3
    assert_identical(source, tmp_path / "b")
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    ):
        assert json_or_text(source / name) == json_or_text(tmp_path / "b" / name)
    settings, copied = (json_or_text(tmp_path / d / "tokenizer_config.json") for d in "ab")
    assert copied == settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    assert resolve(str(tmp_path / "b")).stop_ids() == [257, 259]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    np.testing.assert_array_equal(tools.torch_logits(ours, IDS), tools.torch_logits(theirs, IDS))


def test_a_chosen_dtype_halves_the_file(chat_model, tmp_path):
    convert(str(chat_model), tmp_path / "b", dtype="bfloat16")
    before, after = tensors_of(chat_model), tensors_of(tmp_path / "b")
    for name, value in before.items():
        np.testing.assert_array_equal(
            torch.from_numpy(value).to(torch.bfloat16).float().numpy(),
            after[name].astype(np.float32),
        )
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")]
# transformers' reader takes some numbers from its defaults for the family, whatever the file says:
# these are those defaults. It does not read frequency scaling, and no OLMo 2, SmolLM3, Granite or
# Mixtral of this kind.
READ_BY_TRANSFORMERS = {
    "llama": {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
    "mistral_without_window": {},
    "qwen2": {},
    "qwen3": {"head_dim": 128},
    "qwen3_moe": {"head_dim": 128, "moe_intermediate_size": 768},
    "phi3": {"sliding_window": None},
    "gemma2": {
        "query_pre_attn_scalar": 256,
        "head_dim": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3_pattern": {
        "query_pre_attn_scalar": 256,
        "head_dim": 256,
        "final_logit_softcapping": None,
    },
}
READ_HERE = {
    "llama": {}, "olmo2": {}, "smollm3": {}, "granite": {},
    "phi3_long": {"hidden_size": 32, "intermediate_size": 64}, "phi3": {"sliding_window": None},
    "qwen3_moe": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "mixtral": {"sliding_window": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "reader"),
    thinned(
        [(name, "theirs") for name in READ_BY_TRANSFORMERS]
        + [(name, "ours") for name in READ_HERE],
        *((name, "theirs") for name in ("llama", "gemma2", "qwen3_moe")),
        *((name, "ours") for name in ("phi3_long", "mixtral")),
        unpack=True,
    ),
)
def test_gguf_out_computes_the_same(name, reader, tmp_path, one_device):
    changes = (READ_BY_TRANSFORMERS if reader == "theirs" else READ_HERE)[name]
    config = families.config(name, **({"hidden_size": 64, "intermediate_size": 96} | changes))
    reference = families.save(tmp_path / "a", config)
    tools.byte_tokenizer(merges=MERGES).save_pretrained(tmp_path / "a")
    convert(str(tmp_path / "a"), tmp_path / "model.gguf", to="gguf")
    expected = tools.torch_logits(reference, IDS)
    np.testing.assert_allclose(logits(tmp_path / "model.gguf", one_device), expected, atol=2e-4)
    if reader == "theirs":
        theirs = AutoModelForCausalLM.from_pretrained(
            tmp_path, gguf_file="model.gguf", dtype=torch.float32, attn_implementation="eager"
        )
        np.testing.assert_allclose(tools.torch_logits(theirs, IDS), expected, atol=2e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_gguf_dtypes_and_tokenizer(dtype, tmp_path, one_device):
    config = tools.tiny_config(hidden_size=64, intermediate_size=96)
    tools.save_model(tmp_path / "a", config, tools.byte_tokenizer(merges=MERGES))
    convert(str(tmp_path / "a"), tmp_path / "out", to="gguf", dtype=dtype)
    (path,) = (tmp_path / "out").glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", gguf_file=path.name, dtype=torch.float32
    )
    expected = logits(tmp_path / "a", one_device)
    found = logits(path, one_device)
    np.testing.assert_allclose(tools.torch_logits(theirs, IDS), found, atol=2e-4)
    assert 0 < np.abs(found - expected).max() < 0.1 * np.abs(expected).max()
    assert path.stat().st_size < 0.7 * (tmp_path / "a" / "model.safetensors").stat().st_size
    text = "Hello, it's 1969!\n\n  <|im_start|>user äöü 日本"
    before = AutoTokenizer.from_pretrained(tmp_path / "a")
    for after in (
        resolve(str(path)).tokenizer(),
        AutoTokenizer.from_pretrained(tmp_path / "out", gguf_file=path.name),
    ):
        assert after(text)["input_ids"] == before(text)["input_ids"]
        assert after.chat_template == before.chat_template
        assert (after.eos_token, after.bos_token) == (before.eos_token, before.bos_token)


@pytest.mark.slow
def test_the_real_model_in_gguf_becomes_hugging_face_and_is_the_same(smollm2, tmp_path, one_device):
    convert(str(smollm2), tmp_path / "hf", dtype="bfloat16")
    text = tools.chat("What is 2 + 2?", "4")["messages"]
    ours, theirs = resolve(str(smollm2)).tokenizer(), AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert (
        ours.apply_chat_template(text)["input_ids"] == theirs.apply_chat_template(text)["input_ids"]
    )
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == 2


def test_orbax_there_and_back(chat_model, tmp_path, one_device):
    convert(str(chat_model), tmp_path / "o", to="orbax")
    np.testing.assert_array_equal(
        logits(tmp_path / "o", one_device), logits(chat_model, one_device)
    )
    convert(str(tmp_path / "o"), tmp_path / "b", to="hf")
    assert_identical(chat_model, tmp_path / "b")


MERGED = {
    "lora": {"rank_pattern": {"q_proj": 2}},
    "dora": {"use_dora": True},
    "everything": {
        "target_modules": ["q_proj", "embed_tokens", "lm_head"],
        "bias": "all",
        "modules_to_save": ["norm"],
    },
}


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers|tied):UserWarning")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", MERGED)
def test_merged_equals_unmerged(name, tied, tmp_path):
    """In float32, stored in the base's dtype, tied matrices untied only where the adapter tells
    them apart.
    """
    config = tools.tiny_config(attention_bias=True, tie_word_embeddings=tied)
    tools.save_model(tmp_path / "base", config)
    reference = peft_side.lora(tools.random_model(config), b_std=0.05, **MERGED[name])
    reference.save_pretrained(tmp_path / "adapter")
    convert(str(tmp_path / "base"), tmp_path / "merged", adapter=str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    theirs = tools.torch_logits(reference.eval(), IDS)
    np.testing.assert_allclose(tools.torch_logits(merged, IDS), theirs, atol=3e-4)
    assert {value.dtype for value in tensors_of(tmp_path / "merged").values()} == {
        np.dtype("float32")
    }
    assert json_or_text(tmp_path / "merged" / "config.json")["tie_word_embeddings"] == (
        tied and name != "everything"
    )


def test_merging_into_bfloat16_rounds_once(tmp_path, one_device):
    config = tools.tiny_config()
    tools.save_model(tmp_path / "base", config, dtype=torch.bfloat16)
    reference = peft_side.lora(tools.random_model(config).to(torch.bfloat16).float(), b_std=0.05)
    reference.save_pretrained(tmp_path / "adapter")
    convert(str(tmp_path / "base"), tmp_path / "merged", adapter=str(tmp_path / "adapter"))
    expected = reference.merge_and_unload().state_dict()
    for name, value in tensors_of(tmp_path / "merged").items():
        wanted = expected[name].to(torch.bfloat16).float().numpy()
        assert value.dtype.name == "bfloat16"
        assert (
            np.mean(value.astype(np.float32) != wanted) < 0.01
        )  # the last bit, where the sums round differently


def test_what_is_not_the_same_is_not_written(chat_model, tmp_path, one_device, monkeypatch):
    from jaxtune.weights import merge

    real = merge._mapped

    def a_tenth_more(tensor, row_map):
        return real(tensor, lambda block, rows: block + 1.1 * (row_map(block, rows) - block))

    monkeypatch.setattr(merge, "_mapped", a_tenth_more)
    reference = peft_side.lora(tools.random_model(tools.tiny_config()), b_std=0.1)
    reference.save_pretrained(tmp_path / "adapter")
    with pytest.raises(RunError, match="merged weights compute something else"):
        convert_model(
            tmp_path / "out",
            resolve(str(chat_model)),
            "hf",
            one_device,
            adapter=open_adapter(tmp_path / "adapter"),
        )
    monkeypatch.setattr(hf, "write_weights", wrong_by_one_bit(hf.write_weights))
    with pytest.raises(
        RunError, match=r"model\.layers\.1\.mlp\.up_proj\.weight are not what was to be written"
    ):
        convert_model(tmp_path / "out", resolve(str(chat_model)), "hf", one_device)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def wrong_by_one_bit(write):
    def wrong(directory, tensors):
        write(directory, tensors)
        path = directory / "model.safetensors"
        data = bytearray(path.read_bytes())
        header = int.from_bytes(data[:8], "little")
        info = json.loads(data[8 : 8 + header])["model.layers.1.mlp.up_proj.weight"]
        data[8 + header + info["data_offsets"][0] + 5] ^= 1
        path.write_bytes(data)

    return wrong


REFUSED = {
    "windows in gguf": ("mistral", "gguf", "no place for the sliding window"),
    "windows of qwen in gguf": (
        "qwen2_windows",
        "gguf",
        "no place for the sliding window of qwen2",
    ),
    "layers of gemma in gguf": (
        "gemma3",
        "gguf",
        "no place for this model; read again it would have layers",
    ),
    "another family in meta": ("qwen2", "meta", "Meta's format has a place for Llama only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_format_without_a_place_for_the_model_is_one_clear_error(name, tmp_path):
    family, to, message = REFUSED[name]
    families.save(tmp_path / "a", families.config(family))
    with pytest.raises(UserError, match=message):
        convert(str(tmp_path / "a"), tmp_path / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_wrong_arguments(chat_model, tmp_path):
    with pytest.raises(UserError, match="format 'onnx' is not supported"):
        convert(str(chat_model), tmp_path / "x", to="onnx")
    with pytest.raises(UserError, match="dtype 'q8_0' is not supported for hf"):
        convert(str(chat_model), tmp_path / "x", dtype="q8_0")
    (tmp_path / "x.gguf").touch()
    with pytest.raises(UserError, match="already exists"):
        convert(str(chat_model), tmp_path / "x.gguf", to="gguf")
