"""A strict reader of `config.json` in either dialect: a key that nothing asks for is an error."""

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
        defaults: what transformers assumes for this family if the file lacks a key.

    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        self.raw, self.where, self.defaults = raw, where, defaults
        self.keys_read = set[str]()

    def __call__(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or this family's default."""
        self.keys_read.add(key)
        return self.raw[key] if key in self.raw else self.defaults.get(key, default)

    def require(self, key: str, allowed: Any, why: str = "") -> None:
        """Check that a key has the only value that is implemented, or none.

        Raises:
            UserError: it has another value.

        """
        if (value := self(key, allowed)) not in (allowed, None):
            raise UserError(
                f"{self.where}: {key} {value!r} is not supported{why}; supported is {allowed!r}."
            )


def read_rope(read: HFConfigReader, given: Mapping[str, Any] | None = None) -> RopeConfig:
    """Read a rotary embedding in either dialect, or from `given` if a family has several.

    Raises:
        UserError: a kind or an option is not supported, or a required option is missing.

    """
    where = read.where
    scaling, parameters = read("rope_scaling"), read("rope_parameters")
    options = dict((parameters or scaling or {}) if given is None else given)
    theta = options.pop("rope_theta", None)
    theta = read("rope_theta") if theta is None else theta
    kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
    options.pop("type", None)
    kind = "longrope" if kind == "su" else kind
    partial = options.pop("partial_rotary_factor", None)
    partial = read("partial_rotary_factor", 1.0) if partial is None else partial
    if kind not in _ROPE_OPTIONS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported; supported are {listed(_ROPE_OPTIONS)}."
        )
    required, optional = _ROPE_OPTIONS[kind]
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in options.items()
        if value is not None
    }
    if "original_max_position_embeddings" in required | optional and (
        length := read("original_max_position_embeddings")
    ):
        options["original_max_position_embeddings"] = length
    if missing := sorted(required - options.keys()):
        raise UserError(f"{where}: rope_type {kind} needs {listed(missing)}.")
    if unknown := sorted(options.keys() - required - optional):
        raise UserError(
            f"{where}: rope_type {kind} has keys that jaxtune does not understand: "
            f"{listed(unknown)}."
        )
    return RopeConfig(kind, float(theta), tuple(sorted(options.items())), float(partial))


def read_layer_types(read: HFConfigReader, otherwise: Callable[[int], str]) -> list[str]:
    """Return sliding or full attention for every layer: as the file lists them, or by the family's
    rule.

    Raises:
        UserError: the list is too short or names something else.

    """
    count = read("num_hidden_layers")
    kinds = read("layer_types") or [otherwise(layer) for layer in range(count)]
    if len(kinds) < count or set(kinds) - {SLIDING, FULL}:
        raise UserError(
            f"{read.where}: layer_types must name {SLIDING} or {FULL} for each of the {count} "
            "layers."
        )
    return kinds[:count]
