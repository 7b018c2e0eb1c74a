"""A strict reader of `config.json` in either dialect: a key that nothing asks for is an error."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtune.core.errors import UserError, listed
from jaxtune.models.config import RopeConfig
from jaxtune.models.families.config_types import check_config, check_rope

SLIDING, FULL = "sliding_attention", "full_attention"

# Keys whose null says something else than that the key is not there.
_NULL_MEANS_NONE = {
    "sliding_window", "final_logit_softcapping", "attn_logit_softcapping", "num_key_value_heads",
    "head_dim",
}  # fmt: skip

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

    Raises:
        UserError: a value has a type that its key cannot have.

    """

    def __init__(self, raw: Mapping[str, Any], where: str, defaults: Mapping[str, Any]) -> None:
        check_config(raw, where)
        self.raw, self.where, self.defaults = raw, where, defaults
        self.keys_read = set[str]()

    def __call__(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or this family's default."""
        self.keys_read.add(key)
        value = self.raw.get(key)
        if value is None and not (key in self.raw and key in _NULL_MEANS_NONE):
            return self.defaults.get(key, default)
        return value

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
        UserError: a kind or an option is not supported, a required option is missing, or the two
            dialects disagree.

    """
    where = read.where
    old = _old_dialect(read)
    options = _plain(given if given is not None else read("rope_parameters") or {}, where)
    if given is None:
        if differing := sorted(key for key in options.keys() & old if options[key] != old[key]):
            raise UserError(
                f"{where}: rope_parameters says something else about {listed(differing)} than "
                "rope_scaling and the keys beside it. Keep one of them."
            )
        options = {**old, **options}
    theta = options.pop("rope_theta", None) or read("rope_theta")
    partial = options.pop("partial_rotary_factor", None) or read("partial_rotary_factor", 1.0)
    kind = options.pop("rope_type", "default")
    if kind not in _ROPE_OPTIONS:
        raise UserError(
            f"{where}: rope_type {kind!r} is not supported; supported are {listed(_ROPE_OPTIONS)}."
        )
    required, optional = _ROPE_OPTIONS[kind]
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
    low, high = options.get("low_freq_factor"), options.get("high_freq_factor")
    if kind == "llama3" and low == high:
        raise UserError(f"{where}: low_freq_factor and high_freq_factor are both {low}.")
    return RopeConfig(kind, float(theta), tuple(sorted(options.items())), float(partial))


def _old_dialect(read: HFConfigReader) -> dict[str, Any]:
    """Return what the keys of transformers 4 say, where they are there."""
    options = _plain(read("rope_scaling") or {}, read.where, "rope_scaling")
    for key in ("rope_theta", "partial_rotary_factor"):
        read(key)
        if read.raw.get(key) is not None:
            options.setdefault(key, read.raw[key])
    return options


def _plain(options: Mapping[str, Any], where: str, name: str = "rope_parameters") -> dict[str, Any]:
    """Return checked options without nulls and old names."""
    check_rope(options, where, name)
    plain = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in options.items()
        if value is not None
    }
    kind = plain.pop("type", None)
    kind = plain.get("rope_type", kind)
    return plain | ({"rope_type": "longrope" if kind == "su" else kind} if kind else {})


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
