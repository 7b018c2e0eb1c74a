"""Which programs read an exported adapter as it was trained, by their own rules.

PEFT: tuners/lora. vLLM: vllm/lora/peft_helper.py, lora_model.py and config/lora.py. llama.cpp:
convert_lora_to_gguf.py, which keeps one alpha and scales each tensor by alpha over its own rank.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from jaxtune.adapters.config import AdapterConfig
from jaxtune.adapters.inject import EMBEDDING, HEAD
from jaxtune.adapters.lora_config import LoRAConfig
from jaxtune.adapters.tokens import TOKEN_ROWS
from jaxtune.weights.peft import COPY, Adapter

PEFT, VLLM, LLAMA_CPP = "PEFT", "vLLM", "llama.cpp"
OTHERS = (VLLM, LLAMA_CPP)
_WHOLE = (f"{EMBEDDING}.weight", f"{HEAD}.weight")
_MAX_LORA_RANK = (16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Consumer:
    """A program that reads adapters.

    Attributes:
        name: of the program.
        accepted: whether it computes with this adapter what was trained.
        reasons: why not, or what it has to be told.

    """

    name: str
    accepted: bool
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return asdict(self)

    def __str__(self) -> str:
        """Return it in a line for a person."""
        verdict = "accepts it" if self.accepted else "does not accept it"
        return f"{self.name} {verdict}" + (f": {'; '.join(self.reasons)}" if self.reasons else "")


@dataclass(frozen=True)
class _Facts:
    """What the rules ask of an adapter."""

    config: AdapterConfig
    modules: tuple[str, ...]
    whole: bool
    tied: bool

    @property
    def numbers(self) -> LoRAConfig | None:
        """Return the numbers of a low-rank adapter, DoRA's too."""
        return self.config if isinstance(self.config, LoRAConfig) else None

    @property
    def largest_rank(self) -> int:
        """Return the largest rank, 0 without one."""
        numbers = self.numbers
        return max((numbers.rank_of(name) for name in self.modules), default=0) if numbers else 0

    def scaled_by(self, rule: Callable[[LoRAConfig, str], float]) -> bool:
        """Return whether a reader's rule gives each module the scale it was trained with."""
        numbers = self.numbers
        return numbers is None or all(
            abs(rule(numbers, name) / numbers.scale_of(name) - 1) < 1e-6 for name in self.modules
        )

    def has(self, part: str) -> bool:
        """Return whether a module is adapted whose name has this part."""
        return any(part in f".{name}." for name in self.modules)


def _vllm_scale(config: LoRAConfig, _: str) -> float:
    return config.alpha / (config.rank**0.5 if config.rslora else config.rank)


def _llama_cpp_scale(config: LoRAConfig, name: str) -> float:
    return config.alpha / config.rank_of(name)


def _max_lora_rank(facts: _Facts) -> int | None:
    """Return what vLLM has to be told, None where nothing is enough."""
    return next((size for size in _MAX_LORA_RANK if size >= facts.largest_rank), None)


Rule = tuple[Callable[[_Facts], bool], tuple[str, ...], str]

REFUSALS: tuple[Rule, ...] = (
    (lambda f: f.numbers is None, OTHERS, "it reads LoRA only"),
    (lambda f: f.config.method == "dora", OTHERS, "it has no DoRA"),
    (
        lambda f: bool(f.config.saved) or f.whole,
        OTHERS,
        "it takes no whole modules (modules_to_save, new rows of embedding and head)",
    ),
    (lambda f: f.config.bias != "none", OTHERS, "it has no trained biases"),
    (lambda f: bool(f.config.tokens), OTHERS, "it has no rows of single tokens"),
    (lambda f: _max_lora_rank(f) is None, (VLLM,), "--max-lora-rank ends at 512"),
    (
        lambda f: (
            not f.scaled_by(_vllm_scale)
            or (f.numbers is not None and f.largest_rank > f.numbers.rank)
        ),
        (VLLM,),
        "it does not read rank_pattern and alpha_pattern (export without --exact)",
    ),
    (
        lambda f: not f.scaled_by(_llama_cpp_scale),
        (LLAMA_CPP,),
        "it does not read use_rslora and alpha_pattern (export without --exact)",
    ),
    (
        lambda f: f.tied and f.has(f".{HEAD}."),
        (LLAMA_CPP,),
        "it does not read a head that is tied to the embedding",
    ),
)
NOTES: tuple[Rule, ...] = (
    (
        lambda f: f.has(f".{HEAD}.") or f.has(f".{EMBEDDING}."),
        (VLLM,),
        "the embedding and the head only with models whose class in vLLM names them",
    ),
    (
        lambda f: f.has(".experts."),
        (VLLM,),
        "experts only with models whose class in vLLM takes them",
    ),
)


def consumers(adapter: Adapter, *, tied: bool) -> tuple[Consumer, ...]:
    """Return which programs read an adapter on disk as it was trained, and why others do not.

    Args:
        adapter: as exported.
        tied: whether the base's head is tied to its embedding.

    """
    layers = [layer for layer in adapter.layers() if layer.method is not TOKEN_ROWS]
    whole = any(name.endswith(_WHOLE) and COPY not in name for name in adapter.tensors)
    facts = _Facts(adapter.config, tuple(layer.module for layer in layers), whole, tied)
    return tuple(_judged(name, facts) for name in (PEFT, VLLM, LLAMA_CPP))


def _judged(name: str, facts: _Facts) -> Consumer:
    def holding(rules: tuple[Rule, ...]) -> tuple[str, ...]:
        return tuple(text for holds, names, text in rules if name in names and holds(facts))

    if refusals := holding(REFUSALS):
        return Consumer(name, False, refusals)
    notes, rank = holding(NOTES), _max_lora_rank(facts)
    if name == VLLM and rank is not None and rank > _MAX_LORA_RANK[0]:
        notes = (f"with --max-lora-rank {rank}", *notes)
    return Consumer(name, True, notes)
