"""The architecture of a decoder: one description with declared variations, whatever the family."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxtune.core.errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: its base and how it is stretched to longer texts.

    `kind` is one of default, linear, dynamic, llama3, yarn, longrope; `options` holds that kind's
    numbers under the names of `config.json`; `partial` is the share of a head's dimensions that is
    rotated.
    """

    kind: str = "default"
    theta: float = 10000.0
    options: tuple[tuple[str, Any], ...] = ()
    partial: float = 1.0

    def get(self, name: str, default: Any = None) -> Any:
        """The option `name`, or `default`."""
        return dict(self.options).get(name, default)

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the text is."""
        return self.kind in ("dynamic", "longrope")


@dataclass(frozen=True)
class LayerConfig:
    """What differs from layer to layer.

    Attributes:
        window: a token sees itself and the window - 1 tokens before; None: all of them.
        rope: which of the model's rotary embeddings; None: no position at all (NoPE).
        sparse: whether the feed-forward part is a mixture of experts.

    """

    window: int | None = None
    rope: int | None = 0
    sparse: bool = False


@dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts: `chosen` of `count` feed-forward networks of `size` for every token.

    `normalize`: whether the chosen experts' probabilities are scaled to sum to one.
    """

    count: int
    chosen: int
    size: int
    normalize: bool


@dataclass(frozen=True)
class NormConfig:
    """Normalization: x / rms(x) * (offset + weight).

    `wide`: whether the weight is multiplied in float32, before the result is rounded to the compute
    dtype, or after.
    """

    eps: float
    offset: float = 0.0
    wide: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A decoder's shape and variations. `raw` is the `config.json` it came from, written back
    unchanged on export.

    Attributes:
        ropes: the rotary embeddings that layers choose from.
        layers: one entry a layer.
        norms: where the block normalizes: `pre` (input of attention and MLP), `post` (their output)
            or `sandwich` (both).
        qk_norm: queries and keys are normalized by `head`, over all heads together (`full`), or not
            at all.
        qkv_bias, o_bias, mlp_bias: which linear maps have a bias.
        fused: q, k and v in one matrix (`qkv_proj`), gate and up in one (`gate_up_proj`).
        attention_scale: what q k^T is multiplied with.
        attention_softcap, logit_softcap: c in c tanh(x / c), on scores and logits; None: not at
            all.
        vocab_padding: further rows of embedding and head that no token has, so that they divide
            over a mesh; logits have none of them.
        layer_boundaries: numbers of layers at which a stack is cut though their structure is the
            same, because other leaves of them train.
        embedding_scale, residual_scale, logit_scale: multipliers of the embeddings, of what a block
            adds, of the logits.

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
    raw: dict[str, Any] = field(compare=False, hash=False, repr=False, default_factory=dict)

    def check_tokens(self, rows: Iterable[Sequence[int] | np.ndarray]) -> None:
        """That the model has every token of these rows; an index too large would be read as the
        last one.

        Raises:
            UserError: it has not.

        """
        largest = max((int(np.max(row)) for row in rows if len(row)), default=0)
        if largest >= self.vocab_size:
            raise UserError(
                f"The tokenizer gives token {largest}, and the model has {self.vocab_size} "
                "tokens. Use the model's own tokenizer, or name "
                "the tokens that are new in model.new_tokens when training."
            )

    @property
    def num_layers(self) -> int:
        """Layers of the decoder."""
        return len(self.layers)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding windows that layers have, each once; None is a layer that sees everything
        before.
        """
        return tuple(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def segments(self) -> tuple[range, ...]:
        """Runs of layers of one structure, each of which is a stack of arrays and one compiled
        layer.
        """
        layers = self.layers
        layer_boundaries = [
            at
            for at in range(1, len(layers))
            if at in self.layer_boundaries or layers[at].sparse != layers[at - 1].sparse
        ]
        return tuple(
            range(start, stop)
            for start, stop in zip(
                [0, *layer_boundaries], [*layer_boundaries, len(self.layers)], strict=True
            )
        )

    @property
    def rope_limit(self) -> int | None:
        """The length of text beyond which other frequencies apply to all of it (longrope); None:
        there is none.
        """
        limits = [
            kind.get("original_max_position_embeddings", self.max_positions)
            for kind in self.ropes
            if kind.kind == "longrope"
        ]
        return min(limits, default=None)
