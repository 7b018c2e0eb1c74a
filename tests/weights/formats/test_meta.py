"""Meta's format: there and back identical, and computing by Meta's own arithmetic what it did."""

import json

import numpy as np
import pytest
import torch

from jaxtune import convert
from jaxtune.core.errors import UserError
from jaxtune.weights.source import resolve
from tests.support import tools
from tests.support.directories import IDS, assert_identical, json_or_text, logits

pytestmark = pytest.mark.usefixtures("quick_compilation")

META = {
    "llama2": {"rms_norm_eps": 1e-5},
    "llama3": {
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "tied": {"tie_word_embeddings": True},
    "multi_head": {"num_key_value_heads": 4, "intermediate_size": 88},
}


@pytest.mark.parametrize("name", META)
def test_meta_there_and_back_is_identical_and_computes_the_same(name, tmp_path, one_device):
    tools.save_model(tmp_path / "a", tools.tiny_config(**META[name]), tools.byte_tokenizer())
    convert(str(tmp_path / "a"), tmp_path / "m", to="meta")
    assert (tmp_path / "m" / "consolidated.00.pth").exists()
    np.testing.assert_array_equal(
        logits(tmp_path / "m", one_device), logits(tmp_path / "a", one_device)
    )
    convert(str(tmp_path / "m"), tmp_path / "b", to="hf")
    assert_identical(tmp_path / "a", tmp_path / "b")
    convert(str(tmp_path / "b"), tmp_path / "again", to="meta")
    one, other = (
        torch.load(tmp_path / place / "consolidated.00.pth", weights_only=True)
        for place in ("m", "again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert json_or_text(tmp_path / "m" / "params.json") == json_or_text(
        tmp_path / "again" / "params.json"
    )


def metas_attention(state, params, ids):
    """Meta's own forward pass, written from its paper and code: interleaved pairs as complex
    numbers.
    """
    heads, kv = params["n_heads"], params["n_kv_heads"]
    size = params["dim"] // heads
    x = state["tok_embeddings.weight"][torch.as_tensor(ids)]
    angles = torch.outer(
        torch.arange(ids.shape[1]).float(),
        params["rope_theta"] ** (-torch.arange(0, size, 2).float() / size),
    )
    turn = torch.polar(torch.ones_like(angles), angles)[None, :, None]

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]) * state[name]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)

    for layer in range(params["n_layers"]):
        part = f"layers.{layer}"
        h = norm(x, f"{part}.attention_norm.weight")
        q, k, v = (
            torch.nn.functional.linear(h, state[f"{part}.attention.w{kind}.weight"]).unflatten(
                -1, (-1, size)
            )
            for kind in "qkv"
        )
        q, k = rotate(q), rotate(k)
        k, v = (value.repeat_interleave(heads // kv, dim=2) for value in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            *(value.transpose(1, 2) for value in (q, k, v)), is_causal=True
        )
        x = x + torch.nn.functional.linear(
            out.transpose(1, 2).flatten(2), state[f"{part}.attention.wo.weight"]
        )
        h = norm(x, f"{part}.ffn_norm.weight")
        gate, up = (
            torch.nn.functional.linear(h, state[f"{part}.feed_forward.w{kind}.weight"])
            for kind in "13"
        )
        x = x + torch.nn.functional.linear(
            torch.nn.functional.silu(gate) * up, state[f"{part}.feed_forward.w2.weight"]
        )
    return torch.nn.functional.linear(norm(x, "norm.weight"), state["output.weight"])


def test_metas_own_arithmetic_on_our_file_gives_our_logits(tmp_path, one_device):
    tools.save_model(tmp_path / "a", tools.tiny_config(**META["llama2"]))
    convert(str(tmp_path / "a"), tmp_path / "m", to="meta")
    state = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    theirs = metas_attention(state, json.loads((tmp_path / "m" / "params.json").read_text()), IDS)
    np.testing.assert_allclose(logits(tmp_path / "a", one_device), theirs.numpy(), atol=1e-4)


@pytest.mark.parametrize("generation", ["by width", "by vocabulary"])
@pytest.mark.parametrize("ways", [2, 4])
def test_meta_files_of_any_model_parallel_count(ways, generation, tmp_path, one_device):
    tools.save_model(tmp_path / "a", tools.tiny_config(num_key_value_heads=4))
    convert(str(tmp_path / "a"), tmp_path / "m", to="meta")
    whole = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    (tmp_path / "m" / "consolidated.00.pth").unlink()
    for rank in range(ways):
        part = {}
        for name, value in whole.items():
            axis = (
                1
                if ".wo." in name or ".w2." in name or ("tok_" in name and generation == "by width")
                else 0
            )
            part[name] = value if value.dim() == 1 else value.chunk(ways, axis)[rank].clone()
        torch.save(
            part | {"rope.freqs": torch.ones(4)}, tmp_path / "m" / f"consolidated.{rank:02}.pth"
        )
    np.testing.assert_array_equal(
        logits(tmp_path / "m", one_device), logits(tmp_path / "a", one_device)
    )
    (tmp_path / "m" / f"consolidated.{ways - 1:02}.pth").rename(
        tmp_path / "m" / "consolidated.09.pth"
    )
    with pytest.raises(UserError, match="some are missing"):
        resolve(str(tmp_path / "m")).tensors()
