"""The model of a benchmark, on our side and on the peers': what BENCH_MODEL names. By default that
is SmolLM2-135M (packaged); else a directory, or a published shape (`meta-llama/Llama-3.1-8B`, the
others that `jaxtune plan` knows, `tiny`) with random weights, made where they are used.
"""

import collections
import os
from functools import partial
from pathlib import Path

RANK, ALPHA = 16, 32.0
TINY = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512,
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SPREAD = 0.02  # of random weights; on zeros a GPU is faster than on numbers


def shape():
    """The `config.json` of the model whose weights are random; None where they are not."""
    from jaxtune.weights.known_configs import KNOWN_CONFIGS

    return (KNOWN_CONFIGS | {"tiny": TINY}).get(os.environ.get("BENCH_MODEL", ""))


def path():
    from jaxtune.weights.bundled import smollm2

    return Path(os.environ.get("BENCH_MODEL") or smollm2())


def source():
    from jaxtune.weights.abstract import AbstractSource
    from jaxtune.weights.source import resolve

    raw = shape()
    if raw is None:
        return resolve(str(path()))
    return AbstractSource(os.environ["BENCH_MODEL"], Path("config.json"), raw)


def products():
    """`{(out, in): how many}` of the frozen matrices that every token is multiplied by: all but
    the table of embeddings, which is there where it is the head as well.
    """
    tensors, tied = source().tensors(), source().config_json().get("tie_word_embeddings", False)
    return collections.Counter(
        tensor.shape
        for name, tensor in tensors.items()
        if len(tensor.shape) == 2 and ("embed_tokens" not in name or tied)
    )


def with_random_leaves(model, seed=0):
    """Our model of shapes as one of arrays, made leaf by leaf on the devices they belong to."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    @partial(jax.jit, static_argnums=(1, 2, 3))  # one program for all leaves of a shape
    def numbers(key, shape, dtype, norm):
        if not jnp.issubdtype(dtype, jnp.floating):  # codes of a quantized matrix
            return jax.random.bits(key, shape, jnp.uint8).astype(dtype)
        wide = SPREAD * jax.random.normal(key, shape, jnp.float32)
        return (1 + wide if norm else wide).astype(dtype)

    def leaf_of(number, path, leaf):
        key = jax.random.fold_in(jax.random.key(seed, impl="rbg"), number)
        norm = "norm" in jax.tree_util.keystr(path)
        return jax.device_put(numbers(key, leaf.shape, leaf.dtype, norm), leaf.sharding)

    graph, state = nnx.split(model)
    leaves, tree = jax.tree_util.tree_flatten_with_path(state)
    return nnx.merge(
        graph, tree.unflatten(leaf_of(number, *leaf) for number, leaf in enumerate(leaves))
    )


def trained(config, mesh):
    """Our model as training begins."""
    from jaxtune.training.methods import trained_model

    if shape() is None:
        return trained_model(config, source(), None, mesh)
    return with_random_leaves(trained_model(config, source(), None, mesh, shapes=True))


def loaded(mesh, compute):
    """Our model as it generates."""
    from jaxtune.weights.load import load_model

    if shape() is None:
        return load_model(source(), mesh, compute=compute)
    return with_random_leaves(load_model(source(), mesh, compute=compute, shapes=True))


def transformers_model(dtype, **options):
    """The peers' model and its device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    device, kind = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype)
    if (raw := shape()) is not None:
        with torch.device(device):
            config = AutoConfig.for_model(**raw)
            model = AutoModelForCausalLM.from_config(config, dtype=kind, **options)
        return model, device
    place = path()
    if place.is_file():
        place, options = place.parent, options | {"gguf_file": place.name}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=kind, **options)
    return model.to(device), device
