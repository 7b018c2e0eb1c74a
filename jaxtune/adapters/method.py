"""What an adapter method is, and the methods there are, by name.

A method is one module of this package. It registers one object that says which layers the method
wraps, what it adds to them, how that is merged, and what PEFT's files call it; nothing outside the
module knows its leaves or its formula. Its name also goes into `adapter.method` of the schema.
"""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import jax
import numpy as np
from flax import nnx

from jaxtune.adapters.config import AdapterConfig, PeftKey
from jaxtune.config.schema import AdapterSection
from jaxtune.core.errors import UserError, listed
from jaxtune.models.layers import Embedding, Linear

ConfigT = TypeVar("ConfigT", bound=AdapterConfig)

RowMap = Callable[[np.ndarray, slice], np.ndarray]
"""From some rows of a tensor of the base, float32, and which these are, to the merged rows."""


class AdapterParam(nnx.Param):
    """A leaf of an adapter; always float32.

    Args:
        value: the numbers, with the stack of layers in front.
        trained: whether it trains, or only comes with the adapter.
        metadata: `axes`, the logical names of all axes but the stack's; `lora_plus=True` where
            LoRA+ has its higher rate (`optimizer.lora_plus`).

    """

    def __init__(self, value: Any, *, trained: bool = True, **metadata: Any) -> None:
        super().__init__(value, trained=trained, **metadata)


class AdapterConstant(nnx.Variable):
    """What an adapter's layer holds and never trains, and no file has.

    `axes` as in `AdapterParam`; the stack of layers stands in front here too.
    """


class AdaptedLayer(nnx.Module):
    """A layer with an adapter on it: the layer that it replaces, with the same weight at the same
    path, and the adapter's leaves beside it.

    A layer that may be the head overrides `as_head` as well as `__call__`: the head is computed by
    `as_head` alone. Layers of a stack that are not adapted compute what the base does and give no
    gradient: mask them with a constant, as `ia3.IA3Active` does.
    """

    by_target: ClassVar[bool] = True
    """Whether it is there because of `adapter.targets`."""

    @property
    @abstractmethod
    def adapted(self) -> tuple[bool, ...]:
        """Which layers of the stack have an adapter; one where there is no stack."""

    def file_index(self, leaf: str, number: int, vocab_size: int) -> tuple[Any, ...]:
        """Return where, in one layer's part of a leaf, the tensor of PEFT's file lies.

        Args:
            leaf: name of the leaf.
            number: of the layer in the stack.
            vocab_size: rows of the vocabulary; beyond them a leaf has padding.

        Returns:
            One index an axis: a slice, or None where PEFT's tensor has an axis of length one.

        """
        axes = getattr(self, leaf).get_metadata()["axes"]
        return tuple(slice(vocab_size if axis == "vocab" else None) for axis in axes)

    def exportable(self) -> "AdaptedLayer":
        """Return the layer in a form that PEFT's files can express."""
        return self

    def portable(self, config: Any) -> "AdaptedLayer":
        """Return the layer with the numbers of a configuration that `AdapterMethod.portable` gave,
        computing the same.
        """
        return self


@dataclass(frozen=True)
class Site:
    """A layer, or a stack of layers of one structure, that gets an adapter.

    Attributes:
        name: its path without numbers, which tells its random numbers apart from others'.
        modules: Hugging Face's names of the modules in it, one a layer.
        adapted: which of these get an adapter.
        key: for random numbers of its own.
        uniform: gives uniform numbers of a shape `[*stack, ...]` within a bound, the same for a
            layer however the model is cut into stacks.

    """

    name: str
    modules: tuple[str, ...]
    adapted: tuple[bool, ...]
    key: jax.Array
    uniform: Callable[[tuple[int, ...], float], jax.Array]


