"""Reading a `config.json` strictly, in either dialect: what nothing asks for was not understood."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import RopeConfig

SLIDING, FULL = "sliding_attention", "full_attention"

# What each kind of RoPE must have and may have, beside rope_type, rope_theta and
# partial_rotary_factor.
_ROPE_OPTIONS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "dynamic": ({"factor"}, set()),
    "llama3": (
        {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
        set(),
    ),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        },
    ),
    "longrope": (
        {"short_factor", "long_factor"},
        {"original_max_position_embeddings", "attention_factor", "factor"},
    ),
}


class HFConfigReader:
    """A `config.json` that remembers which of its keys were asked for.

    Args:
        raw: the parsed file.
        where: the file, for messages.
        defaults: what transformers assumes for this family where the file is silent.

    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.raw, self.where, self.defaults, self.read = raw, where, defaults, set[str]()

    def __call__(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or this family's default."""
        self.read.add(key)
        return self.raw[key] if key in self.raw else self.defaults.get(key, default)

    def refuse(self, key: str, allowed: Any, why: str = "") -> None:
        """Only this value of a key is implemented.

        Raises:
            UserError: it has another.

        """
        if (value := self(key, allowed)) not in (allowed, None):
            raise UserError(
                f"{self.where}: {key} {value!r} is not supported{why}; supported is {allowed!r}."
            )


def rope(
    read: HFConfigReader, given: Mapping[str, Any] | None = None, default_theta: float | None = None
) -> RopeConfig:
    """A rotary embedding, from either dialect, or from `given` where a family has several.

    Raises:
        UserError: a kind or a number that is not implemented, or one that is missing.

    """
    where = read.where
    scaling, parameters = read("rope_scaling"), read("rope_parameters")
    found = dict((parameters or scaling or {}) if given is None else given)
    theta = found.pop("rope_theta", None)
    theta = read("rope_theta", default_theta) if theta is None else theta
    kind = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    partial = found.pop("partial_rotary_factor", None)
    partial = read("partial_rotary_factor", 1.0) if partial is None else partial
    if kind not in _ROPE_OPTIONS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported; supported are {listed(_ROPE_OPTIONS)}."
        )
    required, optional = _ROPE_OPTIONS[kind]
    found = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in found.items()
        if value is not None
    }
    if "original_max_position_embeddings" in required | optional and (
        length := read("original_max_position_embeddings")
    ):
        found["original_max_position_embeddings"] = length
    if missing := sorted(required - found.keys()):
        raise UserError(f"{where}: rope_type {kind} needs {listed(missing)}.")
    if unknown := sorted(found.keys() - required - optional):
        raise UserError(
            f"{where}: rope_type {kind} has keys that jaxtune does not understand: "
            f"{listed(unknown)}."
        )
    return RopeConfig(kind, float(theta), tuple(sorted(found.items())), float(partial))


def layer_types(read: HFConfigReader, otherwise: Callable[[int], str]) -> list[str]:
    """One of sliding and full attention a layer, as the file lists them or as the family's rule
    has it.
    """
    count = read("num_hidden_layers")
    kinds = read("layer_types") or [otherwise(layer) for layer in range(count)]
    if len(kinds) < count or set(kinds) - {SLIDING, FULL}:
        raise UserError(
            f"{read.where}: layer_types must name {SLIDING} or {FULL} for each of the {count} "
            "layers."
        )
    return kinds[:count]
