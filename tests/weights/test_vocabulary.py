"""New tokens: rows in embedding and head, from the first mean to the export."""

import json

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxtune
from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.progress import Reporter
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import write_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.vocabulary import add_tokens
from jaxtune.workflows.train import run
from tests.support import peft_side, tools
from tests.support.cases import thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")

NEW = ["<|think|>", "<|tool|>", "<|end_tool|>"]
KNOWN = 263  # tokens of the byte tokenizer
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def base(directory, vocab=KNOWN, **changes):
    return str(
        tools.save_model(
            directory, tools.tiny_config(vocab_size=vocab, **changes), tools.byte_tokenizer()
        )
    )


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_trained_ones(tied, tmp_path, one_device):
    source = add_tokens(
        resolve(base(tmp_path, tie_word_embeddings=tied)), [*NEW, "<|im_end|>", NEW[0]]
    )
    assert source.tokenizer().convert_tokens_to_ids(NEW) == [KNOWN, KNOWN + 1, KNOWN + 2]
    assert source.tokenizer()("a<|tool|>b")["input_ids"][1:-1] == [KNOWN + 1]
    assert source.tokenizer().decode([97 - 33, KNOWN], skip_special_tokens=True) == "a"
    assert source.config_json()["vocab_size"] == 266
    model = load_model(source, one_device)
    for name, leaf in ((EMBEDDING, model.model.embed_tokens), (HEAD, model.lm_head)):
        if leaf is not None:
            old = load_file(tmp_path / "model.safetensors")[name]
            expected = np.concatenate([old, np.broadcast_to(old.mean(0), (3, 32))])
            np.testing.assert_allclose(leaf.weight[...], expected, atol=1e-7)


