"""Fine-tune LLaMA-family models on TPUs and GPUs with JAX, and hand them back to Hugging Face, proven."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtune.api import convert, evaluate, export, generate, load, plan, train

__version__ = "0.1.0"
__all__ = ["convert", "evaluate", "export", "generate", "load", "plan", "train"]


class _Function:
    """A public function, imported when it is first used, so that `import jaxtune` is quick.

    Three of them have the names of subpackages, and importing a subpackage sets an attribute of its name on this package: that is
    let pass, so that `jaxtune.train` is the function whatever was imported before.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, package: Any, owner: type) -> Any:
        return getattr(importlib.import_module("jaxtune.api"), self.name)

    def __set__(self, package: Any, value: Any) -> None:
        pass


class _Package(ModuleType):
    """What `jaxtune` is: a module whose public functions stand above its subpackages."""


for _name in __all__:
    setattr(_Package, _name, _Function(_name))
sys.modules[__name__].__class__ = _Package
