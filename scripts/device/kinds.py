"""Where the time of a step goes, by kind: of a profile, the time of each operation, and of the
compiled program, what the operation is.
"""

import collections
import re
from typing import NamedTuple

PRODUCTS, THIN, ATTENTION = "products", "thin products", "attention"
COPIES, ELEMENTWISE = "copies", "elementwise"
HOLDERS = ("while", "conditional", "call")  # the time of what they hold is counted there
# Names of kernels that the profiler does not trace back to an operation, as in a CUDA graph.
KERNELS = (
    (ATTENTION, re.compile(r"sdpa|fmha|flash|attention", re.I)),
    (THIN, re.compile(r"gemm_fusion", re.I)),
    (PRODUCTS, re.compile(r"nvjet|cutlass|gemm|cublas|xmma", re.I)),
    (COPIES, re.compile(r"memcpy|memset|copy|transpose|concatenate|slice", re.I)),
)
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*)$")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) (?:\(.*)?\{$")


class Operation(NamedTuple):
    """One operation of a profile: its name, its kind, seconds and how often it ran."""

    name: str
    kind: str
    seconds: float
    times: int


def read_profile(folder, program, rank):
    """The operations of a profile, longest first; seconds are summed over its steps.

    Args:
        folder: what `jax.profiler.trace` wrote.
        program: the text of the compiled program.
        rank: the adapters' rank; a product with a dimension of this size is thin.

    """
    from jax.profiler import ProfileData

    path = sorted(folder.glob("**/*.xplane.pb"))[-1]
    seconds, times, instructions = collections.Counter(), collections.Counter(), Program(program)
    planes = list(ProfileData.from_file(str(path)).planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in devices or planes:
        for line in streams(plane) if devices else plane.lines:
            for event in line.events:
                operation = dict(event.stats).get("hlo_op")
                if operation is None and not devices:
                    continue  # the host's own functions
                name = operation if operation in instructions.texts else event.name
                seconds[name] += event.duration_ns / 1e9
                times[name] += 1
    return [
        Operation(name, kind, time, times[name])
        for name, time in seconds.most_common()
        if (kind := instructions.kind(name, rank)) is not None
    ]


def streams(plane):
    """A device's lines that hold each piece of work once."""
    lines = list(plane.lines)
    kernels = [line for line in lines if line.name.startswith("Stream")]
    return kernels or [line for line in lines if line.name == "XLA Ops"]


class Program:
    """A compiled program's instructions by name, each with those of the computation it calls."""

    def __init__(self, text):
        self.texts, self.bodies = {}, collections.defaultdict(list)
        here = None
        for line in text.splitlines():
            if (begins := COMPUTATION.match(line)) is not None:
                here = begins[1]
            elif (instruction := INSTRUCTION.match(line)) is not None:
                self.texts[instruction[1]] = instruction[2]
                self.bodies[here].append(instruction[2])

    def kind(self, name, rank):
        """The kind of an operation; None for one that only holds others."""
        text = self.texts.get(name)
        if text is None:
            return next((kind for kind, kernel in KERNELS if kernel.search(name)), ELEMENTWISE)
        code = re.search(r"\s([a-z][\w-]*)\(", " " + text)
        code = code[1] if code else ""
        if code in HOLDERS:
            return None
        called = re.search(r"calls=%?([\w.-]+)", text)
        texts = [text, *self.bodies.get(called[1] if called else None, ())]
        if any("__cudnn$fmha" in part for part in texts):
            return ATTENTION
        products = [part for part in texts if re.search(r"\sdot\(|__cublas", part)]
        if products:
            return self.product(products, rank)
        moved = re.search(r"\b(copy|transpose|slice|concatenate)", f"{name} {code}")
        worked = re.search(r"multiply|add|exponential|reduce|subtract|divide", name)
        return COPIES if moved and not worked else ELEMENTWISE

    def product(self, texts, rank):
        sizes = {
            int(size)
            for text in texts
            for shape in re.findall(r"[a-z]\w*\[([\d,]+)\]", self.with_operands(text))
            for size in shape.split(",")
        }
        if sizes & {rank, 2 * rank, 3 * rank}:  # adapters of one input may be one product
            return THIN
        return ATTENTION if any("lhs_batch_dims" in text for text in texts) else PRODUCTS

    def with_operands(self, text):
        """An instruction's text with the shapes of what it reads."""
        inside = text.partition("(")[2]
        names = re.findall(r"%([\w.-]+)", inside)
        return " ".join([text, *(self.texts.get(name, "").partition(" ")[0] for name in names)])


def by_kind(operations):
    """`{kind: seconds}`, longest first."""
    sums = collections.Counter()
    for operation in operations:
        sums[operation.kind] += operation.seconds
    return dict(sums.most_common())
