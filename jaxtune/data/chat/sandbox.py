"""Chat templates are programs of whoever made the model. Jinja's sandbox, which transformers runs
them in, keeps them from the machine; here their time and memory are bounded too.

Whatever makes a value much larger at once (`*`, `**`, `%`, widths, replace, join) is estimated
before it is done; everything made counts toward one sum; loops, calls and filters look at the
clock.
"""

import functools
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from jaxtune.core.errors import UserError

_SECONDS = 5.0
_MOST_BYTES, _MOST_IN_ALL = 128 << 20, 512 << 20
_LONGEST_SOURCE = 1 << 20
_WIDEST, _MOST_BITS = 100_000, 4096
_WIDTH = re.compile(
    r"\d{6}|\*|\{[^{}]*\{"
)  # a wide column, or one whose width comes from elsewhere


class TemplateCost(UserError):
    """A chat template that takes more time or memory than any conversation needs."""


class _Budget:
    """What a rendering may still take."""

    def __init__(self) -> None:
        self._end, self._left = time.monotonic() + _SECONDS, _MOST_IN_ALL

    def tick(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self._end:
            raise TemplateCost(f"it takes more than {_SECONDS:.0f} seconds")

    def allow(self, size: int) -> None:
        """Refuse to make a value of this size in bytes."""
        if size > _MOST_BYTES:
            raise TemplateCost(f"it makes a value of more than {_MOST_BYTES >> 20} MiB")

    def measured(self, value: Any) -> Any:
        """Return a value that was made, after counting it."""
        self.tick()
        if isinstance(value, str | bytes | list | tuple | dict):
            size = sys.getsizeof(value)
            self.allow(size)
            self._left -= size
            if self._left < 0:
                raise TemplateCost(f"it makes values of more than {_MOST_IN_ALL >> 20} MiB")
        return value


_BUDGET: ContextVar[_Budget] = ContextVar("chat_template_budget")
_LOCK = Lock()


@contextmanager
def bounded() -> Iterator[None]:
    """Bound what transformers' rendering of chat templates takes in this block.

    Raises:
        TemplateCost: by the rendering.

    """
    from transformers.utils import chat_template_utils

    token = _BUDGET.set(_Budget())
    with _LOCK:
        compile_before = chat_template_utils._compile_jinja_template
        chat_template_utils._compile_jinja_template = _compile
        try:
            yield
        finally:
            chat_template_utils._compile_jinja_template = compile_before
            _BUDGET.reset(token)


@functools.lru_cache
def _compile(source: str) -> Any:
    """Compile a template as transformers does, in the environment below."""
    from transformers.utils import chat_template_utils as library

    if len(source) > _LONGEST_SOURCE:
        raise TemplateCost(f"it is longer than {_LONGEST_SOURCE >> 20} MiB")
    environment_before = library.ImmutableSandboxedEnvironment
    library.ImmutableSandboxedEnvironment = _Environment
    try:
        return library._cached_compile_jinja_template(source)
    finally:
        library.ImmutableSandboxedEnvironment = environment_before


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a budget."""

    intercepted_binops = frozenset(["*", "**", "%", "+"])

    def __init__(self, *args: Any, **options: Any) -> None:
        # Constants are computed as the template runs, not as it is compiled.
        super().__init__(*args, **options, optimized=False)
        self.globals.pop("lipsum")
        self.filters = _Filters(self.filters)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _Counting().visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """See jinja2.sandbox."""
        budget = _BUDGET.get()
        if operator == "*":
            budget.allow(_product_size(left, right))
        elif operator == "**":
            budget.allow(_power_size(left, right))
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left, [right])
        return budget.measured(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """See jinja2.sandbox."""
        budget = _BUDGET.get()
        budget.tick()
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes | int):
            args = _checked(getattr(__obj, "__name__", ""), owner, args, kwargs)
        return budget.measured(super().call(__context, __obj, *args, **kwargs))

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the parts of an output."""
        budget, kept, size = _BUDGET.get(), [], 0
        for part in parts:
            size += len(part)
            budget.allow(size)
            budget.tick()
            kept.append(part)
        return budget.measured("".join(kept))


class _Counting(NodeTransformer):
    """Puts a look at the budget where Jinja asks the environment nothing: loops, `~` and slices."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "_ticking")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "_measured") if isinstance(node.arg, nodes.Slice) else node


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _ticking(items: Iterable[Any]) -> Iterator[Any]:
    budget = _BUDGET.get()
    for item in items:
        budget.tick()
        yield item


class _Filters(dict):
    """Filters by name, each with a budget."""

    def __init__(self, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        for name, function in filters.items():
            self[name] = function
        super().__setitem__("_ticking", _ticking)
        super().__setitem__("_joined", lambda items: _Environment.concat(map(str, items)))
        super().__setitem__("_measured", lambda value: _BUDGET.get().measured(value))

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            budget = _BUDGET.get()
            budget.tick()
            value, rest = args[first], args[first + 1 :]
            if name == "join":
                value = list(value)
            if name not in ("default", "d"):
                rest = _checked(name, value, rest, options)
            return budget.measured(function(*args[:first], value, *rest, **options))

        super().__setitem__(name, call)


def _checked(name: str, value: Any, args: tuple, options: dict[str, Any]) -> tuple:
    """Return the arguments of a method or a filter after estimating what it makes of a value."""
    given = [*args, *options.values()]
    wide = [item for item in given if isinstance(item, int) and abs(item) > _WIDEST]
    if wide and name not in ("index", "find", "count", "format", "get"):
        raise TemplateCost(f"{name} is called with {wide[0]}")
    size = 0
    if name == "join":
        # The method belongs to what stands between the parts, the filter to the parts.
        parts = value if isinstance(value, list) else list(args[0])
        between = given[0] if isinstance(value, list) and given else value
        args = args if isinstance(value, list) else (parts, *args[1:])
        size = sum(map(_length, parts)) + _length(between) * len(parts)
    elif name in ("replace", "translate"):
        size = _length(value) * (1 + max(map(_length, given), default=0))
        if name == "replace" and isinstance(value, str) and len(given) >= 2:
            size = len(value) + value.count(str(given[0])) * _length(given[1])
    elif name in ("indent", "expandtabs", "tojson"):
        lines = str(value).count("\n") + str(value).count("\t") + str(value).count(",") + 1
        size = lines * max((item for item in given if isinstance(item, int)), default=0)
    elif name in ("format", "format_map"):
        _check_format(value, given)
    elif name == "sum" and any(isinstance(item, list | tuple | str) for item in given):
        raise TemplateCost("it sums what are no numbers")
    _BUDGET.get().allow(size)
    return args


def _length(value: Any) -> int:
    if isinstance(value, dict):
        return max(map(_length, value.values()), default=0)
    return len(value) if isinstance(value, str | bytes | list | tuple) else 32


def _check_format(text: Any, values: list[Any]) -> None:
    if isinstance(text, str | bytes):
        written = text if isinstance(text, str) else text.decode("latin-1")
        if _WIDTH.search(written):
            raise TemplateCost("it formats with a width of its own making")
        values = [
            part for value in values for part in (value if isinstance(value, tuple) else [value])
        ]
        holes = written.count("{") + written.count("%")
        _BUDGET.get().allow(len(written) * 10_000 // 2 if holes > 10_000 else 0)
        _BUDGET.get().allow(holes * max(map(_length, values), default=0))


def _product_size(left: Any, right: Any) -> int:
    if isinstance(left, int) and isinstance(right, int):
        return _bits_size(left.bit_length() + right.bit_length())
    for text, times in ((left, right), (right, left)):
        if isinstance(times, int) and isinstance(text, str | bytes | list | tuple):
            return sys.getsizeof(text) * max(times, 0)
    return 0


def _power_size(base: Any, exponent: Any) -> int:
    if isinstance(base, int) and isinstance(exponent, int):
        return _bits_size(base.bit_length() * abs(exponent))
    return 0


def _bits_size(bits: int) -> int:
    """Return the size of an integer; what has thousands of digits counts as too large."""
    return bits if bits <= _MOST_BITS else _MOST_BYTES + 1
