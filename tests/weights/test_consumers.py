"""Exported adapters as their readers read them: PEFT by itself, vLLM and llama.cpp by their rules,
written out here. Where the export says that a program accepts it, that computes what was trained.
"""

import json

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from jaxtune.adapters.dora import DoRAConfig
from jaxtune.adapters.ia3 import IA3Config
from jaxtune.adapters.inject import adapted, inject, partition_trainable
from jaxtune.adapters.lora import LoRAConfig, LoRALinear
from jaxtune.adapters.pissa import PiSSAConfig
from jaxtune.weights.consumers import consumers
from jaxtune.weights.export import export_adapter
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.verify import pad_texts
from tests.support import tools
from tests.support.cases import thinned
from tests.support.steps import tensors_of

pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

IDS = np.random.default_rng(0).integers(0, 288, (2, 12))
TEXTS = pad_texts(IDS.tolist())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tools.save_model(tmp_path_factory.mktemp("base"), tools.tiny_config(attention_bias=True))


def trained(base, config, mesh):
    """The base with an adapter that has moved in all its leaves."""
    model = load_model(resolve(str(base)), mesh)
    inject(model, config, 0, mesh)
    _, trainable, _ = partition_trainable(model)
    for number, leaf in enumerate(
        jax.tree.leaves(trainable, is_leaf=lambda x: hasattr(x, "get_value"))
    ):
        value = leaf.get_value()
        leaf.set_value(value + 0.1 * jax.random.normal(jax.random.key(number), value.shape))
    for layer in adapted(model).values():
        if isinstance(layer, LoRALinear):  # training leaves the padding of a stack zero
            for leaf, axis in ((layer.lora_A, -2), (layer.lora_B, -1)):
                inside = layer.spec.within(leaf.shape, axis)
                leaf.set_value(leaf[...] * inside.astype(leaf.dtype))
    return model


def written(base, model, directory, mesh, *, exact):
    comparison = export_adapter(
        directory, model, resolve(str(base)), None, TEXTS, mesh,
        dtype="auto", compute="auto", exact=exact,
    )  # fmt: skip
    assert comparison.torch_note is None
    return json.loads((directory / "adapter_config.json").read_text())


def vllm_scale(raw, b):
    """vllm/lora/peft_helper.py: one r and one alpha; buffers of that rank."""
    assert b.shape[-1] <= raw["r"] or raw["rank_pattern"]
    return raw["lora_alpha"] / (raw["r"] ** 0.5 if raw["use_rslora"] else raw["r"])


def llama_cpp_scale(raw, b):
    """convert_lora_to_gguf.py and llama-adapter.h: one alpha, over the rank of each tensor."""
    return raw["lora_alpha"] / b.shape[-1]


def logits_by(rule, directory, base_config):
    """The logits of base and adapter where each update is scaled by a reader's rule."""
    raw, tensors = (
        json.loads((directory / "adapter_config.json").read_text()),
        load_file(directory / "adapter_model.safetensors"),
    )
    model = tools.random_model(base_config)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for name, b in tensors.items():
            plain = name.removeprefix("base_model.model.")
            if plain.endswith(".lora_B.weight"):
                module = plain.removesuffix(".lora_B.weight")
                update = b @ tensors[name.replace("lora_B", "lora_A")]
            elif plain.endswith(".lora_embedding_B"):
                module = plain.removesuffix(".lora_embedding_B")
                update = (b @ tensors[name.replace("embedding_B", "embedding_A")]).T
            else:
                continue
            weights[f"{module}.weight"] += rule(raw, b) * torch.from_numpy(update)
    return tools.torch_logits(model, IDS)


CASES = {
    "plain": LoRAConfig(rank=4, alpha=8.0),
    "ranks": LoRAConfig(rank=4, alpha=8.0, ranks=(("q_proj", 2), ("layers.1.mlp.up_proj", 7))),
    "alphas": LoRAConfig(rank=4, alpha=8.0, alphas=(("v_proj", 2.0), ("down_proj", 12.0))),
    "rslora": LoRAConfig(rank=4, alpha=8.0, rslora=True),
    "all": LoRAConfig(
        rank=4, alpha=3.0, rslora=True, ranks=(("k_proj", 6),), alphas=(("k_proj", 5.0),)
    ),
    "embedding and head": LoRAConfig(
        rank=4, alpha=8.0, targets=("embed_tokens", "lm_head", "q_proj"),
        ranks=(("lm_head", 3), ("embed_tokens", 5)), alphas=(("embed_tokens", 9.0),),
    ),
    "some layers": LoRAConfig(
        rank=4, alpha=8.0, targets=("q_proj", "up_proj"), layers=(0, 2), ranks=(("up_proj", 6),)
    ),
    "patterns that say the same": LoRAConfig(
        rank=2, alpha=3.0, targets=("q_proj",), ranks=(("q_proj", 6),), alphas=(("q_proj", 9.0),)
    ),
    "pissa": PiSSAConfig(rank=4, alpha=8.0, rslora=True, ranks=(("q_proj", 2),)),
}  # fmt: skip
# What was trained is one rank and one scale already, and stays as it is.
UNCHANGED = {"plain": (4, 8.0), "patterns that say the same": (6, 9.0)}
RULES = {"vLLM": vllm_scale, "llama.cpp": llama_cpp_scale}


