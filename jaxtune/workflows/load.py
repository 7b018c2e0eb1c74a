"""Models as users name them, ready for use: with their adapter, their tokenizer and their stop
tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from flax import nnx
from jax.sharding import Mesh

from jaxtune.core import runtime
from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.answers import end_of_answer
from jaxtune.models.decoder import CausalLM
from jaxtune.tracking.ownership import ADAPTER, MODEL
from jaxtune.tracking.record import is_run, read_config
from jaxtune.weights.generation_config import token_ids
from jaxtune.weights.load import load_model
from jaxtune.weights.loaded import LoadedModel
from jaxtune.weights.peft import Adapter, attach, open_adapter
from jaxtune.weights.source import Source, resolve
from jaxtune.weights.vocabulary import resize_for_adapter, stop_ids_for, tokenizer_for

Pair = tuple[CausalLM, Tokenizer | None]


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's weights come from.

    Attributes:
        base: a hub id or a path, as `weights.source.resolve` takes it.
        adapter: the directory of its PEFT adapter; None without one.

    """

    base: str
    adapter: str | None

    def open(self) -> tuple[Source, Adapter | None]:
        """Open both, the weights unread; the source has rows for the adapter's new tokens."""
        adapter = open_adapter(self.adapter) if self.adapter else None
        return resize_for_adapter(resolve(self.base), adapter), adapter


class TunedModel(NamedTuple):
    """A model and what it was before training.

    Attributes:
        tuned: the model.
        open_base: opens the model before training. A base that an adapter was trained on shares its
            arrays with the model.

    """

    tuned: LoadedModel
    open_base: Callable[[], LoadedModel]


def locate_model(model: str, adapter: str | None = None) -> ModelFiles:
    """Find the files of a model; a run directory stands for its base with its adapter.

    Raises:
        UserError: the run has not finished.

    """
    if not is_run(model):
        return ModelFiles(model, adapter)
    directory = Path(model)
    if (directory / MODEL).is_dir():
        return ModelFiles(str(directory / MODEL), adapter)
    config = read_config(directory)
    if adapter is None:
        kind = MODEL if config.adapter.method == "none" else ADAPTER
        if not (directory / kind).is_dir():
            raise UserError(
                f"{model} has no {kind} yet. Finish the run with: jaxtune train {model}/config.yaml"
            )
    return ModelFiles(config.model.source, adapter or str(directory / ADAPTER))


def open_model(
    model: str | Path | Pair,
    adapter: str | None = None,
    dtype: str = "auto",
    mesh: Mesh | None = None,
) -> LoadedModel:
    """Load a model with its tokenizer and its stop tokens; arguments as in `api.load`.

    A pair of a model and its tokenizer is passed through.
    """
    runtime.start()
    if not isinstance(model, str | Path):
        return _from_pair(*model)
    mesh = mesh or make_mesh()
    source, opened = locate_model(str(model), adapter).open()
    network = load_model(source, mesh, dtype=dtype)
    if opened:
        attach(network, opened, mesh)
    return _loaded(network, source, opened)


def stop_ids_of(source: Source, adapter: Adapter | None, tokenizer: Tokenizer | None) -> list[int]:
    """Return the tokens at which a tuned model's answers end: those that its files name, and the
    one that followed the answers it was trained on.
    """
    end = None if tokenizer is None else end_of_answer(tokenizer)
    return sorted({*stop_ids_for(source, adapter), *([] if end is None else [end])})


def _loaded(network: CausalLM, source: Source, adapter: Adapter | None) -> LoadedModel:
    tokenizer = tokenizer_for(source, adapter)
    stop_ids = stop_ids_of(source, adapter, tokenizer)
    # For those who pass the network on as one of a pair.
    network.config = replace(network.config, stop_ids=tuple(stop_ids))
    return LoadedModel(network, tokenizer, stop_ids, source)


def _from_pair(model: CausalLM, tokenizer: Tokenizer | None) -> LoadedModel:
    stop_ids = {*model.config.stop_ids, *token_ids(model.config.raw, "eos_token_id", "the model")}
    if tokenizer is not None:
        stop_ids |= {tokenizer.eos_token_id, end_of_answer(tokenizer)} - {None}
    return LoadedModel(model, tokenizer, sorted(stop_ids), None)


def has_base(model: str, adapter: str | None = None) -> bool:
    """Return whether `open_with_base` knows what the model was before training.

    Raises:
        UserError: the model is a run that has not finished.

    """
    return locate_model(model, adapter).adapter is not None or is_run(model)


def open_with_base(model: str | Path | Pair, adapter: str | None = None) -> TunedModel:
    """Load a model, and be ready to load what it was before training.

    That is the base of its adapter, or the start of a run that trained the weights.

    Raises:
        UserError: the model has no base.

    """
    if not isinstance(model, str | Path):
        raise UserError("A loaded pair has no base of its own. Give the names of both models.")
    runtime.start()
    files = locate_model(str(model), adapter)
    if files.adapter is None:
        if not is_run(model):
            raise UserError(
                f"{model} has no adapter, so there is no base to compare it with. Name the other "
                "model: --against MODEL."
            )
        start = read_config(Path(model)).model.source
        return TunedModel(open_model(model), lambda: open_model(start))
    mesh, opened = make_mesh(), open_adapter(files.adapter)
    source = resize_for_adapter(resolve(files.base), opened)
    network = load_model(source, mesh)
    before = nnx.merge(*nnx.split(network))  # the same arrays, without the adapter to come
    attach(network, opened, mesh)
    tuned = _loaded(network, source, opened)
    base = LoadedModel(before, tokenizer_for(source, None), tuned.stop_ids, source)
    return TunedModel(tuned, lambda: base)