class AdapterMethod(ABC, Generic[ConfigT]):
    """A way to adapt layers.

    Attributes:
        name: in `adapter.method`, or in `adapter.init` where `starts` is set.
        title: its name for a person.
        peft_type: in PEFT's `adapter_config.json`.
        config: class of its configuration.
        leaves: the end of a tensor's name in PEFT's file, after the module's name, by the leaf's
            name in the layer. A tensor that several modules share has no place.
        wraps: kinds of layers it can lie on.
        keys: keys of the section `adapter` that mean something to it, beside `COMMON_KEYS`.
        peft_keys: keys of `adapter_config.json` that it reads, or that change nothing, and what
            they may hold; any other key is refused unless its value is null, false, 0 or empty.
        low_rank: whether what was found for LoRA holds: LoRA+ and the automatic learning rate.
        token_rows: whether PEFT can have rows of single tokens beside it; see `adapters.tokens`.
        starts: the method that it is another beginning of, if it is one.
        keeps_ties: whether a head that is tied to an adapted embedding has the change as well.

    """

    name: ClassVar[str]
    title: ClassVar[str]
    peft_type: ClassVar[str]
    config: type[ConfigT]
    leaves: ClassVar[Mapping[str, str]]
    wraps: ClassVar[tuple[type[Linear | Embedding], ...]] = (Linear,)
    keys: ClassVar[frozenset[str]] = frozenset()
    peft_keys: ClassVar[Mapping[str, PeftKey]] = {}
    low_rank: ClassVar[bool] = False
    token_rows: ClassVar[bool] = False
    starts: ClassVar[str | None] = None
    keeps_ties: ClassVar[bool] = False

    @abstractmethod
    def wrap(self, base: Any, site: Site, config: ConfigT) -> AdaptedLayer:
        """Return the layer with an adapter on it, which may begin from the layer's weight.

        Args:
            base: one of the kinds in `wraps`, or a stack of such layers.
            site: where it is.
            config: the adapter.

        """

    @abstractmethod
    def merge(
        self, config: ConfigT, module: str, tensors: Mapping[str, np.ndarray]
    ) -> dict[str, RowMap]:
        """Return what becomes of a module's own tensors when the adapter is merged into them.

        Args:
            config: the adapter.
            module: Hugging Face's name of the module.
            tensors: the module's tensors in PEFT's file, by the names of the leaves.

        Returns:
            A function on rows for each tensor that changes: `weight`, `bias`.

        """

    def describe(self, section: AdapterSection) -> str:
        """Return what the section `adapter` makes of it, for a person."""
        return self.title

    def from_section(self, section: AdapterSection) -> dict[str, Any]:
        """Return what fields of `config` the section `adapter` gives, but for `AdapterConfig`'s."""
        return {}

    def to_section(self, config: ConfigT) -> dict[str, Any]:
        """Return the inverse of `from_section`, and the method's name."""
        return {"method": self.name}

    def reads(self, raw: Mapping[str, Any]) -> bool:
        """Return whether an adapter of its `peft_type` is one of its own."""
        return True

    def from_peft(self, raw: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the fields of `config` that `adapter_config.json` gives, but for targets,
        exclusions and modules trained whole.

        Raises:
            UserError: a value that is not implemented; `where` is the file.

        """
        return {}

    def to_peft(self, config: ConfigT) -> dict[str, Any]:
        """Return the inverse of `from_peft`."""
        return {}

    def shape_in_file(self, config: ConfigT, module: str, leaf: str) -> dict[int, int]:
        """Return the sizes, by axis, that the configuration gives a module's tensor in PEFT's
        file.
        """
        return {}

    def needs_base(self, config: ConfigT) -> bool:
        """Return whether an adapter on disk is whole only with the weights of its base."""
        return False

    def complete(
        self, config: ConfigT, module: str, tensors: Mapping[str, np.ndarray], weight: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return a module's tensors, by the names of the leaves, with what they lack, and as
        `weight` the base's weight as PEFT has it beside them.

        Args:
            config: the adapter, which `needs_base`.
            module: Hugging Face's name of the module.
            tensors: the module's tensors in PEFT's file.
            weight: of the base, [out, in].

        """
        return dict(tensors) | {"weight": weight}

    def completed(self, config: ConfigT) -> AdapterConfig:
        """Return the configuration of an adapter that lacks nothing any more."""
        return config

    def exportable(self, config: ConfigT) -> AdapterConfig:
        """Return the configuration of layers made exportable (see `AdaptedLayer.exportable`)."""
        return config

    def portable(self, config: ConfigT, modules: tuple[str, ...]) -> AdapterConfig:
        """Return a configuration that programs other than PEFT read in the same way, for layers
        made portable (see `AdaptedLayer.portable`); the same where there is none, or need be none.

        Args:
            config: an exportable adapter.
            modules: Hugging Face's names of the modules that are adapted.

        """
        return config


COMMON_KEYS = frozenset(("method", "targets", "exclude", "modules_to_save", "init"))
"""Keys of the section `adapter` that every method reads."""

METHODS: dict[str, AdapterMethod[Any]] = {}


def register(method: AdapterMethod[Any]) -> None:
    """Make a method known by its name."""
    METHODS[method.name] = method


def all_methods() -> dict[str, AdapterMethod[Any]]:
    """Return the registered methods by name, those of this package among them."""
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return METHODS


def method_named(name: str) -> AdapterMethod[Any]:
    """Return the method of this name.

    Raises:
        UserError: there is none.

    """
    methods = all_methods()
    if name not in methods:
        raise UserError(f"There is no adapter method {name!r}; there are {listed(methods)}.")
    return methods[name]


def method_of(section: AdapterSection) -> AdapterMethod[Any]:
    """Return the method that the section `adapter` names; `init` may name another beginning of
    it.
    """
    start = all_methods().get(section.init or "")
    return start if start and start.starts == section.method else method_named(section.method)