@pytest.mark.parametrize(
    "name", thinned(CASES, "all", "embedding and head", "patterns that say the same", "pissa")
)
def test_a_portable_adapter_computes_what_was_trained_in_every_reader(
    name, base, tmp_path, one_device
):
    config = tools.tiny_config(attention_bias=True)
    model = trained(base, CASES[name], one_device)
    expected = np.asarray(model(IDS))
    raw = written(base, model, tmp_path / "out", one_device, exact=False)
    assert (raw["use_rslora"], raw["rank_pattern"], raw["alpha_pattern"]) == (False, {}, {})
    rank, alpha = UNCHANGED.get(name, (raw["r"], raw["r"]))
    assert (raw["r"], raw["lora_alpha"]) == (rank, alpha)
    for reader, rule in RULES.items():  # PEFT itself has read it as the export was verified
        np.testing.assert_allclose(
            logits_by(rule, tmp_path / "out", config), expected, atol=1e-3, err_msg=reader
        )
    judged = consumers(open_adapter(tmp_path / "out"), tied=False)
    assert [consumer.accepted for consumer in judged] == [True, True, True]
    if name in UNCHANGED:
        again = load_model(resolve(str(base)), one_device)
        attach(again, open_adapter(tmp_path / "out"), one_device)
        for key, value in tensors_of(model).items():
            np.testing.assert_array_equal(tensors_of(again)[key], value)


@pytest.mark.parametrize(
    "name",
    thinned(["ranks", "alphas", "rslora", "all", "patterns that say the same"], "ranks", "alphas"),
)
def test_an_exact_adapter_is_as_trained_and_says_who_misreads_it(name, base, tmp_path, one_device):
    config = tools.tiny_config(attention_bias=True)
    model = trained(base, CASES[name], one_device)
    expected = np.asarray(model(IDS))
    raw = written(base, model, tmp_path / "out", one_device, exact=True)
    given = CASES[name]
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (
        given.rank, given.alpha, given.rslora
    )  # fmt: skip
    assert (raw["rank_pattern"], raw["alpha_pattern"]) == (dict(given.ranks), dict(given.alphas))
    judged = {each.name: each for each in consumers(open_adapter(tmp_path / "out"), tied=False)}
    assert judged.pop("PEFT").accepted
    for reader, consumer in judged.items():
        difference = np.abs(logits_by(RULES[reader], tmp_path / "out", config) - expected).max()
        ranks = dict(given.ranks).values()
        fits = reader == "llama.cpp" or max(ranks, default=0) <= given.rank
        assert consumer.accepted == bool(difference < 1e-3 and fits), reader
        assert consumer.accepted or "without --exact" in str(consumer)


REFUSED = {
    "dora": (DoRAConfig(rank=4, alpha=8.0, ranks=(("q_proj", 2),)), "it has no DoRA"),
    "ia3": (IA3Config(targets=("k_proj", "down_proj")), "it reads LoRA only"),
    "saved": (LoRAConfig(rank=4, alpha=8.0, saved=("norm",)), "whole modules (modules_to_save"),
    "bias": (LoRAConfig(rank=4, alpha=8.0, bias="all"), "it has no trained biases"),
    "tokens": (
        LoRAConfig(rank=4, alpha=8.0, tokens=(("embed_tokens", (5, 9)),)),
        "it has no rows of single tokens",
    ),
}


@pytest.mark.parametrize("name", thinned(REFUSED, "dora", "tokens"))
def test_what_servers_cannot_read_is_said(name, base, tmp_path, one_device):
    config, reason = REFUSED[name]
    model = trained(base, config, one_device)
    raw = written(base, model, tmp_path / "out", one_device, exact=False)
    peft, *servers = consumers(open_adapter(tmp_path / "out"), tied=False)
    assert peft.accepted
    assert [server.accepted for server in servers] == [False, False]
    assert all(reason in str(server) for server in servers)
    if name == "dora":  # stays as trained
        assert raw["rank_pattern"] == {"q_proj": 2}


class OfRank:
    """An adapter of one tensor, unread."""

    def __init__(self, rank, module="model.layers.0.self_attn.q_proj"):
        self.config = LoRAConfig(rank=rank, alpha=8.0, targets=("q_proj",))
        self.module, self.method, self.tensors = module, None, {}

    def layers(self):
        yield self


def test_vllm_is_told_the_rank_that_it_needs():
    said = {rank: str(consumers(OfRank(rank), tied=False)[1]) for rank in (1, 16, 17, 300, 513)}
    assert said[1] == said[16] == "vLLM accepts it"
    assert said[17] == "vLLM accepts it: with --max-lora-rank 32"
    assert said[300] == "vLLM accepts it: with --max-lora-rank 320"
    assert said[513] == "vLLM does not accept it: --max-lora-rank ends at 512"


def test_a_head_and_experts_are_said_to_depend():
    _, vllm, llama_cpp = consumers(OfRank(4, "lm_head"), tied=True)
    assert "only with models whose class in vLLM names them" in str(vllm)
    assert str(llama_cpp).endswith("it does not read a head that is tied to the embedding")
    _, vllm, _ = consumers(OfRank(4, "model.layers.0.mlp.experts.1.up_proj"), tied=False)
    assert "experts only with models" in str(vllm)
