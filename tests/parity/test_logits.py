"""Logits of tiny random models against transformers, float32, 1e-4."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools
from tests.support.cases import thinned

pytestmark = pytest.mark.gpu

ROPES = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn_mscale": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "mscale": 0.8,
        "mscale_all_dim": 0.5,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "truncate": False,
    },
}
SHAPES = {
    "grouped": {},
    "multi_query": {"num_key_value_heads": 1},
    "multi_head": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 24},
    "attention_bias": {"attention_bias": True},
    "mlp_bias": {"mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "eps": {"rms_norm_eps": 0.05},
    "one_layer": {"num_hidden_layers": 1},
}


def load(directory, mesh):
    return load_model(resolve(str(directory)), mesh)


def assert_equals_transformers(directory, reference, mesh, length=48):
    ids = np.random.default_rng(0).integers(0, 256, (2, length))
    ours = np.asarray(load(directory, mesh)(ids))
    np.testing.assert_allclose(ours, tools.torch_logits(reference, ids), atol=1e-4, rtol=0)
    return ours


@pytest.mark.parametrize("dialect", ["new", "old"])
@pytest.mark.parametrize("kind", ROPES)
def test_rope_kinds_in_both_dialects(kind, dialect, tmp_path, one_device):
    changes = {"max_position_embeddings": 32} if kind in ("dynamic", "yarn") else {}
    config = tools.tiny_config(rope_parameters=dict(ROPES[kind]), **changes)
    tools.save_model(tmp_path, config)
    if dialect == "old":
        tools.rewrite_config(tmp_path, tools.old_dialect)
    assert_equals_transformers(tmp_path, tools.random_model(config), one_device)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, tmp_path, one_device):
    config = tools.tiny_config(**SHAPES[shape])
    tools.save_model(tmp_path, config)
    assert_equals_transformers(tmp_path, tools.random_model(config), one_device)


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_number_is_read(kind, tmp_path, one_device):
    """Changing any one number of the RoPE changes the logits, and exactly as in transformers."""
    context = {"max_position_embeddings": 32} if kind in ("dynamic", "yarn", "yarn_mscale") else {}
    base = ROPES[kind]
    before = None
    for change in [
        None,
        *(
            key
            for key, value in base.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        ),
    ]:
        rope = (
            dict(base) if change is None else base | {change: type(base[change])(base[change] * 2)}
        )
        config = tools.tiny_config(
            rope_parameters=rope, head_dim=64, **context
        )  # many frequencies, so that each number shows
        directory = tmp_path / str(change)
        tools.save_model(directory, config)
        logits = assert_equals_transformers(directory, tools.random_model(config), one_device)
        assert before is None or np.abs(logits - before).max() > 1e-4, f"{change} has no effect"
        before = logits if before is None else before


def test_phases_are_float32_in_bfloat16_models():
    from jaxtune.models.config import RopeConfig
    from jaxtune.models.rope import apply_rope, rope_cos_sin

    positions = jnp.asarray([[0, 1, 4095, 8191]], jnp.int32)
    rope = rope_cos_sin(RopeConfig(theta=10000.0), 64, 8192, positions, positions)
    assert rope.cos.dtype == rope.sin.dtype == jnp.float32
    exact = np.cos(
        np.asarray(positions, np.float64)[..., None] * 10000.0 ** (-np.arange(0, 64, 2) / 64)
    )
    np.testing.assert_allclose(rope.cos, exact, atol=2e-3)
    assert apply_rope(jnp.ones((1, 4, 2, 64), jnp.bfloat16), rope).dtype == jnp.bfloat16


def test_packed_row_equals_each_segment_alone(tmp_path, one_device):
    config = tools.tiny_config()
    tools.save_model(tmp_path, config)
    random = np.random.default_rng(1)
    parts = [random.integers(0, 256, size) for size in (7, 12, 5)]
    ids = np.concatenate([*parts, [0, 0]])[None]
    segments = np.concatenate(
        [np.full(len(part), number + 1) for number, part in enumerate(parts)] + [[0, 0]]
    )[None]
    positions = np.concatenate([np.arange(len(part)) for part in parts] + [[0, 0]])[None].astype(
        np.int32
    )
    packed = np.asarray(
        load(tmp_path, one_device)(ids, segment_ids=segments.astype(np.int32), positions=positions)
    )[0]
    reference = tools.random_model(config)
    start = 0
    for part in parts:
        np.testing.assert_allclose(
            packed[start : start + len(part)],
            tools.torch_logits(reference, part[None])[0],
            atol=1e-4,
        )
        start += len(part)


def test_cache_equals_no_cache(tmp_path, one_device):
    from jaxtune.models.kv_cache import make_kv_cache

    tools.save_model(tmp_path, tools.tiny_config())
    model = load(tmp_path, one_device)
    ids = np.random.default_rng(2).integers(0, 256, (2, 10))
    whole = np.asarray(model(ids))
    cache = make_kv_cache(model.config, 2, 12, np.dtype("float32"))
    first, cache = model(ids[:, :6], cache=cache)
    second, cache = model(
        ids[:, 6:],
        cache=cache,
        positions=jnp.broadcast_to(jnp.arange(6, 10, dtype=jnp.int32), (2, 4)),
    )
    np.testing.assert_allclose(np.concatenate([first, second], axis=1), whole, atol=1e-5)


def test_bfloat16_weights_keep_their_dtype(tmp_path, one_device):
    config = tools.tiny_config()
    tools.save_model(tmp_path, config, dtype=torch.bfloat16)
    model = load(tmp_path, one_device)
    assert model.model.layers[0].mlp.up_proj.weight[...].dtype == jnp.bfloat16
    assert_equals_transformers(
        tmp_path, LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), one_device
    )


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "mesh_shape", thinned([(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)], (2, 2, 2))
)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"vocab_size": 289, "intermediate_size": 50, "hidden_size": 36}],
    ids=["even", "odd"],
)
def test_logits_do_not_depend_on_the_mesh(sizes, mesh_shape, tmp_path):
    """Also where sizes do not divide over it."""
    from jaxtune.core.mesh import make_mesh

    config = tools.tiny_config(**sizes, head_dim=8)
    tools.save_model(tmp_path, config)
    assert_equals_transformers(tmp_path, tools.random_model(config), make_mesh(*mesh_shape))
