"""A model known by its `config.json` alone: names, shapes and dtypes of its weights, no numbers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.core.dtypes import DTYPES
from jaxtune.core.errors import RunError
from jaxtune.core.files import read_json
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.models.decoder import abstract_model
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights import hub
from jaxtune.weights.known_configs import KNOWN_CONFIGS
from jaxtune.weights.mapping import leaf_mappings
from jaxtune.weights.source import Source, is_hub_id, resolve
from jaxtune.weights.tensors import Index, LazyTensor, Tensors


@dataclass(frozen=True)
class AbstractSource(Source):
    """A model without weights.

    Attributes:
        raw: its `config.json`.

    """

    raw: dict[str, Any]

    @property
    def config_path(self) -> Path:
        """See Source."""
        return self.path

    def config_json(self) -> dict[str, Any]:
        """See Source."""
        return self.raw

    def tensors(self) -> Tensors:
        """Return tensors that cannot be read, in the dtype that `config.json` names."""
        name = self.raw.get("dtype") or self.raw.get("torch_dtype") or "float32"
        dtype = DTYPES.get(name, np.dtype(np.float32))
        config = from_hf(self.raw, str(self.path))
        state = nnx.split(abstract_model(config, jnp.dtype(jnp.float32), jnp.dtype(jnp.float32)))[1]
        return {
            name: LazyTensor(row.shape, dtype, _refuse_to_read)
            for row in leaf_mappings(state, config)
            for name in row.names
        }

    def tokenizer(self) -> Tokenizer | None:
        """Return None: `config.json` has no tokenizer."""
        return None


def _refuse_to_read(index: Index) -> NoReturn:
    raise RunError("A model known by its config.json alone has no weights to read.")


def abstract_source(model: str) -> Source:
    """Return the model that a user's string means, as far as `config.json` describes it.

    Args:
        model: as for `weights.source.resolve`, or a `config.json` itself. Of a model on the hub
            only `config.json` is downloaded, and of the best-known models not even that.

    Raises:
        UserError: there is no such model.

    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix == ".json":
        return AbstractSource(model, path, read_json(path))
    if path.is_dir() and (path / "config.json").exists() and not any(path.glob("*.safetensors")):
        return AbstractSource(model, path / "config.json", read_json(path / "config.json"))
    if path.exists() or not is_hub_id(model):
        return resolve(model)
    if (known := KNOWN_CONFIGS.get(model.partition("@")[0].removesuffix("-Instruct"))) is not None:
        return AbstractSource(model, Path("config.json"), known)
    name, _, revision = model.partition("@")
    config_path = hub.download_file(name, revision, "config.json")
    return AbstractSource(model, config_path, read_json(config_path))