def test_new_tokens_take_unused_rows_first(tmp_path, one_device):
    source = add_tokens(resolve(base(tmp_path, vocab=270)), NEW)
    old = load_file(tmp_path / "model.safetensors")[EMBEDDING]
    found = np.asarray(load_model(source, one_device).model.embed_tokens.weight[...])
    assert found.shape == (270, 32)
    np.testing.assert_allclose(
        found[KNOWN : KNOWN + 3], np.broadcast_to(old[:KNOWN].mean(0), (3, 32)), atol=1e-7
    )
    np.testing.assert_array_equal(
        np.delete(found, range(KNOWN, KNOWN + 3), 0), np.delete(old, range(KNOWN, KNOWN + 3), 0)
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_found_out(tmp_path):
    directory = base(tmp_path, vocab=259)
    assert add_tokens(resolve(directory), ["<|im_start|>"]).config_json()["vocab_size"] == 259
    assert add_tokens(resolve(directory), ["<|end_header_id|>"]).new_ids == (259, 260, 261)
    with pytest.raises(
        UserError, match=r"gives token 259, and the model has 259 tokens.*model\.new_tokens"
    ):
        trained(tmp_path, directory, "model.new_tokens=[]")
    rows = tools.write_rows(tmp_path / "rows.jsonl", tools.sums(4))
    with pytest.raises(UserError, match=r"gives token 259, and the model has 259"):
        jaxtune.generate(directory, ["1+1?"], max_new_tokens=2)
    with pytest.raises(UserError, match=r"gives token 259, and the model has 259"):
        jaxtune.evaluate(directory, rows, task="lm")


def rows_with_tokens(path):
    rows = tools.sums(24)
    for row in rows:
        row["messages"][1]["content"] = "<|think|>" + row["messages"][1]["content"] + "<|tool|>"
    return tools.write_rows(path, rows)


def trained(directory, model, *overrides):
    settings = [
        f"model.source={model}",
        f"model.new_tokens={json.dumps(NEW)}",
        f"data.train={rows_with_tokens(directory / 'rows.jsonl')}",
        "data.max_length=96",
        "adapter.rank=4",
        "train.batch_size=8",
        "train.steps=3",
        "optimizer.learning_rate=1e-2",
        f"run.dir={directory / 'run'}",
        *overrides,
    ]
    return run(load_config(overrides=settings), Reporter(), fresh=True)


def delta(path, module="model.embed_tokens"):
    return load_file(path / "adapter_model.safetensors")[
        f"base_model.model.{module}.token_adapter.trainable_tokens_delta"
    ]


@pytest.mark.filterwarnings("ignore:.*(tie_word_embeddings|save_embedding_layers):UserWarning")
@pytest.mark.parametrize(
    ("train", "tied"),
    thinned(
        [("none", True), ("new", False), ("new", True), ("all", True)], ("new", True), unpack=True
    ),
)
def test_new_tokens_from_training_to_every_export(train, tied, tmp_path, capsys, one_device):
    model = base(tmp_path / "base", tie_word_embeddings=tied)
    result = trained(
        tmp_path, model, f"adapter.train_tokens={train}", "mesh.data=-1", "mesh.fsdp=1"
    )
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "3 new tokens ('<|think|>', '<|tool|>', '<|end_tool|>'): their rows begin at the mean"
        in said
    )
    assert ("do NOT train" in said) == (train == "none")
    assert (
        result.verification.torch_difference is not None
    )  # PEFT read the adapter on the resized base
    keys = [
        key
        for key in load_file(result.adapter / "adapter_model.safetensors")
        if ".layers." not in key
    ]
    assert len(keys) == (2 if train == "all" or not tied else 1)
    if train != "all":
        head = (
            "lm_head" if not tied else "model.embed_tokens"
        )  # the input's row of a token that no text has gets no gradient
        mean = load_file(tmp_path / "base" / "model.safetensors")[f"{head}.weight"].mean(0)
        moved = np.abs(delta(result.adapter, head) - mean).max(axis=1) > 1e-4
        assert moved.tolist() == ([False] * 3 if train == "none" else [True] * 3)

    network, tokenizer = jaxtune.load(model, adapter=str(result.adapter))
    ids = np.asarray([[*tokenizer("7+<|think|>5<|tool|>")["input_ids"], KNOWN + 2]])
    assert ids.max() == KNOWN + 2
    ours = np.asarray(network(ids))
    assert ours.shape[-1] == KNOWN + 3
    resized = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    resized.resize_token_embeddings(KNOWN + 3)
    theirs = PeftModel.from_pretrained(resized, result.adapter).eval()
    np.testing.assert_allclose(ours, tools.torch_logits(theirs, ids), atol=2e-4)

    card = (result.adapter / "README.md").read_text()
    assert f"base.resize_token_embeddings({KNOWN + 3})" in card

    merged = jaxtune.export(result.dir, to="hf", out=tmp_path / "merged")
    assert "resize" not in (merged / "README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained(merged).eval()
    assert again.config.vocab_size == KNOWN + 3
    assert again.config.tie_word_embeddings == (tied and train != "all")
    assert AutoTokenizer.from_pretrained(merged)("<|tool|>")["input_ids"] == [KNOWN + 1]
    np.testing.assert_allclose(tools.torch_logits(again, ids), ours, atol=3e-4)
    via = jaxtune.convert(model, tmp_path / "converted", adapter=str(result.adapter))
    assert {k: v.tobytes() for k, v in load_file(via / "model.safetensors").items()} == {
        k: v.tobytes() for k, v in load_file(merged / "model.safetensors").items()
    }
    whole = jaxtune.export(result.dir, to="gguf", out=tmp_path / "merged.gguf")
    network, tokenizer = jaxtune.load(str(whole))
    assert tokenizer("<|tool|>")["input_ids"] == [KNOWN + 1]
    np.testing.assert_allclose(network(ids), ours, atol=3e-4)


@pytest.mark.parametrize("train", ["new", pytest.param("all", marks=pytest.mark.slow)])
def test_a_vocabulary_that_does_not_divide_is_padded_on_the_mesh_and_nowhere_else(train, tmp_path):
    """266 tokens over four devices: the tables are cut into parts of 67, and all that is
    computed and written is the same.
    """
    model, mesh = base(tmp_path / "base"), make_mesh(1, 2, 4)
    whole = trained(tmp_path, model, f"adapter.train_tokens={train}", "mesh.fsdp=8")
    cut = trained(
        tmp_path / "base", model, f"adapter.train_tokens={train}", "mesh.fsdp=2", "mesh.tensor=4"
    )
    first, second = (
        load_file(result.adapter / "adapter_model.safetensors") for result in (whole, cut)
    )
    assert first.keys() == second.keys()
    for key, value in first.items():
        np.testing.assert_allclose(second[key], value, atol=1e-4, err_msg=key)
    network, _ = jaxtune.load(model, adapter=str(cut.adapter), mesh=mesh)
    assert network.model.embed_tokens.weight[...].sharding.shard_shape((268, 32)) == (67, 16)
    ids = np.arange(40)[None] + 226
    one, _ = jaxtune.load(
        model, adapter=str(cut.adapter), mesh=make_mesh(devices=jax.devices()[:1])
    )
    np.testing.assert_allclose(network(ids), one(ids), atol=1e-4)
    assert network(ids).shape == (1, 40, KNOWN + 3)


@pytest.mark.filterwarnings("ignore:.*save_embedding_layers:UserWarning")
@pytest.mark.parametrize(
    ("targets", "dora"), [("lm_head", False), ("lm_head", True), ("embed_tokens", False)]
)
def test_adapters_on_a_padded_table_have_no_padding_in_their_files(targets, dora, tmp_path):
    model, mesh = base(tmp_path / "base"), make_mesh(1, 2, 4)
    reference = peft_side.lora(
        tools.random_model(tools.tiny_config(vocab_size=KNOWN)),
        b_std=0.1,
        target_modules=[targets],
        use_dora=dora,
    )
    reference.save_pretrained(tmp_path / "adapter")
    network, _ = jaxtune.load(model, adapter=str(tmp_path / "adapter"), mesh=mesh)
    ids = np.random.default_rng(0).integers(0, KNOWN, (2, 12))
    np.testing.assert_allclose(network(ids), tools.torch_logits(reference, ids), atol=2e-4)
    (tmp_path / "back").mkdir()
    write_adapter(tmp_path / "back", network, model)
    before, after = (
        load_file(tmp_path / place / "adapter_model.safetensors") for place in ("adapter", "back")
    )
    assert {key: value.tobytes() for key, value in before.items()} == {
        key: value.tobytes() for key, value in after.items()
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.new_tokens=[]", "adapter.train_tokens=new"], "no token is new"),
        (["adapter.targets=[embed_tokens]"], "another adapter on the same or a tied module"),
    ],
)
def test_what_cannot_be_is_refused(settings, message, tmp_path):
    with pytest.raises(UserError, match=message):
        trained(tmp_path, base(tmp_path / "base"), *settings)
