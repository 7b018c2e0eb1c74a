"""A tokenizer's way into a GGUF file and out of it, beside llama.cpp's and transformers'."""

import json

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxtune.core.errors import UserError
from jaxtune.weights.formats.gguf import tokenizer as gguf_tokenizer
from jaxtune.weights.formats.gguf.llama_cpp import ask_llama_cpp
from jaxtune.weights.source import resolve
from tests.support import gguf_files, tools

TEXTS = ["hello", "say hello 1234", "Hello hell don't\n\n  x"]


def splitting(pattern, ignore_merges):
    """A tokenizer with the token `hello`, which no merge makes."""
    raw = json.loads(
        tools.byte_tokenizer(merges=[("h", "e"), ("l", "l")]).backend_tokenizer.to_str()
    )
    raw["model"]["vocab"]["hello"] = len(raw["model"]["vocab"])
    raw["model"]["ignore_merges"] = ignore_merges
    backend = Tokenizer.from_str(json.dumps(raw))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


@pytest.mark.parametrize("ignore_merges", [True, False])
def test_words_that_are_tokens_stay_whole_where_they_did(ignore_merges, tmp_path):
    original = splitting(gguf_tokenizer._LLAMA3, ignore_merges)
    path = tmp_path / "x.gguf"
    gguf_files.write_model(path, tokenizer=original, num_hidden_layers=1)
    expected = [original(text)["input_ids"] for text in TEXTS]
    assert (len(expected[0]) == 1) == ignore_merges
    ours = resolve(str(path)).tokenizer()
    assert [ours(text)["input_ids"] for text in TEXTS] == expected
    assert ask_llama_cpp(path, [], TEXTS).tokens == expected


def test_a_tokenizer_without_merges_is_read_by_llama_cpp_too(tmp_path):
    gguf_files.write_model(tmp_path / "x.gguf", num_hidden_layers=1)
    expected = [tools.byte_tokenizer()(text)["input_ids"] for text in TEXTS]
    ours = resolve(str(tmp_path / "x.gguf")).tokenizer()
    assert [ours(text)["input_ids"] for text in TEXTS] == expected
    assert ask_llama_cpp(tmp_path / "x.gguf", [], TEXTS).tokens == expected


def test_tokens_that_llama_cpp_would_not_make_are_refused():
    with pytest.raises(UserError, match=r"no place for ignore_merges with .* qwen2.*: hello"):
        gguf_tokenizer.tokenizer_metadata(splitting(gguf_tokenizer._QWEN2, True), 288, [])
    gguf_tokenizer.tokenizer_metadata(splitting(gguf_tokenizer._QWEN2, False), 288, [])


def test_stops_beside_the_end_of_sequence_go_in_and_out(tmp_path):
    """Of a base whose end of sequence is not what ends a turn."""
    tokenizer = tools.byte_tokenizer(eos="</s>")
    turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    metadata = gguf_tokenizer.tokenizer_metadata(tokenizer, 288, [turn, tokenizer.eos_token_id])
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.ggml.eot_token_id"] == turn
    assert "tokenizer.ggml.eom_token_id" not in metadata
    plain = gguf_tokenizer.tokenizer_metadata(tokenizer, 288, [tokenizer.eos_token_id])
    assert gguf_tokenizer.with_stops(plain, [turn]) == metadata
    assert gguf_tokenizer.with_stops(metadata, [turn]) == metadata
    gguf_files.write_model(tmp_path / "plain.gguf", tokenizer=tokenizer)
    path = gguf_files.rewrite(tmp_path / "plain.gguf", tmp_path / "x.gguf", metadata)
    source = resolve(str(path))
    assert source.stop_ids() == sorted([turn, tokenizer.eos_token_id])
    assert source.generation_config()["eos_token_id"] == source.stop_ids()


WRONG = {
    "tokens": (7, "tokens is not a list"),
    "merges": (["ab"], "which is no pair"),
    "token_type": ([1, 2], "token_type has 2 items"),
    "pre": (3, "pre is not a text"),
    "eos_token_id": (288, "eos_token_id 288 is the id of no token"),
    "bos_token_id": ("1", "bos_token_id 1 is the id of no token"),
    "model": ("llama", "scores is missing"),
}


@pytest.mark.parametrize("key", WRONG)
def test_a_tokenizer_that_cannot_be_is_one_line(key, tmp_path):
    value, message = WRONG[key]
    gguf_files.write_model(tmp_path / "plain.gguf", num_hidden_layers=1)
    change = {f"tokenizer.ggml.{key}": value}
    path = gguf_files.rewrite(tmp_path / "plain.gguf", tmp_path / "x.gguf", change)
    with pytest.raises(UserError, match=message) as error:
        resolve(str(path)).tokenizer()
    assert "\n" not in str(error.value)
