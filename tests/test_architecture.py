"""The house's own rules: layers, sizes, names, config fields, command-line options."""

import argparse
import ast
import re
import subprocess
import sys
import time

import pytest

import jaxtune
from jaxtune.cli.main import _parser
from jaxtune.config.keys import keys
from tests.support import source_code
from tests.support.source_code import PACKAGE, ROOT, sources, tree_of

LEVELS = {
    "config": 0, "core": 0, "tracking": 0,
    "models": 1,
    "adapters": 2, "weights": 2, "data": 2, "objectives": 2,
    "training": 3, "inference": 3,
    "evaluation": 4, "planning": 4, "report": 4,
    "workflows": 5, "api": 5, "cli": 5, "": 5,
}  # fmt: skip
# The imports between packages of one level. All other arrows point to a lower one.
SIDEWAYS = {
    ("config", "core"): "errors of a configuration are the user's",
    ("tracking", "core"): "the record is written by files and by one process",
    ("tracking", "config"): "the record of a run holds its configuration",
    ("weights", "adapters"): "adapters are read and written where weights are",
    ("objectives", "data"): "a loss is of a batch",
    ("api", "workflows"): "the verbs call the workflows",
    ("cli", "workflows"): "a command calls its workflow",
    ("cli", ""): "the version",
    ("", "api"): "the package's public functions",
    ("", "cli"): "python -m jaxtune",
}


def package_of(name):
    """Return the package or top module in which a module lies; "" is jaxtune itself."""
    part = name.partition(".")[2].partition(".")[0]
    return "" if part == "__main__" else part


def test_imports_point_down():
    wrong, used = set(), set()
    for path in sources():
        here = package_of(source_code.module_name(path))
        for name in source_code.imported(path):
            there = package_of(name)
            if there == here or LEVELS[there] < LEVELS[here]:
                continue
            used.add((here, there))
            if (here, there) not in SIDEWAYS:
                wrong.add(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))
    unused = SIDEWAYS.keys() - used
    assert not unused, f"Arrows that are needed no more: {unused}"


def test_no_import_cycles_between_files():
    graph = {
        name: source_code.imported(path, typing=False)
        for name, path in source_code.modules().items()
    }
    done, way = set(), []

    def visit(name):
        assert name not in way, " -> ".join([*way, name])
        if name in done or name not in graph:
            return
        way.append(name)
        for other in sorted(graph[name]):
            visit(other)
        way.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_test_modules_do_not_import_each_other():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(ROOT / "tests")
        for name in source_code.imported(path, "tests")
        if not name.startswith("tests.support")
    ]
    assert not wrong, "\n".join(wrong)


def test_tests_mirror_the_package():
    own = {"support", "parity", "scripts", "fuzz"}
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*")}
    assert not [
        str(folder)
        for folder in folders
        if folder.parts[:1] and folder.parts[0] not in own and not (PACKAGE / folder).is_dir()
    ]


def test_packages_do_not_hide_public_functions():
    """`import jaxtune.training.loop` binds modules as attributes of `jaxtune`: were one of them
    named like a verb, the verb would be gone.
    """
    assert not set(jaxtune.__all__) & {path.stem for path in PACKAGE.iterdir()}
    code = (
        "import jaxtune, jaxtune.training.loop, jaxtune.planning.target\n"
        "assert all(callable(getattr(jaxtune, name)) for name in jaxtune.__all__)\n"
        "assert callable(jaxtune.train) and jaxtune.training.loop.fit"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr


def test_files_functions_and_lines_are_small():
    long = []
    for path in [p for part in ("jaxtune", "tests", "scripts") for p in sources(ROOT / part)]:
        lines, name = path.read_text().splitlines(), path.relative_to(ROOT)
        if len(lines) > 400 and name.parts[0] != "scripts":
            long.append(f"{name} has {len(lines)} lines")
        quoted = source_code.lines_of_texts(path)
        long += [
            f"{name}:{number} has {len(line)} columns"
            for number, line in enumerate(lines, 1)
            if len(line) > 100 and number not in quoted
        ]
        long += [
            f"{name}:{function.lineno} {function.name} has {count} lines"
            for function in source_code.functions(path)
            if (count := source_code.length(function)) > 60
        ]
    assert not long, "\n".join(long)


def test_parameters_and_results_are_few():
    many = []
    for path in sources():
        for function in source_code.functions(path):
            place = f"{path.relative_to(ROOT)}:{function.lineno} {function.name}"
            if (count := len(source_code.parameters(function))) > 6:
                many.append(f"{place} takes {count} by position: make those after * keywords")
            match function.returns:
                case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=parts)):
                    if len(parts) > 3:
                        many.append(f"{place} returns {len(parts)} values: give them names")
    assert not many, "\n".join(many)


