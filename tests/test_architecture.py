"""The house's own rules: layers, sizes, config fields, command-line options."""

import argparse
import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxtune.cli.main import _parser
from jaxtune.config.load import keys

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxtune"
LEVELS = {
    "config": 0, "core": 0, "models": 1, "adapters": 2, "weights": 2, "data": 2, "objectives": 2,
    "train": 3, "generate": 3,
    "evals": 4, "plan": 4, "report": 4, "training": 5, "exporting": 5, "opening": 5, "chatting": 5,
    "samples": 5, "sweeping": 5, "api": 5, "cli": 5, "": 5,
}  # fmt: skip
# Beside arrows that point down, and any level to level 0.
SIDEWAYS = {
    ("weights", "adapters"),
    ("data", "objectives"),
    ("api", "training"),
    ("api", "exporting"),
    ("api", "opening"),
    ("training", "exporting"),
    ("training", "samples"),
    ("sweeping", "training"),
    ("cli", "sweeping"),
    ("cli", "api"),
    ("chatting", "opening"),
    ("cli", "opening"),
    ("cli", "chatting"),
    ("cli", "training"),
    ("", "api"),
    ("cli", ""),
}


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def module(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            if name == "jaxtune" and isinstance(node, ast.ImportFrom):
                yield from ((alias.name if alias.name in LEVELS else "") for alias in node.names)
            elif name.startswith("jaxtune."):
                yield name.split(".")[1]


def test_imports_point_down():
    wrong = set()
    for path in sources():
        here = module(path)
        for there in imports(path):
            if (
                there != here
                and LEVELS[there]
                and LEVELS[there] >= LEVELS[here]
                and (here, there) not in SIDEWAYS
            ):
                wrong.add(f"{path.relative_to(ROOT)} imports {there}")
    assert not wrong


def test_no_import_cycles_between_files():
    graph = {}
    for path in sources():
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        graph[name] = {
            node.module
            for node in tree.body
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jaxtune")
        }
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_files_and_functions_are_small():
    long = [
        f"{path} has {n} lines"
        for path in sources()
        if (n := len(path.read_text().splitlines())) > 400
    ]
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
                if lines > 60:
                    long.append(f"{path}: {node.name} has {lines} lines")
    assert not long


def test_no_pickle_no_remote_code_no_torch_at_import_time():
    for path in sources():
        text = path.read_text()
        assert "import pickle" not in text, path
        assert not re.search(r"trust_remote_code\s*=\s*True", text), path
        assert "allow_pickle=True" not in text, path
        for node in ast.parse(text).body:
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in getattr(node, "names", [])]
            )
            assert not any(
                name.split(".")[0] in ("torch", "peft") for name in names if isinstance(name, str)
            ), path


def test_every_config_field_is_read():
    """Each key's name stands as an attribute (or in getattr by the adapter's table) in code
    other than the schema.
    """
    text = "\n".join(path.read_text() for path in sources() if path.name != "schema.py")
    unread = [key for key in keys() if not re.search(rf"\.{key.rpartition('.')[2]}\b", text)]
    assert not unread


def test_keys_of_a_single_value_are_those_the_contract_keeps_for_later():
    from typing import Literal, get_args, get_origin

    from jaxtune.config.schema import Config

    found = []
    for name, field in Config.model_fields.items():
        section = getattr(field.annotation, "model_fields", None)
        for key, inner in (section or {"": field}).items():
            if get_origin(inner.annotation) is Literal and len(get_args(inner.annotation)) == 1:
                found.append(f"{name}.{key}".rstrip("."))
    assert found == []


OPTIONS = {
    "quickstart": ["--dir", "--fresh", "--json"],
    "train": ["--coordinator", "--data", "--fresh", "--json", "--model", "--process", "--processes", "--quiet", "arguments"],
    "plan": ["--data", "--json", "--model", "--on", "--search", "arguments"],
    "data": ["--data", "--json", "--model", "--rows", "arguments"],
    "eval": [
        "--adapter", "--against", "--base", "--batch-size", "--chat", "--data", "--harness",
        "--include-path", "--json", "--limit",
        "--max-new-tokens", "--num-fewshot", "--predictions", "--task", "model",
    ],
    "generate": [
        "--adapter", "--batch-size", "--file", "--json", "--max-new-tokens", "--min-p", "--prompt",
        "--repetition-penalty", "--seed", "--stop",
        "--temperature", "--top-k", "--top-p", "model",
    ],
    "chat": [
        "--adapter", "--max-new-tokens", "--min-p", "--repetition-penalty", "--seed", "--system",
        "--temperature", "--top-k", "--top-p", "model",
    ],
    "export": ["--dtype", "--json", "--out", "--push", "--to", "run_directory"],
    "convert": ["--adapter", "--dtype", "--json", "--push", "--to", "model", "out"],
    "report": ["--out", "runs"],
    "sweep": ["--json", "config", "sweep"],
    "config": ["--schema", "arguments"],
}  # fmt: skip


def test_command_line_options_are_frozen():
    (commands,) = (
        action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction)
    )
    found = {
        name: sorted(
            (action.option_strings[-1] if action.option_strings else action.dest)
            for action in parser._actions
            if not isinstance(action, argparse._HelpAction)
        )
        for name, parser in commands.choices.items()
    }
    assert found == OPTIONS


@pytest.mark.parametrize("arguments", [["-m", "jaxtune", "--help"], ["-c", "import jaxtune"]])
def test_help_and_import_load_nothing_heavy(arguments):
    code = ["-X", "importtime", *arguments]
    began = time.monotonic()
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, check=True)
    heavy = [
        name
        for name in ("jax", "flax", "numpy", "pydantic", "transformers", "torch", "rich")
        if f"| {name}\n" in done.stderr.replace("  ", " ")
    ]
    assert not heavy
    assert (
        time.monotonic() - began < 5
    )  # half a second on a quiet machine; this only catches a slip of a heavy import


def test_the_house_is_formatted_and_typed():
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["pyright"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
