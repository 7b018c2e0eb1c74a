#!/usr/bin/env python
"""One case of the device's speed, in a process of its own: `speed.py CASE [--dry-run]`.

A case is a model's shape with random weights, who trains it or generates with it, and batches. The
table that `check` writes puts them beside each other: tokens a second, the share of the device's
peak (MFU) and of the floor, memory. `--dry-run` takes a tiny shape and short rows.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench"), str(Path(__file__).parent)]
import findings  # noqa: E402 (the path above)

LLAMA_8B, LLAMA_1B = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"
SHORT, PACKED = (8, 2048, False), (4, 4096, True)  # rows, tokens, several texts a row
STEPS, ENOUGH = 8, 12.0  # steps that are timed, at least three, within about so many seconds
PROFILED = 2
READ = WRITTEN = 128
GENERATED = (1, 8, 64)  # rows


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        seconds: the most that it may take.
        model: its shape.
        side: a key of `sides.WORKERS`.
        dtype: of its weights.
        batches: (rows, tokens, packed) each; empty for generation.
        checkpointing: the peer computes its layers' activations again, since they would not fit.
        profiled: where the time goes is looked at too.

    """

    seconds: int
    model: str
    side: str
    dtype: str = "bfloat16"
    batches: tuple = (SHORT,)
    checkpointing: bool = False
    profiled: bool = False


CASES = {
    "8B": Case(120, LLAMA_8B, "jaxtune", batches=(SHORT, PACKED), profiled=True),
    "8B PEFT": Case(90, LLAMA_8B, "peft", batches=(SHORT, PACKED), checkpointing=True),
    "8B nf4": Case(80, LLAMA_8B, "jaxtune", "nf4"),
    "generation": Case(70, LLAMA_1B, "jaxtune", batches=()),
    "generation PEFT": Case(70, LLAMA_1B, "peft", batches=()),
    "8B Liger": Case(60, LLAMA_8B, "peft-liger", checkpointing=True),
    "1B": Case(50, LLAMA_1B, "jaxtune"),
    "1B PEFT": Case(45, LLAMA_1B, "peft"),
    "8B fp8": Case(80, LLAMA_8B, "jaxtune", "fp8"),
    "8B torch.compile": Case(150, LLAMA_8B, "peft-compile", checkpointing=True),
    "1B torch.compile": Case(90, LLAMA_1B, "peft-compile"),
    "1B Liger": Case(45, LLAMA_1B, "peft-liger"),
    "8B int8": Case(80, LLAMA_8B, "jaxtune", "int8"),
}
"""In order of worth."""


def tiny(case):
    """The same on a tiny shape and short rows."""
    batches = tuple((2, 64 if length == 2048 else 96, packed) for _, length, packed in case.batches)
    dtype = "float32" if case.dtype == "bfloat16" else case.dtype
    return replace(case, model="tiny", batches=batches, dtype=dtype)


def timed(worker, enough=ENOUGH):
    """Seconds of a step, after those that compile."""
    began = time.perf_counter()
    for number in range(2):
        worker(number)
    warm, seconds = time.perf_counter() - began, []
    while len(seconds) < STEPS and (len(seconds) < 3 or sum(seconds) < enough):
        began = time.perf_counter()
        tokens = worker(len(seconds))
        seconds.append(time.perf_counter() - began)
    return seconds, tokens, warm


def train(case, name):
    import sides

    rows, length, packed = case.batches[0]
    sides.ROWS, sides.LENGTH = rows, length
    began = time.perf_counter()
    worker = sides.WORKERS[case.side](case.dtype, "packed" if packed else "random")
    loaded = time.perf_counter() - began
    for number, (rows, length, packed) in enumerate(case.batches):
        if number:
            worker.use(rows, length, packed)
        seconds, tokens, warm = timed(worker)
        findings.add(
            f"{name}, {rows} x {length:,}{' packed' if packed else ''}",
            tokens=tokens, seconds=statistics.median(seconds), all_seconds=seconds,
            memory=sides.peak_bytes(), memory_is_at_most=bool(number and case.side == "jaxtune"),
            loaded=loaded, warm_up=warm, loss=float(worker.loss), **work(case),
            **({"remat": worker.remat} if case.side == "jaxtune" else
               {"checkpointing": case.checkpointing}),
        )  # fmt: skip
        if case.profiled and not number:
            profile(worker, name)


def work(case):
    """Parameters that count: of the frozen matrices, and of the adapters."""
    import models

    products = models.products()
    head = max(products, key=lambda shape: shape[0])
    adapted = sum(count * (out + width) for (out, width), count in products.items()) - sum(head)
    frozen = sum(count * out * width for (out, width), count in products.items())
    return {"model": case.model, "frozen": frozen, "trained": models.RANK * adapted}


def profile(worker, name):
    import jax
    import models
    from kinds import by_kind, read_profile

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for number in range(PROFILED):
                worker(number)
        (program,) = worker.programs.values()
        operations = read_profile(Path(folder), program.as_text(), models.RANK)
    for kind, seconds in by_kind(operations).items():
        findings.add(f"{name}, a step's {kind}", profile=kind, ms=1e3 * seconds / PROFILED)
    for operation in operations[:10]:
        findings.add(
            f"{name}, {operation.name}", operation=operation.kind, times=operation.times,
            ms=1e3 * operation.seconds / PROFILED,
        )  # fmt: skip


def generate(case, name, small):
    import sides

    read, written = (8, 8) if small else (READ, WRITTEN)
    worker = sides.Tokens(case.side, case.dtype)
    for rows in GENERATED:
        worker.use(rows, read, written)
        seconds, tokens, warm = timed(worker, enough=6)
        findings.add(
            f"{name}, {rows} rows", rows=rows, tokens=tokens, model=case.model,
            seconds=statistics.median(seconds), all_seconds=seconds, warm_up=warm,
            memory=sides.peak_bytes(),
        )  # fmt: skip


def missing(case):
    """What the case needs and this machine or jaxtune does not have; None where all is there."""
    if case.dtype == "fp8":
        return "jaxtune has no fp8 products"
    if case.side == "peft-liger":
        import importlib.util

        import torch

        if importlib.util.find_spec("liger_kernel") is None:
            return "needs the package liger-kernel"
        if not torch.cuda.is_available():
            return "needs a GPU: Liger's kernels run nowhere else"
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    case = CASES[options.case]
    case = tiny(case) if options.dry_run else case
    os.environ["BENCH_MODEL"] = case.model
    if case.checkpointing:
        os.environ["BENCH_CHECKPOINTING"] = "1"
    if (lacking := missing(case)) is not None:
        findings.add(options.case, skipped=lacking)
    elif case.batches:
        train(case, options.case)
    else:
        generate(case, options.case, options.dry_run)


if __name__ == "__main__":
    main()
