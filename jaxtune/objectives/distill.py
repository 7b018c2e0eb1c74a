"""Distillation: towards a teacher's distribution over its most likely tokens (Hinton et al.
2015).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.data.batch import Batch
from jaxtune.objectives.cross_entropy import Chunks, at, logits_of, whole_head
from jaxtune.objectives.objective import (
    DETERMINISTIC,
    ForwardOptions,
    Models,
    Objective,
    Sums,
    hidden_and_head,
)


def distill(top_k: int, temperature: float, share: float) -> Objective:
    """Share T^2 KL(p || q) - (1 - share) log q_1(y) a supervised token.

    p is the teacher's distribution over its `top_k` most likely tokens and the rest of the
    vocabulary as one outcome more, q the student's over the same, both at temperature T; q_1 the
    student's at temperature 1.
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        assert models.teacher is not None
        student, teacher = models.policy, models.teacher
        ours, theirs = (
            hidden_and_head(student, batch, options),
            jax.lax.stop_gradient(hidden_and_head(teacher, batch, DETERMINISTIC)),
        )
        chunks, vocab = Chunks(batch.weights.shape), ours[1].shape[0]
        head, guide = whole_head(ours[1]), whole_head(theirs[1])

        @jax.checkpoint
        def turn(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            h, g, y, w = inputs
            logits = logits_of(h, head, vocab, student.config.logit_softcap)
            wanted = logits_of(g, guide, vocab, teacher.config.logit_softcap)
            plain = at(logits, y) - jax.nn.logsumexp(logits, axis=-1)
            distance = _divergence(logits / temperature, wanted / temperature, top_k)
            losses = share * temperature**2 * distance - (1 - share) * plain
            return jnp.sum(w * losses), jnp.sum(w * distance)

        tokens = (ours[0], theirs[0], batch.target_ids, batch.weights)
        losses, distances = jax.lax.map(turn, tuple(map(chunks.cut, tokens)))
        return jnp.sum(losses), jnp.sum(batch.weights), {"teacher_kl": jnp.sum(distances)}

    return Objective(loss)


def _divergence(logits: jax.Array, wanted: jax.Array, top_k: int) -> jax.Array:
    """KL of each row over the teacher's most likely tokens and the rest."""
    top, tokens = jax.lax.top_k(wanted, min(top_k, wanted.shape[-1]))
    log_p = top - jax.nn.logsumexp(wanted, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(logits, tokens, axis=-1) - jax.nn.logsumexp(
        logits, axis=-1, keepdims=True
    )
    rest_p, rest_q = (
        jnp.maximum(-jnp.expm1(jax.nn.logsumexp(log, axis=-1)), 1e-9) for log in (log_p, log_q)
    )
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) + rest_p * (
        jnp.log(rest_p) - jnp.log(rest_q)
    )
