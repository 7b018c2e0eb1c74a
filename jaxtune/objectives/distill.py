"""Distillation: towards a teacher's distribution over its most likely tokens (Hinton et al.
2015).
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config.schema import Config
from jaxtune.data.batch import Batch
from jaxtune.objectives.cross_entropy import Chunks, compute_logits, gather_head, select_targets
from jaxtune.objectives.objective import (
    DETERMINISTIC,
    ForwardOptions,
    Models,
    Objective,
    Sums,
    hidden_and_head,
)
from jaxtune.objectives.registry import register


@register("distill")
def build_distill(config: Config) -> Objective:
    """Build the objective from the section `distill`."""
    section = config.distill
    return distill(section.top_k, section.temperature, section.share)


def distill(top_k: int, temperature: float, share: float) -> Objective:
    """Return the objective share T^2 KL(p || q) - (1 - share) log q_1(y) per supervised token.

    p is the teacher's distribution over its `top_k` most likely tokens and, as one more outcome,
    the rest of the vocabulary; q is the student's over the same outcomes, both at temperature T.
    q_1 is the student's distribution at temperature 1.
    """

    def loss(models: Models, batch: Batch, options: ForwardOptions, shared: Any) -> Sums:
        assert models.teacher is not None
        student, teacher = models.policy, models.teacher
        hidden, head = hidden_and_head(student, batch, options)
        teacher_hidden, teacher_head = jax.lax.stop_gradient(
            hidden_and_head(teacher, batch, DETERMINISTIC)
        )
        chunks = Chunks(batch.weights.shape)
        vocab, teacher_vocab = head.shape[0], teacher_head.shape[0]
        head, teacher_head = gather_head(head), gather_head(teacher_head)

        @jax.checkpoint
        def sum_chunk(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
            h, h_teacher, y, w = inputs
            logits = compute_logits(h, head, vocab, student.config.logit_softcap)
            teacher_logits = compute_logits(
                h_teacher, teacher_head, teacher_vocab, teacher.config.logit_softcap
            )
            log_q = select_targets(logits, y) - jax.nn.logsumexp(logits, axis=-1)
            if vocab != teacher_vocab:  # rows that only one of them has name no token
                rows = min(vocab, teacher_vocab)
                logits, teacher_logits = logits[..., :rows], teacher_logits[..., :rows]
            kl = _divergence(logits / temperature, teacher_logits / temperature, top_k)
            losses = share * temperature**2 * kl - (1 - share) * log_q
            return jnp.sum(w * losses), jnp.sum(w * kl)

        tokens = (hidden, teacher_hidden, batch.target_ids, batch.weights)
        losses, divergences = jax.lax.map(sum_chunk, tuple(map(chunks.split, tokens)))
        return Sums(jnp.sum(losses), jnp.sum(batch.weights), {"teacher_kl": jnp.sum(divergences)})

    return Objective(loss)


def _divergence(logits: jax.Array, teacher_logits: jax.Array, top_k: int) -> jax.Array:
    """Return KL(teacher || student) of each token over the teacher's most likely tokens and the
    rest.
    """
    top, tokens = jax.lax.top_k(teacher_logits, min(top_k, teacher_logits.shape[-1]))
    log_p = top - jax.nn.logsumexp(teacher_logits, axis=-1, keepdims=True)
    log_q = jnp.take_along_axis(logits, tokens, axis=-1) - jax.nn.logsumexp(
        logits, axis=-1, keepdims=True
    )
    rest_p, rest_q = (
        jnp.maximum(-jnp.expm1(jax.nn.logsumexp(log, axis=-1)), 1e-9) for log in (log_p, log_q)
    )
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1) + rest_p * (
        jnp.log(rest_p) - jnp.log(rest_q)
    )
