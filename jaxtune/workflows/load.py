"""Models as users name them, ready for use: with their adapter, their tokenizer and their stop
tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from jaxtune.core import runtime
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.models.decoder import CausalLM
from jaxtune.tracking.run_directory import ADAPTER, MODEL, is_run, read_config
from jaxtune.weights.load import load_model
from jaxtune.weights.loaded import LoadedModel
from jaxtune.weights.peft import attach, open_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.vocabulary import resize_for_adapter, tokenizer_for

Pair = tuple[CausalLM, Any]


def open_model(
    model: str | Pair, adapter: str | None = None, dtype: str = "auto", mesh: Mesh | None = None
) -> LoadedModel:
    """Like `load`, with the stop tokens; a loaded pair is passed through."""
    runtime.start()
    if not isinstance(model, str | Path):
        network, tokenizer = model
        eos = getattr(tokenizer, "eos_token_id", None)
        found = network.config.raw.get("eos_token_id", eos)
        stops = (
            found
            if isinstance(found, list)
            else [token for token in {found, eos} if token is not None]
        )
        return LoadedModel(network, tokenizer, sorted(stops), None)
    mesh = mesh or make_mesh()
    name, adapter = base_and_adapter(str(model), adapter)
    opened = open_adapter(adapter) if adapter else None
    source = resize_for_adapter(resolve(name), opened)
    network = load_model(source, mesh, dtype=dtype)
    if opened:
        attach(network, opened, mesh)
    return LoadedModel(network, tokenizer_for(source, opened), source.stop_ids(), source)


def open_both(
    model: str | Pair, adapter: str | None = None
) -> tuple[LoadedModel, Callable[[], LoadedModel]]:
    """A model with its adapter, and what opens what it was before training: the base, or of a run
    that trained the weights, their start.

    A base shares its arrays with the model.

    Raises:
        UserError: there is nothing that it was before.

    """
    if not isinstance(model, str | Path):
        raise UserError("A loaded pair has no base of its own. Give the names of both models.")
    runtime.start()
    name, path = base_and_adapter(str(model), adapter)
    if path is None:
        if not is_run(model):
            raise UserError(
                f"{model} has no adapter, so there is no base to compare it with. Name the other "
                "model: --against MODEL."
            )
        return open_model(model), lambda: open_model(read_config(Path(model)).model.source)
    mesh, opened = make_mesh(), open_adapter(path)
    source = resize_for_adapter(resolve(name), opened)
    network = load_model(source, mesh)
    base = nnx.merge(*nnx.split(network))
    attach(network, opened, mesh)
    stops = source.stop_ids()
    before = LoadedModel(base, tokenizer_for(source, None), stops, source)
    return LoadedModel(network, tokenizer_for(source, opened), stops, source), lambda: before


def base_and_adapter(model: str, adapter: str | None) -> tuple[str, str | None]:
    """A run directory means its base with its adapter."""
    if not is_run(model):
        return model, adapter
    if (Path(model) / MODEL).is_dir():
        return str(Path(model) / MODEL), adapter
    if adapter is None and read_config(Path(model)).adapter.method == "none":
        raise UserError(
            f"{model} has no model yet. Finish the run with: jaxtune train {model}/config.yaml"
        )
    if adapter is None and not (Path(model) / ADAPTER).is_dir():
        raise UserError(
            f"{model} has no adapter yet. Finish the run with: jaxtune train {model}/config.yaml"
        )
    return read_config(Path(model)).model.source, adapter or str(Path(model) / ADAPTER)
