"""What the package's source says of itself: its modules, imports, functions and names."""

import ast
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "jaxtune"
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def sources(folder=PACKAGE):
    """Return the Python files below a folder in order."""
    return sorted(folder.rglob("*.py"))


@cache
def tree_of(path):
    """Return a file's syntax tree."""
    return ast.parse(path.read_text())


def module_name(path):
    """Return the dotted name under which a file is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules(folder=PACKAGE):
    """Return the files below a folder by dotted name."""
    return {module_name(path): path for path in sources(folder)}


def imported(path, package="jaxtune", typing=True):
    """Return the modules of a package that a file imports, at its head or inside a function.

    `from package import name` is an import of `package.name` where that is a module. `typing`
    tells whether imports under `if TYPE_CHECKING` count, which no running program executes.
    """
    known, names = modules(ROOT / package), set()
    skipped = {
        node
        for part in ast.walk(tree_of(path))
        if not typing and isinstance(part, ast.If) and "TYPE_CHECKING" in ast.unparse(part.test)
        for node in ast.walk(part)
    }
    for node in ast.walk(tree_of(path)):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (inner & known.keys()) | ({node.module} if inner - known.keys() else set())
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {part.value for part in node.args if isinstance(part, ast.Constant)}
    return {name for name in names if name.split(".")[0] == package}


def lines_of_texts(path):
    """Return the lines inside texts of several lines that are no docstrings: templates, programs
    and logs as others wrote them.
    """
    docstrings = {
        node.body[0].lineno
        for node in ast.walk(tree_of(path))
        if isinstance(node, FUNCTION | ast.ClassDef | ast.Module) and ast.get_docstring(node)
    }
    lines = set()
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            first, last = token.start[0], token.end[0]
            kind = tokenize.tok_name[token.type]
            if kind in ("STRING", "FSTRING_MIDDLE") and first < last and first not in docstrings:
                lines |= set(range(first, last + 1))
    return lines


def functions(path):
    """Return the functions of a file, those inside classes and other functions too."""
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, FUNCTION)]


def outermost_functions(path):
    """Return the functions of a file that stand in no other function."""
    inner = {
        node
        for outer in functions(path)
        for node in ast.walk(outer)
        if node is not outer and isinstance(node, FUNCTION)
    }
    return [node for node in functions(path) if node not in inner]


def parameters(function):
    """Return the parameters that may be passed by position, without `self` and `cls`."""
    names = [part.arg for part in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def length(function):
    """Return how many lines a function's body has, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def assigned(tree):
    """Return `(name, line)` of all that is assigned or taken as a parameter below a node."""
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                names.append((name, node.lineno))
            case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)):
                names.append((name, node.lineno))
    return names


def identifiers(tree):
    """Return `(name, line)` of every name in the code below a node: variables, attributes,
    parameters, keywords, definitions and imports. What stands in strings and comments is none.
    """
    names = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                names.append((name, node.lineno))
            case ast.keyword(arg=str(name)):
                names.append((name, node.value.lineno))
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                names.append((name, node.lineno))
            case ast.ClassDef(name=name):
                names.append((name, node.lineno))
            case ast.alias(name=name, asname=other):
                names += [(part, node.lineno) for part in (*name.split("."), other) if part]
    return names
