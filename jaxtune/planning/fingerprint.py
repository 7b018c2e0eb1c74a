"""What a plan depends on beside its configuration: the code of the step, and its compilers."""

import ast
import hashlib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_ROOT = "planning/worker.py"
_COMPILERS = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin")


@cache
def fingerprint() -> list[str]:
    """Return a digest of the code that makes and measures a step, and its compilers' versions."""
    return [code_digest(), *map(_version, _COMPILERS)]


def code_digest(package: Path = _PACKAGE) -> str:
    """Return a digest of the files that a step is made by; see `step_files`."""
    digest = hashlib.sha256()
    for path in step_files(package):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def step_files(package: Path = _PACKAGE) -> list[Path]:
    """Return the files that compiling a step imports, directly or not: edits elsewhere, such as in
    a command or a report, change no plan.
    """
    reached, waiting = set(), [package / _ROOT]
    while waiting:
        path = waiting.pop()
        if path not in reached and path.is_file():
            reached.add(path)
            waiting += _imported(path, package)
    return sorted(reached)


def _imported(path: Path, package: Path) -> Iterator[Path]:
    """Yield the files of the package that a file may import, also inside of functions."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Attribute | ast.Name) and _name(node) == "import_module":
            yield from path.parent.rglob("*.py")  # a registry imports its neighbors by their names
    for name in names:
        root, *parts = name.split(".")
        if root == package.name and parts:
            module = package.joinpath(*parts)
            yield from (module.with_suffix(".py"), module / "__init__.py")


def _name(node: ast.Attribute | ast.Name) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} -"
