"""Every family against transformers, float32: logits 2e-4, loss 1e-5, gradients 1e-3, and greedy
generation token for token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from jaxtune.data.batch import Batch
from jaxtune.inference.engine import Engine
from jaxtune.models.names import names_of
from jaxtune.objectives.objective import DETERMINISTIC
from jaxtune.objectives.sft import sft
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import families, tools
from tests.support.cases import thinned

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]


# Each stands for others: a tied head and biases; windows by a pattern and two RoPEs; parts of
# heads and long factors; multipliers; experts in some layers.
KEPT = ["qwen2", "gemma3", "phi3_long", "granite", "qwen3_moe_mixed"]
with_family = pytest.mark.parametrize("family", families.FAMILIES, indirect=True)
with_few_families = pytest.mark.parametrize(
    "family", thinned(families.FAMILIES, *KEPT), indirect=True
)


@pytest.fixture(scope="module")
def family(request, tmp_path_factory, one_device):
    """`(directory, transformers' model, ours)` of one family."""
    directory = tmp_path_factory.mktemp(request.param)
    reference = families.save(directory, families.config(request.param))
    return directory, reference, load_model(resolve(str(directory)), one_device)


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.int32)


@with_family
def test_logits_in_both_dialects(family, one_device):
    directory, reference, model = family
    ids = tokens(2, 32)
    expected = tools.torch_logits(reference, ids)
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(model(ids), expected, atol=2e-4, rtol=0)
    tools.rewrite_config(directory, families.old_dialect)
    np.testing.assert_allclose(
        load_model(resolve(str(directory)), one_device)(ids), expected, atol=2e-4, rtol=0
    )


@with_few_families
def test_packed_rows_and_padded_rows_equal_each_text_alone(family):
    _, reference, model = family
    texts = [tokens(size, seed=size) for size in (17, 24, 9)]
    alone = [tools.torch_logits(reference, text[None])[0] for text in texts]
    segments = np.concatenate(
        [np.full(len(text), number + 1) for number, text in enumerate(texts)] + [[0, 0]]
    )
    positions = np.concatenate([np.arange(len(text)) for text in texts] + [[0, 0]])
    ids = np.concatenate([*texts, [0, 0]])
    packed = model(
        ids[None],
        segment_ids=segments[None].astype(np.int32),
        positions=positions[None].astype(np.int32),
    )[0]
    np.testing.assert_allclose(packed[:50], np.concatenate(alone), atol=2e-4, rtol=0)
    padded, real = np.zeros((3, 24), np.int32), np.zeros((3, 24), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)], real[row, : len(text)] = text, 1
    found = np.asarray(model(padded, segment_ids=real))[real > 0]
    np.testing.assert_allclose(found, np.concatenate(alone), atol=2e-4, rtol=0)


@with_few_families
def test_loss_and_every_gradient(family):
    _, reference, model = family
    ids = tokens(2, 25)
    mask = np.random.default_rng(1).random((2, 24)) < 0.7
    reference.zero_grad()
    logits = reference(torch.as_tensor(ids[:, :-1]).long()).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.as_tensor(ids[:, 1:]).long().flatten(), reduction="none"
    )
    total = losses[torch.as_tensor(mask.flatten())].sum()
    total.backward()
    expected = {name: value.grad.numpy() for name, value in families.on_disk(reference).items()}

    graph, state = nnx.split(model)
    ones = np.ones((2, 24), np.int32)
    batch = Batch(
        ids[:, :-1],
        ids[:, 1:],
        mask.astype(np.float32),
        ones,
        np.cumsum(ones, 1, dtype=np.int32) - 1,
    )
    loss, grads = jax.jit(
        jax.value_and_grad(
            lambda part: sft(nnx.merge(graph, part), batch, DETERMINISTIC._replace(remat="dots"))[0]
        )
    )(state)
    np.testing.assert_allclose(loss, float(total.detach()), rtol=1e-5)
    found = {}
    for path, leaf in nnx.to_flat_state(grads):
        stack, names = names_of(path, model.config)
        value = np.asarray(leaf.get_value())
        found |= dict(zip(names, value.reshape(-1, *value.shape[len(stack) :]), strict=True))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= 1e-3 * np.linalg.norm(value), name


@with_few_families
def test_greedy_with_cache_equals_transformers_without(family):
    """Ragged prompts in one batch, each as if it were alone; the texts grow over windows and
    over longrope's limit.
    """
    _, reference, model = family
    prompts = [tokens(size, seed=size).tolist() for size in (3, 14, 8)]
    found = Engine(model, [], batch=3).generate(prompts, 16)
    for prompt, answer in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(16):
            text.append(int(tools.torch_logits(reference, [text])[0, -1].argmax()))
        assert answer == text[len(prompt) :]


@pytest.mark.devices(8)
def test_experts_are_sharded_and_compute_the_same(tmp_path):
    from jaxtune.core.mesh import make_mesh

    reference = families.save(tmp_path, families.config("qwen3_moe"))
    ids = tokens(4, 16)
    with jax.set_mesh(make_mesh(2, 1, 4)):
        model = load_model(resolve(str(tmp_path)), make_mesh(2, 1, 4))
        weight = model.model.layers[0].mlp.experts.up_proj.weight[...]
        assert weight.sharding.shard_shape(weight.shape)[1] == 1
        graph, state = nnx.split(model)
        found = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids))(state, jnp.asarray(ids))
    np.testing.assert_allclose(found, tools.torch_logits(reference, ids), atol=2e-4, rtol=0)
