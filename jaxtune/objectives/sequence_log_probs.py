"""Log-probabilities of whole answers: what the preference objectives compare."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxtune.data.batch import Batch
from jaxtune.models.decoder import CausalLM
from jaxtune.objectives.cross_entropy import Chunks, compute_logits, gather_head, select_targets
from jaxtune.objectives.objective import DETERMINISTIC, ForwardOptions, hidden_and_head


class SequenceLogProbs(NamedTuple):
    """The answers in a batch, a column for each segment of a row.

    Attributes:
        total: sum of the log-probabilities of the supervised tokens, each times its weight, in
            nats.
        tokens: sum of these weights; 1 where there is no answer.

    """

    total: Float[Array, "batch segments"]
    tokens: Float[Array, "batch segments"]

    @property
    def mean(self) -> Float[Array, "batch segments"]:
        """Return the log-probability per token."""
        return self.total / self.tokens


def sequence_log_probs(
    model: CausalLM, batch: Batch, options: ForwardOptions = DETERMINISTIC
) -> SequenceLogProbs:
    """Return the model's log-probabilities of all answers in a batch that has labels."""
    assert batch.labels is not None
    hidden, head = hidden_and_head(model, batch, options)
    weighted = (
        token_log_probs(hidden, head, batch.target_ids, model.config.logit_softcap) * batch.weights
    )
    sums = jax.vmap(partial(jax.ops.segment_sum, num_segments=batch.labels.shape[1] + 1))
    total, tokens = (
        sums(weighted, batch.segment_ids)[:, 1:],
        sums(batch.weights, batch.segment_ids)[:, 1:],
    )
    return SequenceLogProbs(total, jnp.where(tokens == 0, 1.0, tokens))


def token_log_probs(
    hidden: Float[Array, "batch seq embed"],
    head: Float[Array, "vocab embed"],
    targets: Int[Array, "batch seq"],
    cap: float | None,
) -> Float[Array, "batch seq"]:
    """Return log softmax(h W^T)[y] of every token, float32.

    Logits exist for one chunk of tokens at a time; the backward pass computes them again.
    """
    chunks, vocab, head = Chunks(targets.shape), head.shape[0], gather_head(head)

    @jax.checkpoint
    def compute_chunk(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        h, y = inputs
        logits = compute_logits(h, head, vocab, cap)
        return select_targets(logits, y) - jax.nn.logsumexp(logits, axis=-1)

    return chunks.join(jax.lax.map(compute_chunk, (chunks.split(hidden), chunks.split(targets))))
