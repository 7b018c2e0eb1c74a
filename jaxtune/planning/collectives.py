"""The collectives of a compiled program: kind, bytes, how often, and the mesh axes they span."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxtune.core.mesh import SLICES

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_OPERATION = re.compile(
    rf"= (?P<shape>\(.*?\)|\S+) (?P<kind>{'|'.join(_KINDS)})(?P<start>-start)?\("
)
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)")
_LOOP = re.compile(r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)")
_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4,
    "s64": 8, "u64": 8, "f64": 8,
}  # fmt: skip
_RESULT = re.compile(
    r"^\s+(?:ROOT )?%\S+ = ([a-z]\w*)\[([\d,]*)\]\S* "
    r"(?!parameter|get-tuple-element|bitcast|constant)"
)
_NAMED_GROUPS = re.compile(
    r"replica_groups=mesh\[(.*?)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
_BETWEEN = re.compile(
    r"= (?P<shape>\(.*?\)) send\(.*_xla_megascale_transfer_type=\"(?P<kind>\w+)\""
)
_FUSED_SCATTER = "all-reduce-scatter"


@dataclass(frozen=True)
class Collective:
    """One kind of exchange in a step.

    Attributes:
        kind: `all-gather`, `all-reduce`, `reduce-scatter`, `all-to-all` or `collective-permute`.
        axes: the mesh axes that it spans.
        shape: dtype and shape of the largest array that is exchanged, as the program writes it.
        size: bytes on one device of the full array: the gathered one, or the one that is reduced.
        times: how often it runs in a step.
        group: the number of devices that take part together.

    """

    kind: str
    axes: tuple[str, ...]
    shape: str
    size: int
    times: int
    group: int

    @property
    def sent(self) -> int:
        """Return the bytes that one device sends in a step by the ring algorithms."""
        share = (self.group - 1) / self.group
        passes = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return round(self.size * passes) * self.times


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """Return the collectives of a program, the largest first; equal ones are counted as one kind.

    Args:
        text: the program as XLA prints it after compilation.
        mesh: the sizes of the mesh's axes, in order.

    """
    computations = dict(_computations(text))
    entry = next(
        name for name in computations if re.search(rf"^ENTRY %{re.escape(name)} ", text, re.M)
    )
    times = _times(computations, entry)
    counts: Counter[tuple] = Counter()
    for name, lines in computations.items():
        for line in lines:
            if not times[name]:
                continue
            if between := _BETWEEN.search(line):  # slices communicate through their hosts
                shape, size = _largest(between["shape"], tuples=True)
                kind = between["kind"].lower().replace("_", "-")
                counts[kind, (SLICES,), shape, size, mesh[SLICES]] += times[name]
            operation = _OPERATION.search(line)
            if operation is None:
                continue
            kind = operation["kind"]
            if kind == "all-reduce" and name.startswith(_FUSED_SCATTER):
                kind = "reduce-scatter"
            shape, size = _largest(operation["shape"], tuples=bool(operation["start"]))
            axes, group = _axes(line, mesh)
            if kind == "reduce-scatter" and not name.startswith(_FUSED_SCATTER):
                size *= group
            if group > 1:
                counts[kind, axes, shape, size, group] += times[name]
    exchanged = [
        Collective(kind, axes, shape, size, count, group)
        for (kind, axes, shape, size, group), count in counts.items()
    ]
    return sorted(exchanged, key=lambda collective: -collective.sent)


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each computation's name and lines."""
    name, lines = None, []
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            name, lines = begin[1], []
        elif name is not None and re.match(r"\}(?!\})", line):  # }} ends a kernel's description
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def arrays_in_memory(text: str) -> Iterator[tuple[str, int, str]]:
    """Yield `(shape, bytes, line)` of every array that is computed outside of fusions, and so lies
    in memory.
    """
    for name, lines in _computations(text):
        if "fused" in name or "fusion" in name or name.startswith(_FUSED_SCATTER):
            continue
        for line in lines:
            result = _RESULT.search(line)
            if result and result[1] in _BYTES:
                yield f"{result[1]}[{result[2]}]", _size(result[1], result[2]), line


def _times(computations: dict[str, list[str]], entry: str) -> Counter[str]:
    """Return how often each computation runs in one run of the program."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in computations.get(name, []):
            if loop := _LOOP.search(line):
                known = _KNOWN.search(line)
                trips = int(known[1]) if known else _trips(computations.get(loop[1], []))
                visit(loop[2], count * trips)
                continue
            for called in _CALLED.finditer(line):
                for callee in called[1].split(","):
                    visit(callee.strip().lstrip("%"), count)

    visit(entry, 1)
    return times


def _trips(condition: list[str]) -> int:
    """Return the bound that a loop's counter is compared with; a scan counts from 0 by 1."""
    bounds = [
        int(constant[1])
        for line in condition
        if (constant := re.search(r" s32\[\]\S* constant\((\d+)\)", line))
    ]
    return max(bounds, default=1)


def _largest(text: str, tuples: bool) -> tuple[str, int]:
    """Return the shape of the largest array, and bytes: of that array where an asynchronous start
    returns a tuple of operands and results, else of all together.
    """
    arrays = [
        (array[0], _size(array[1], array[2]))
        for array in _ARRAY.finditer(text)
        if array[1] in _BYTES
    ]
    if not arrays:
        return text, 0
    shape, largest = max(arrays, key=lambda array: array[1])
    return shape, largest if tuples else sum(size for _, size in arrays)


def _size(dtype: str, sizes: str) -> int:
    return (
        int(np.prod([int(part) for part in sizes.split(",") if part], dtype=np.int64))
        * _BYTES[dtype]
    )


def _axes(line: str, mesh: dict[str, int]) -> tuple[tuple[str, ...], int]:
    """Return the mesh axes along which a group's devices differ, and the devices in a group."""
    groups = _groups(line)
    shape = tuple(mesh.values())
    if groups is None:  # all devices
        groups = np.arange(np.prod(shape))[None]
    places = np.stack(np.unravel_index(groups, shape), axis=-1)
    differs = (places != places[:, :1]).any(axis=(0, 1))
    size = 2 if "source_target_pairs" in line else groups.shape[1]
    axes = tuple(name for name, is_spanned in zip(mesh, differs, strict=True) if is_spanned)
    return axes, size if axes else 1


def _groups(line: str) -> np.ndarray | None:
    """Return the groups of a collective, int [groups, devices], from any of XLA's notations."""
    if listed := re.search(r"(?:source_target_pairs|replica_groups)=\{(\{.*?\})\}", line):
        return np.array([_ints(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if tiled := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        return _numbered(tiled[2], tiled[3]).reshape(_ints(tiled[1]))
    if named := _NAMED_GROUPS.search(line):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        numbers = (
            _numbered(named[2], named[3]) if named[2] else np.arange(np.prod(list(axes.values())))
        )
        numbers = numbers.reshape(tuple(axes.values()))
        over = [list(axes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
        last = np.moveaxis(numbers, over, range(-len(over), 0))
        return last.reshape(-1, int(np.prod([numbers.shape[axis] for axis in over])))
    return None


def _numbered(sizes: str, order: str | None) -> np.ndarray:
    shape = _ints(sizes)
    numbers = np.arange(np.prod(shape)).reshape(shape)
    return numbers.transpose(_ints(order)) if order else numbers


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))
