"""The architecture of a decoder: one description with declared variations, whatever the family."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from jaxtune.core.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is stretched to longer texts.

    Attributes:
        kind: default, linear, dynamic, llama3, yarn or longrope.
        theta: the base.
        options: that kind's numbers, under the names of `config.json`.
        partial: the share of a head's dimensions that is rotated.

    """

    kind: str = "default"
    theta: float = 10000.0
    options: tuple[tuple[str, Any], ...] = ()
    partial: float = 1.0

    def get(self, name: str, default: Any = None) -> Any:
        """Return the option `name`, or `default`."""
        return dict(self.options).get(name, default)

    @property
    def by_length(self) -> bool:
        """Return whether the frequencies depend on the length of the text."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer.

    Attributes:
        window: a token sees itself and the window - 1 tokens before; None: all of them.
        rope: index of one of the model's rotary embeddings; None: no positions (NoPE).
        sparse: whether the feed-forward network is a mixture of experts.

    """

    window: int | None = None
    rope: int | None = 0
    sparse: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts: several feed-forward networks, a few of which see each token.

    Attributes:
        count: experts in a layer.
        per_token: experts that each token goes through.
        size: width of an expert's hidden layer.
        normalize: whether the probabilities of a token's experts are scaled to sum to one.

    """

    count: int
    per_token: int
    size: int
    normalize: bool


@dataclass(frozen=True)
class NormConfig:
    """Normalization: x / rms(x) * (offset + weight).

    Attributes:
        eps: added to the mean square of x.
        offset: added to the weight.
        wide: whether the weight is multiplied in float32, before the result is rounded to the
            compute dtype, or after.

    """

    eps: float
    offset: float = 0.0
    wide: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and variations.

    Attributes:
        ropes: the rotary embeddings that layers choose from.
        layers: one entry per layer.
        norms: where the block normalizes: `pre` (input of attention and MLP), `post` (their output)
            or `sandwich` (both).
        qk_norm: whether queries and keys are normalized per head (`head`), over all heads together
            (`full`), or not at all.
        qkv_bias, o_bias, mlp_bias: which linear maps have a bias.
        fused: q, k and v in one matrix (`qkv_proj`), gate and up in one (`gate_up_proj`).
        attention_scale: the factor of q k^T.
        attention_softcap, logit_softcap: c in c tanh(x / c), on scores and logits; None: no cap.
        vocab_padding: additional rows of embedding and head that belong to no token, so that both
            divide over a mesh; logits leave them out.
        layer_boundaries: layers at which a new stack begins although their structure is the same,
            because different leaves of them train.
        embedding_scale, residual_scale, logit_scale: factors of the embeddings, of what a block
            adds, and of the logits.
        raw: the `config.json` it came from, written back on export.
        stop_ids: tokens that end an answer, as far as they are known.

    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    norm: NormConfig
    ropes: tuple[RopeConfig, ...]
    layers: tuple[LayerConfig, ...]
    tie_embeddings: bool
    attention_scale: float
    activation: str = "silu"
    norms: Literal["pre", "post", "sandwich"] = "pre"
    qk_norm: Literal["head", "full"] | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: ExpertsConfig | None = None
    vocab_padding: int = 0
    layer_boundaries: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = field(compare=False, hash=False, repr=False, default=())
    raw: dict[str, Any] = field(compare=False, hash=False, repr=False, default_factory=dict)

    def check_tokens(self, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """Check that the model has every token of these rows; without a check, indexing would
        replace a token that is too large with the last one.

        Raises:
            UserError: it has not.

        """
        largest = max((int(np.max(row)) for row in rows if len(row)), default=0)
        if largest >= self.vocab_size:
            raise UserError(
                f"The tokenizer gives token {largest}, and the model has {self.vocab_size} "
                "tokens. Use the model's own tokenizer, or name the new tokens in "
                "model.new_tokens when training."
            )

    @property
    def num_layers(self) -> int:
        """Return the number of layers."""
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the different sliding windows of the layers; None stands for no window."""
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def segments(self) -> tuple[range, ...]:
        """Return the runs of layers of one structure: each is a stack of arrays and one compiled
        layer.
        """
        layers = self.layers
        boundaries = [
            at
            for at in range(1, len(layers))
            if at in self.layer_boundaries or layers[at].sparse != layers[at - 1].sparse
        ]
        limits = [0, *boundaries, len(layers)]
        return tuple(range(start, stop) for start, stop in pairwise(limits))

    @property
    def rope_limit(self) -> int | None:
        """Return the length beyond which a text has other frequencies (longrope), or None."""
        limits = [
            kind.get("original_max_position_embeddings", self.max_positions)
            for kind in self.ropes
            if kind.kind == "longrope"
        ]
        return min(limits, default=None)
