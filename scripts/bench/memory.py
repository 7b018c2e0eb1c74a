#!/usr/bin/env python
"""Memory of one training step, compiled for TPUs that are not there: by method, by model and mesh,
and how many tokens fit.

    scripts/test --version          # makes the environment, the compiler for TPUs among it
    .venv/bin/python scripts/bench/memory.py methods|models|largest [--record]

It is `jaxtune plan` on many configurations: the step that `jaxtune train` runs, bfloat16 base, rank
16 on all linear maps, rows of 2,048 tokens, whole layers recomputed, at the compiler's low effort.
`sum` is what a chip holds at once by the safe reading (arguments + results - what they replace +
temporaries), `peak` the compiler's own figure. `--record` appends the table to RESULTS.md.
"""

import argparse
from pathlib import Path

from jaxtune.config.load import load_config
from jaxtune.planning.planner import Plan, plans

GIB, LENGTH = 2**30, 2048
NAMES = {
    "1B": "Llama-3.2-1B",
    "8B": "Llama-3.1-8B",
    "70B": "Llama-3.3-70B",
    "405B": "Llama-3.1-405B",
}
METHODS = {
    "full": ["adapter.method=none"],
    "last:4": ["adapter.method=none", "trainable=last:4"],
    "LoRA": [],
    "DoRA": ["adapter.method=dora"],
    "QLoRA, int8": ["model.dtype=int8"],
    "QLoRA, nf4": ["model.dtype=nf4"],
}
# Model, target, tensor, rows, further keys; the last column is google-tunix 0.1.7 at its best
# remat, peak / sum, from the project's notes.
MODELS = [
    ("1B", "v5e:1x1", 1, 4, [], "8.6 / 8.8"),
    ("1B", "v5e:1x1", 1, 8, [], "13.6 / 13.6"),
    ("8B", "v5e:2x2", 1, 4, [], "14.1 / 14.2"),
    ("8B", "v5e:2x2", 1, 8, [], "does not fit"),
    ("8B", "v5e:4x4", 4, 16, [], "5.7 / 5.8"),
    ("8B", "v5e:4x4", 1, 16, [], "?"),
    ("8B", "v5p:2x2x1", 1, 16, [], "21.8 / 22.0"),
    ("8B", "2*v5e:4x4", 4, 32, [], "?"),
    ("70B", "v5e:8x8", 8, 8, [], "?"),
    ("70B", "v5p:2x2x2", 1, 16, [], "?"),
    ("70B", "v5e:4x4", 4, 16, ["model.dtype=nf4"], "?"),
    ("405B", "v5p:4x4x8", 8, 16, [], "?"),
]
LARGEST = [
    ("1B", "v5e:1x1", [], "8"),
    ("8B", "v5e:2x2", [], "4"),
    ("8B", "v5e:1x1", ["model.dtype=nf4"], "2 (int4)"),
    ("8B", "v5e:4x4", [], "?"),
]


def config(model, rows, *keys, tensor=1, slices=1):
    common = [
        f"model.source=meta-llama/{NAMES[model]}",
        f"data.max_length={LENGTH}",
        "train.remat=full",
        f"train.batch_size={rows}",
    ]
    return load_config(overrides=[*common, f"mesh.tensor={tensor}", f"mesh.slices={slices}", *keys])


def cells(found):
    if not isinstance(found, Plan):
        raise found
    if found.peak_bytes is None:
        return f"the compiler wants {found.needed_bytes / GIB:.1f} | | no"
    sizes = (found.argument_bytes, found.temp_bytes, found.compiler_peak_bytes, found.peak_bytes)
    return " | ".join(f"{size / GIB:.2f}" for size in sizes) + f" | {'yes' if found.fits else 'no'}"


def methods():
    lines = [
        "| model, method (v5e:1x1, 4 x 2,048) | arguments | temporaries | peak | sum | fits 15.75 "
        "|",
        "|---|---|---|---|---|---|",
    ]
    for model in ("1B", "8B"):
        for name, found in zip(
            METHODS,
            plans([config(model, 4, *keys) for keys in METHODS.values()], "v5e:1x1"),
            strict=True,
        ):
            lines.append(f"| {model}, {name} | {cells(found)} |")
    return lines


def models():
    head = "| model, target | mesh | rows | arguments | temporaries | peak | sum | fits |"
    head += " tunix, peak / sum |"
    lines = [head, "|---|---|---|---|---|---|---|---|---|"]
    for model, target, tensor, rows, keys, theirs in MODELS:
        slices = int(target.partition("*")[0]) if "*" in target else 1
        (found,) = plans([config(model, rows, *keys, tensor=tensor, slices=slices)], target)
        mesh = (
            " x ".join(f"{name} {size}" for name, size in found.mesh.items() if size > 1)
            or "one chip"
        )
        note = f", {keys[0].partition('=')[2]}" if keys else ""
        lines.append(f"| {model}{note}, {target} | {mesh} | {rows} | {cells(found)} | {theirs} |")
    return lines


def largest():
    lines = [
        "| model, target | largest batch that fits, rows of 2,048 | sum, GiB | next that does not "
        "| tunix |",
        "|---|---|---|---|---|",
    ]
    for model, target, keys, theirs in LARGEST:
        step, rows, best, fits = {"v5e:1x1": 1, "v5e:2x2": 4, "v5e:4x4": 16}[target], 0, 0, None
        step = max(step, 2) if model == "1B" else step
        while True:
            (found,) = plans([config(model, rows + step, *keys)], target)
            if not isinstance(found, Plan) or not found.fits:
                break
            rows, best, fits = rows + step, rows + step, found
        note = f", {keys[0].partition('=')[2]}" if keys else ""
        size = f"{fits.peak_bytes / GIB:.1f}" if fits else ""
        lines.append(f"| {model}{note}, {target} | {best} | {size} | {rows + step} | {theirs} |")
    return lines


TABLES = {"methods": methods, "models": models, "largest": largest}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    text = "\n".join(TABLES[options.table]()) + "\n"
    print(text)
    if options.record:
        command = f"python scripts/bench/memory.py {options.table}"
        heading = f"\n## Memory of a step: {options.table}\n\n`{command}`, GiB a chip:\n\n"
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write(heading + text)


if __name__ == "__main__":
    main()
