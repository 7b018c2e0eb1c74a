"""Rows of single tokens that an adapter has for itself, in the embedding and in the head; the
rest of the matrix stays as it is. They lie beside any method that has `token_rows`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import AfterValidator

from jaxtune.adapters.config import AdapterConfig, PeftKey, matches
from jaxtune.adapters.method import AdaptedLayer, AdapterMethod, AdapterParam, RowMap, Site
from jaxtune.config.types import Index
from jaxtune.models.layers import Dropout, Embedding, Linear


def _distinct(ids: list[int]) -> list[int]:
    if len(set(ids)) < len(ids):
        raise ValueError("a token comes twice")
    return ids


TokenIds = Annotated[list[Index], AfterValidator(_distinct)]


class _TokenLayer(AdaptedLayer):
    """What the embedding and the head share: tokens `ids` have rows of the adapter."""

    by_target = False
    ids: tuple[int, ...]
    weight: nnx.Param
    trainable_tokens_delta: AdapterParam

    @property
    def adapted(self) -> tuple[bool, ...]:
        """See AdaptedLayer."""
        return (True,)

    def _add_rows(self, weight: nnx.Param, ids: tuple[int, ...], trains: bool) -> None:
        rows = weight[...][jnp.asarray(ids)].astype(jnp.float32)
        axes = (None, weight.get_metadata()["axes"][1])
        self.weight, self.ids = weight, ids
        self.trainable_tokens_delta = AdapterParam(rows, axes=axes, trained=trains)

    def as_head(
        self, x: Float[Array, "*batch in"], dropout: Dropout | None
    ) -> tuple[jax.Array, jax.Array]:
        """See Linear: a head that is tied to the embedding has the same rows."""
        rows = self.trainable_tokens_delta[...].astype(x.dtype)
        return x, self.weight[...].astype(x.dtype).at[jnp.asarray(self.ids)].set(rows)


class TokenEmbedding(_TokenLayer, Embedding):
    """An embedding in which the tokens `ids` have rows of the adapter (PEFT's trainable tokens)."""

    def __init__(self, base: Embedding, ids: tuple[int, ...], *, trains: bool) -> None:
        self._add_rows(base.weight, ids, trains)

    def __call__(
        self, tokens: Int[Array, "batch seq"], dtype: np.dtype
    ) -> Float[Array, "batch seq embed"]:
        """Return the tokens' rows in the compute dtype."""
        hits = tokens[..., None] == jnp.asarray(self.ids)
        own = self.trainable_tokens_delta[...][jnp.argmax(hits, axis=-1)].astype(dtype)
        return jnp.where(hits.any(axis=-1, keepdims=True), own, super().__call__(tokens, dtype))


class TokenLinear(_TokenLayer, Linear):
    """A head in which the tokens `ids` have rows of the adapter."""

    def __init__(self, base: Linear, ids: tuple[int, ...], *, trains: bool) -> None:
        self._add_rows(base.weight, ids, trains)
        self.bias = base.bias


class TokenRows(AdapterMethod[AdapterConfig]):
    """Rows of single tokens, which `AdapterConfig.tokens` names."""

    name = "tokens"
    title = "Rows of single tokens"
    peft_type = "TRAINABLE_TOKENS"
    config = AdapterConfig
    leaves: ClassVar[Mapping[str, str]] = {
        "trainable_tokens_delta": "token_adapter.trainable_tokens_delta"
    }
    wraps = (Linear, Embedding)
    peft_keys: ClassVar[Mapping[str, PeftKey]] = {
        "trainable_token_indices": PeftKey(
            TokenIds | dict[str, TokenIds], "a list of different token ids, or such a list a module"
        )
    }
    keeps_ties = True

    def wrap(self, base: Any, site: Site, config: AdapterConfig) -> AdaptedLayer:
        """See AdapterMethod. The rows begin as they are."""
        layer: Any = TokenEmbedding if isinstance(base, Embedding) else TokenLinear
        return layer(base, self.ids(config, site.modules[0]), trains=config.tokens_train)

    def merge(
        self, config: AdapterConfig, module: str, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, RowMap]:
        """See AdapterMethod."""
        ids = np.asarray(self.ids(config, module), np.int64)
        own = tensors["trainable_tokens_delta"]

        def replaced(block: np.ndarray, rows: slice) -> np.ndarray:
            inside = (ids >= rows.start) & (ids < rows.start + len(block))
            block = block.copy()
            block[ids[inside] - rows.start] = own[inside].astype(np.float32)
            return block

        return {"weight": replaced}

    def ids(self, config: AdapterConfig, module: str) -> tuple[int, ...]:
        """Return the tokens that have rows of their own in the module of this name."""
        return next((ids for name, ids in config.tokens if matches((name,), module)), ())

    def from_peft(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """See AdapterMethod."""
        indices = raw.get("trainable_token_indices") or {}
        rows = indices if isinstance(indices, dict) else {"embed_tokens": indices}
        return {"tokens": tuple((name, tuple(ids)) for name, ids in rows.items())}

    def to_peft(self, config: AdapterConfig) -> dict[str, Any]:
        """See AdapterMethod."""
        rows = {name: list(ids) for name, ids in config.tokens}
        return {"trainable_token_indices": rows or None}


TOKEN_ROWS = TokenRows()
