"""What is exported means the same to transformers 4 and 5."""

import json

import numpy as np
import pytest

import jaxtune
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.dialects import in_both_dialects
from jaxtune.weights.formats.format import ModelContents
from jaxtune.weights.formats.registry import get_model_format
from jaxtune.weights.source import resolve
from tests.support import families, tools, transformers4

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = np.random.default_rng(0).integers(0, 256, (2, 40))
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "beta_fast": 16.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 700.0, "short_factor": [1.0, 1.1, 1.3, 1.4],
    "long_factor": [1.5, 3.0, 7.0, 9.0], "original_max_position_embeddings": 20,
}  # fmt: skip
MODELS = {name: (name, {}) for name in families.FAMILIES} | {
    "yarn": ("llama", {"rope_parameters": YARN}),
    "longrope": ("llama", {"rope_parameters": LONG}),
    "linear": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 300.0, "factor": 3.0}},
    ),
    "dynamic": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 3.0}},
    ),
}


def raw_of(name):
    family, changes = MODELS[name]
    return json.loads(families.config(family, **changes).to_json_string())


@pytest.mark.parametrize("name", MODELS)
def test_the_keys_of_4_stand_beside_those_of_5(name):
    """As the old dialect has them, which earlier tests feed to transformers."""
    raw, old = raw_of(name), raw_of(name)
    families.old_dialect(old)
    both = in_both_dialects(raw, "float32")
    rope = {key: both.get(key) for key in ("rope_theta", "rope_local_base_freq")}
    assert rope == {key: old.get(key) for key in rope}
    assert from_hf(both, name) == from_hf(raw, name)
    without = {key: value for key, value in both.items() if key != "rope_parameters"}
    assert from_hf(without, name) == from_hf(raw, name)


@pytest.mark.slow
def test_transformers_4_computes_the_same(tmp_path):
    expected, directories = [], []
    for name, (family, changes) in MODELS.items():
        reference = families.save(tmp_path / "bases" / name, families.config(family, **changes))
        source = resolve(str(tmp_path / "bases" / name))
        directories.append(tmp_path / name)
        directories[-1].mkdir()
        get_model_format("hf").write(
            directories[-1],
            ModelContents(source, source.config_json(), source.tensors(), None, None),
        )
        expected.append(tools.torch_logits(reference, IDS))
    logits, _ = transformers4.read(directories, IDS, tmp_path / "logits.npz")
    for name, ours, theirs in zip(MODELS, logits, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_transformers_4_reads_what_was_gguf_and_metas(tmp_path):
    config = tools.tiny_config(
        hidden_size=64,
        intermediate_size=96,
        rope_parameters={"rope_type": "default", "rope_theta": 700.0},
    )
    words = tools.byte_tokenizer(merges=[("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o")])
    words.add_special_tokens({"extra_special_tokens": ["<|x|>"]})
    words.chat_template = {"default": words.chat_template, "tool_use": "{{ messages }}"}
    base = tools.save_model(tmp_path / "base", config, words)
    expected = tools.torch_logits(tools.random_model(config), IDS)
    exports = [jaxtune.convert(str(base), tmp_path / "hf")]
    for to, name in (("gguf", "model.gguf"), ("meta", "meta")):
        jaxtune.convert(str(base), tmp_path / name, to=to)
        exports.append(jaxtune.convert(str(tmp_path / name), tmp_path / f"from-{to}"))
    text = "hello <|x|>"
    logits, tokens = transformers4.read(
        exports, IDS, tmp_path / "logits.npz", tokenizers=exports, text=text
    )
    for ours in logits:
        np.testing.assert_allclose(ours, expected, atol=1e-4)
    for read in tokens:
        assert read["ids"] == words(text)["input_ids"]
    assert tokens[0]["templates"] == words.chat_template
    assert tokens[0]["special"] == ["<|x|>"]