# (file or folder, names that stand there no more): the words that the field's own have replaced.
OLD_NAMES = [
    ("", r"cuts|figures|judged_by|no_better|_OnTheWay|Asked|Said|Speaker|Voice|RunFailure|NoLog"),
    ("", r"Networks|Computation|Pass|how|Loaded|Slots|Grown|Changed|LoRAStart|split_trainable"),
    ("", r"\w*([Qq]uantis|[Tt]okenis|[Oo]ptimis|[Nn]ormalis|[Ii]nitialis|[Ss]erialis)\w*"),
    ("adapters", r"Part"),
    ("core/distributed.py", r"several|alone|alike|together|from_lead|ending_together|own_place"),
    ("core/sharding.py", r"ways|fitting|spread|even"),
    ("data", r"Plan|Place|BadRow|Problems|Cut"),
    ("inference", r"Rows|Reader"),
    ("models", r"vary|outline|published|SparseMLP|Stacked|phases|rotate|Cache|Reader"),
    ("models", r"over_tokens|contract"),
    ("objectives", r"read|answers"),
    ("training/remat_auto.py", r"chosen|needed|Room"),
    ("weights", r"Row|outline|published|packaged|for_adapter"),
]


def test_the_fields_words_are_used():
    wrong = []
    for path in sources():
        name = path.relative_to(PACKAGE)
        for place, words in OLD_NAMES:
            if not name.is_relative_to(place):
                continue
            wrong += [
                f"jaxtune/{name}:{line} {word}"
                for word, line in source_code.identifiers(tree_of(path))
                if re.fullmatch(words, word)
            ]
    assert not wrong, "\n".join(wrong)


CATCH_ALLS = {"found", "one", "made", "taken", "wanted", "theirs"}


def test_locals_are_named_for_what_they_hold():
    """`theirs` may stand beside `ours`, and `chosen` beside `rejected`."""
    wrong = []
    for path in sources():
        for function in source_code.outermost_functions(path):
            names = source_code.assigned(function)
            words = {word for word, _ in source_code.identifiers(function)}
            banned = CATCH_ALLS - ({"theirs"} if "ours" in words else set())
            banned |= {"chosen"} if "rejected" not in words else set()
            wrong += [f"{path.relative_to(ROOT)}:{n} {word}" for word, n in names if word in banned]
    assert not wrong, "\n".join(wrong)


def test_only_the_registry_tells_formats_apart():
    """A new format costs one file: nothing else compares the name that `to` holds."""
    wrong = []
    for path in sources():
        if path.is_relative_to(PACKAGE / "weights" / "formats"):
            continue
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                names = {ast.unparse(side).rpartition(".")[2] for side in sides}
                words = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
                if "to" in names and any(isinstance(word.value, str) for word in words):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_a_public_class_has_its_name_alone():
    places = {}
    for path in sources():
        for node in tree_of(path).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


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
    outside the configuration's own package.
    """
    text = "\n".join(
        path.read_text()
        for path in sources()
        if path.parent.name != "config"  # where they are declared and checked
    )
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


PROCESSES = ["--coordinator", "--process", "--processes"]
IN_PROCESSES = ("train", "eval", "generate", "export", "convert")
OPTIONS = {
    "quickstart": ["--dir", "--fresh", "--json"],
    "train": ["--data", "--fresh", "--json", "--model", "--quiet", "--verify-cache", "arguments"],
    "plan": ["--data", "--json", "--model", "--on", "--search", "arguments"],
    "data": ["--data", "--json", "--model", "--rows", "--verify-cache", "arguments"],
    "eval": [
        "--adapter",
        "--against",
        "--base",
        "--batch-size",
        "--chat",
        "--data",
        "--harness",
        "--include-path",
        "--json",
        "--limit",
        "--max-new-tokens",
        "--num-fewshot",
        "--predictions",
        "--task",
        "model",
    ],
    "generate": [
        "--adapter",
        "--batch-size",
        "--file",
        "--json",
        "--max-new-tokens",
        "--min-p",
        "--prompt",
        "--repetition-penalty",
        "--seed",
        "--stop",
        "--temperature",
        "--top-k",
        "--top-p",
        "model",
    ],
    "chat": [
        "--adapter",
        "--max-new-tokens",
        "--min-p",
        "--repetition-penalty",
        "--seed",
        "--system",
        "--temperature",
        "--top-k",
        "--top-p",
        "model",
    ],
    "export": ["--dtype", "--exact", "--json", "--out", "--push", "--to", "run_directory"],
    "convert": ["--adapter", "--dtype", "--json", "--push", "--to", "model", "out"],
    "report": ["--out", "runs"],
    "sweep": ["--json", "config", "sweep"],
    "config": ["--schema", "arguments"],
}


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
    several = dict.fromkeys(IN_PROCESSES, PROCESSES)
    assert found == {
        name: sorted([*options, *several.get(name, [])]) for name, options in OPTIONS.items()
    }


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


def test_the_fast_tests_cover_every_package():
    lines = (ROOT / "tests" / "fast.txt").read_text().splitlines()
    folders = {line.split("/")[1] for line in lines if not line.startswith("#")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    elsewhere = {"tracking"}  # by the runs of tests/workflows and by the pages of tests/report
    assert not packages - folders - elsewhere
