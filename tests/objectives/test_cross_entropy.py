"""The chunked loss against the plain one, values and every gradient, and its memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.objectives import cross_entropy
from jaxtune.objectives.cross_entropy import linear_cross_entropy

pytestmark = pytest.mark.gpu


def arrays(tokens, vocab=50, embed=16):
    random = np.random.default_rng(0)
    hidden, head = (
        random.normal(size=shape).astype(np.float32) for shape in ((tokens, embed), (vocab, embed))
    )
    weights = np.where(random.random(tokens) < 0.3, 0, random.random(tokens)).astype(np.float32)
    targets = random.integers(0, vocab, tokens).astype(np.int32)
    return tuple(map(jnp.asarray, (hidden[None], head, targets[None], weights[None])))


def plain(hidden, head, targets, weights):
    losses = -jnp.take_along_axis(jax.nn.log_softmax(hidden @ head.T), targets[..., None], -1)[
        ..., 0
    ]
    return jnp.sum(losses * weights)


@pytest.mark.parametrize("tokens", [1, 7, 8, 21])
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_values_and_gradients(tokens, wanted, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 8)
    parts = arrays(tokens)
    loss, grads = jax.value_and_grad(lambda *p: 3 * linear_cross_entropy(*p), wanted)(*parts)
    expected, expected_grads = jax.value_and_grad(lambda *p: 3 * plain(*p), wanted)(*parts)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for found, value in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(found, value, atol=1e-4)


def test_huge_logits_do_not_overflow():
    hidden, head, targets, weights = arrays(8)
    assert np.isfinite(linear_cross_entropy(hidden * 1e4, head, targets, weights))


def test_memory_is_a_chunk_of_logits_and_a_frozen_head_has_no_gradient():
    """At 4096 tokens the whole logits would be 64 MB; the temporaries stay at a few chunks of
    128.
    """
    hidden, head, targets, weights = (
        jax.ShapeDtypeStruct(p.shape, p.dtype) for p in arrays(4096, vocab=4096, embed=32)
    )
    program = (
        jax.jit(jax.grad(linear_cross_entropy)).lower(hidden, head, targets, weights).compile()
    )
    assert program.memory_analysis().temp_size_in_bytes < 4 * 128 * 4096 * 4 + 4 * 4096 * 32 * 4

    def products(wanted):
        return str(
            jax.make_jaxpr(jax.grad(linear_cross_entropy, wanted))(hidden, head, targets, weights)
        ).count("dot_general[")

    assert (products(0), products((0, 1))) == (
        2,
        3,
    )  # the logits, the gradient of the hidden states, that of the head


def test_turns_without_a_supervised_token_have_no_logits(monkeypatch):
    """Supervised tokens that are spread over a row are gathered into as few turns as they fill."""
    monkeypatch.setattr(cross_entropy, "CPU_CHUNK", 8)
    made = []
    real = cross_entropy.compute_logits

    def counted(hidden, *rest):
        jax.debug.callback(lambda: made.append(1), ordered=True)
        return real(hidden, *rest)

    monkeypatch.setattr(cross_entropy, "compute_logits", counted)
    hidden, head, targets, weights = arrays(64)
    for supervised, turns in (
        ([], 0),
        ([0], 1),
        ([3, 17, 40, 63], 1),
        (range(0, 64, 4), 2),
        (range(64), 8),
    ):
        made.clear()
        few = np.zeros_like(weights)
        few[:, list(supervised)] = 1.0
        loss, gradient = jax.value_and_grad(linear_cross_entropy)(hidden, head, targets, few)
        jax.effects_barrier()
        expected, expected_gradient = jax.value_and_grad(plain)(hidden, head, targets, few)
        assert (float(loss), len(made)) == (pytest.approx(float(expected), rel=1e-5), turns)
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4)
