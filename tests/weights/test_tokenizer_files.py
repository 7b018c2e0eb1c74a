"""The tokenizer and the chat templates that were trained with are in every export."""

import shutil

import pytest
from transformers import AutoTokenizer

import jaxtune
from jaxtune.core.errors import UserError
from jaxtune.weights.generation_config import read_generation_config
from jaxtune.weights.source import resolve
from jaxtune.weights.tokenizer_files import load_tokenizer, save_tokenizer, tokenizer_files
from tests.support import peft_side, tools

pytestmark = pytest.mark.usefixtures("quick_compilation")

SETS = {"default": tools.CHATML, "tool_use": "{{ tools }}" + tools.CHATML}


def words_with(templates, directory):
    words = tools.byte_tokenizer(templates)
    words.save_pretrained(directory)
    path = directory / "tokenizer.json"
    path.write_text(path.read_text() + " \n")  # as nothing but a copy has it
    return words


def is_copy(directory, original):
    before, after = (path / "tokenizer.json" for path in (original, directory))
    return before.read_bytes() == after.read_bytes()


def in_the_old_way(directory):
    """A list of named templates within tokenizer_config.json, as transformers 4 wrote it."""
    raw = tools.json_file(directory / "tokenizer_config.json")
    raw["chat_template"] = [{"name": name, "template": text} for name, text in SETS.items()]
    tools.write_json_file(directory / "tokenizer_config.json", raw)


@pytest.mark.parametrize("layout", ["folder", "list", "one file"])
def test_template_sets_survive(layout, tmp_path):
    words_with(tools.CHATML if layout == "list" else SETS, tmp_path)
    if layout == "list":
        (tmp_path / "chat_template.jinja").unlink()
        in_the_old_way(tmp_path)
    elif layout == "one file":
        shutil.rmtree(tmp_path / "additional_chat_templates")
    expected = AutoTokenizer.from_pretrained(tmp_path).chat_template
    (tmp_path / "out").mkdir()
    save_tokenizer(tmp_path / "out", tokenizer_files(tmp_path), load_tokenizer(tmp_path))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == expected
    assert is_copy(tmp_path / "out", tmp_path)
    assert expected == (tools.CHATML if layout == "one file" else SETS)


def test_files_are_copied_unless_training_changed_the_tokenizer(tmp_path):
    words_with(tools.CHATML, tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    words = load_tokenizer(tmp_path)
    words.backend_tokenizer.no_padding()
    for name, template in (("same", tools.CHATML), ("changed", "{{ messages }}")):
        words.chat_template = template
        (tmp_path / name).mkdir()
        save_tokenizer(tmp_path / name, tokenizer_files(tmp_path), words)
        assert ((tmp_path / name / "tokenizer.json").read_text() == text) == (name == "same")
        assert load_tokenizer(tmp_path / name).chat_template == template


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """A base without a template, and an adapter of PEFT's with its own tokenizer."""
    directory = tmp_path_factory.mktemp("adapted")
    config = tools.tiny_config()
    tools.save_model(directory / "base", config, tools.byte_tokenizer(None, eos="</s>"))
    adapter = peft_side.lora(tools.random_model(config), b_std=0.02)
    adapter.save_pretrained(directory / "adapter")
    words_with(SETS, directory / "adapter")
    return directory


@pytest.mark.parametrize("to", ["hf", "orbax", "meta", "gguf"])
def test_a_merged_model_has_the_adapters_tokenizer(to, adapted, tmp_path):
    out = tmp_path / ("model.gguf" if to == "gguf" else "out")
    jaxtune.convert(str(adapted / "base"), out, to=to, adapter=str(adapted / "adapter"))
    source = resolve(str(out))
    words = source.tokenizer()
    assert words.chat_template == SETS
    assert words.eos_token == "<|im_end|>"
    assert source.stop_ids() == [257, 259]
    assert to == "gguf" or is_copy(out, adapted / "adapter")


def test_a_gguf_base_gets_it_too(adapted, tmp_path):
    base = tmp_path / "base.gguf"
    jaxtune.convert(str(adapted / "base"), base, to="gguf")
    for to in ("model.gguf", "hf"):
        jaxtune.convert(
            str(base), tmp_path / to, to=to.removeprefix("model."), adapter=str(adapted / "adapter")
        )
        assert resolve(str(tmp_path / to)).tokenizer().chat_template == SETS
    again = tmp_path / "again.gguf"
    jaxtune.convert(str(tmp_path / "model.gguf"), again, to="gguf")
    assert resolve(str(again)).stop_ids() == [257, 259]
    assert read_generation_config(tmp_path / "hf")["eos_token_id"] == [257, 259]


# A piece of sentencepiece's protocol buffer, and a line of tiktoken's format.
ALONE = {
    b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02": r"needs sentencepiece: pip install 'jaxtune",
    b"IQ== 0\nIg== 1\n": "is not a file of sentencepiece",
}


@pytest.mark.parametrize("content", ALONE, ids=["sentencepiece", "tiktoken"])
def test_a_tokenizer_model_alone_asks_for_what_it_needs(content, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxtune.weights.tokenizer_files.find_spec", lambda name: None)
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match=rf"tokenizer\.model {ALONE[content]}") as error:
        load_tokenizer(tmp_path)
    assert "tiktoken" not in str(error.value)


@pytest.mark.parametrize("text", ["[1]", "{", '{"model": {"type": 7}}', '{"added_tokens": 3}'])
def test_a_damaged_tokenizer_is_one_line(text, tmp_path):
    words_with(tools.CHATML, tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="the tokenizer cannot be loaded") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wrong",
    [{"eos_token": 3}, {"chat_template": 7}, {"chat_template": [{"name": "a"}]}, {"bos_token": []},
     {"added_tokens_decoder": [1]}, {"tokenizer_class": {"a": 1}}, {"extra_special_tokens": 5}],
)  # fmt: skip
def test_a_wrong_type_in_tokenizer_config_names_file_and_key(wrong, tmp_path):
    words_with(tools.CHATML, tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    tools.write_json_file(path, tools.json_file(path) | wrong)
    with pytest.raises(UserError, match=rf"tokenizer_config\.json: {next(iter(wrong))} ") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
