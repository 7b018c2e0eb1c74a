"""Fine-tune LLaMA-family models on TPUs and GPUs with JAX, and hand them back to Hugging Face, proven."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.api import evaluate, export, generate, load, train

__version__ = "0.1.0"
__all__ = ["evaluate", "export", "generate", "load", "train"]


def __getattr__(name: str) -> Any:
    """The public functions, imported when they are first used, so that `import jaxtune` is quick."""
    if name not in __all__:
        raise AttributeError(f"module 'jaxtune' has no attribute {name!r}")
    from jaxtune import api

    return getattr(api, name)
