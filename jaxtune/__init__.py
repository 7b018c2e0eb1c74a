"""Fine-tune LLaMA-family models on TPUs and GPUs with JAX, and hand them back to Hugging Face,
proven.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.api import convert, evaluate, export, generate, load, plan, train

__version__ = "0.1.0"
__all__ = ["convert", "evaluate", "export", "generate", "load", "plan", "train"]


def __getattr__(name: str) -> Any:
    """Import a public function when it is first used, so that `import jaxtune` is quick."""
    if name in __all__:
        return getattr(importlib.import_module("jaxtune.api"), name)
    raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted([*__all__, "__version__"])
