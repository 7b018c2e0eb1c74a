"""Hugging Face directories: shards, mixed dtypes, strictness, tied heads, stop tokens."""

import contextlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.weights.load import load_model
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.source import resolve
from tests.support import tools

INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path):
    tools.save_model(tmp_path / "sharded", tools.tiny_config(), max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    return tmp_path / "sharded"


def test_shards_with_an_index(sharded, one_device):
    ids = np.random.default_rng(0).integers(0, 288, (2, 9))
    ours = np.asarray(load_model(resolve(str(sharded)), one_device)(ids))
    np.testing.assert_allclose(
        ours, tools.torch_logits(tools.random_model(tools.tiny_config()), ids), atol=1e-4
    )


def test_mixed_dtypes_in_one_file_lose_nothing(chat_model, tmp_path, one_device):
    directory = shutil.copytree(chat_model, tmp_path / "mixed")
    tensors = load_file(directory / "model.safetensors")
    kinds = {
        "layers.0.mlp": torch.bfloat16,
        "layers.1.mlp": torch.float16,
        "self_attn": torch.bfloat16,
    }
    for name in tensors:
        for part, kind in kinds.items():
            tensors[name] = tensors[name].to(kind) if part in name else tensors[name]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = load_model(resolve(str(directory)), one_device)
    up = model.model.layers[0].mlp.up_proj.weight[...]
    assert up.dtype == jnp.float32  # bfloat16 and float16 and float32 layers of one stack
    for layer in range(3):
        np.testing.assert_array_equal(
            up[layer], tensors[f"model.layers.{layer}.mlp.up_proj.weight"].float().numpy()
        )
    assert model.model.layers[0].self_attn.q_proj.weight[...].dtype == jnp.bfloat16


def test_weights_arrive_bit_for_bit_on_a_mesh(chat_model):
    tensors = load_file(chat_model / "model.safetensors")
    model = load_model(resolve(str(chat_model)), make_mesh(1, 4, 2))
    gate = model.model.layers[0].mlp.gate_proj.weight[...]
    assert gate.sharding.shard_shape(gate.shape) == (3, 24, 8)
    for layer in range(3):
        np.testing.assert_array_equal(
            gate[layer], tensors[f"model.layers.{layer}.mlp.gate_proj.weight"].numpy()
        )


def header_of(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return data[8 : 8 + size], data[8 + size :]


def test_a_key_that_stands_twice_is_refused(chat_model, tmp_path):
    text, values = header_of(chat_model / "model.safetensors")
    name = b'"model.norm.weight":'
    entry = text[text.index(name) : text.index(b"}", text.index(name)) + 1]
    twice = text.replace(entry, entry + b"," + entry)
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + values)
    with pytest.raises(UserError, match=r"header has model\.norm\.weight twice"):
        open_file(path)


def test_a_file_with_any_byte_of_its_header_changed_or_cut_anywhere_is_one_clear_error_or_read(
    chat_model, tmp_path
):
    whole, random = (chat_model / "model.safetensors").read_bytes(), np.random.default_rng(0)
    header, path = (
        len(header_of(chat_model / "model.safetensors")[0]) + 8,
        tmp_path / "model.safetensors",
    )
    for place in random.integers(0, header, 100):
        changed = bytearray(whole)
        changed[place] ^= 1 << random.integers(0, 8)
        path.write_bytes(changed)
        with contextlib.suppress(UserError):
            {name: tensor.all() for name, tensor in open_file(path).items()}
    for size in (0, 4, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            open_file(path)


INDEXES = {
    "a shard is missing": (lambda d, i: next(d.glob("model-00002*")).unlink(), "does not exist"),
    "a path climbs out": (
        lambda d, i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"}),
        "not a plain file name",
    ),
    "a name too many": (
        lambda d, i: i["weight_map"].update({"ghost.weight": next(iter(i["weight_map"].values()))}),
        "do not hold: ghost.weight",
    ),
    "a name too few": (
        lambda d, i: i["weight_map"].pop("model.layers.0.input_layernorm.weight"),
        "does not name: model.layers.0.input",
    ),
    "no map": (lambda d, i: i.pop("weight_map"), "no weight_map"),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_wrong_index_is_one_clear_error(name, sharded):
    change, expected = INDEXES[name]
    index = json.loads((sharded / INDEX).read_text())
    change(sharded, index)
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=expected):
        resolve(str(sharded)).tensors()


def test_a_tied_head_is_one_array_and_a_differing_one_is_refused(tmp_path, one_device):
    tools.save_model(tmp_path / "tied", tools.tiny_config(tie_word_embeddings=True))
    model = load_model(resolve(str(tmp_path / "tied")), one_device)
    assert model.lm_head is None
    assert model.head(jnp.zeros((1, 32)))[1] is model.model.embed_tokens.weight[...]
    path = tmp_path / "tied" / "model.safetensors"
    tensors = load_file(path)
    same = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(same, path, metadata={"format": "pt"})
    load_model(resolve(str(tmp_path / "tied")), one_device)
    save_file(
        same | {"lm_head.weight": same["lm_head.weight"] + 1}, path, metadata={"format": "pt"}
    )
    with pytest.raises(UserError, match="ties the head"):
        load_model(resolve(str(tmp_path / "tied")), one_device)


def test_a_tied_head_gets_both_gradients(tmp_path, one_device):
    """Through the embedding and through the head, equal to PyTorch's sum of both."""
    import jax
    from flax import nnx

    from jaxtune.data.batch import Batch
    from jaxtune.objectives.sft import sft

    config = tools.tiny_config(tie_word_embeddings=True)
    tools.save_model(tmp_path, config)
    reference = tools.random_model(config)
    ids = np.random.default_rng(0).integers(0, 288, (2, 12)).astype(np.int32)
    logits = reference(torch.as_tensor(ids[:, :-1]).long()).logits
    torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.as_tensor(ids[:, 1:]).flatten().long(), reduction="sum"
    ).backward()
    graph, state = nnx.split(load_model(resolve(str(tmp_path)), one_device))
    ones = np.ones((2, 11), np.int32)
    batch = Batch(
        ids[:, :-1],
        ids[:, 1:],
        ones.astype(np.float32),
        ones,
        np.cumsum(ones, 1, dtype=np.int32) - 1,
    )
    grads = jax.grad(lambda state: sft(nnx.merge(graph, state), batch)[0])(state)
    for name, parameter in (
        ("embed_tokens", reference.model.embed_tokens),
        ("norm", reference.model.norm),
    ):
        ours, theirs = (
            np.asarray(grads["model"][name]["weight"].get_value()),
            parameter.weight.grad.numpy(),
        )
        assert np.linalg.norm(ours - theirs) < 1e-4 * np.linalg.norm(theirs)


def test_every_stop_token_is_read(chat_model, tmp_path):
    directory = shutil.copytree(chat_model, tmp_path / "model")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))
    assert resolve(str(directory)).stop_ids() == [257, 259]
    (directory / "generation_config.json").unlink()
    assert resolve(str(directory)).stop_ids() == [257]
