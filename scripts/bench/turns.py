"""Sides of a comparison asked by turns: the processes of `sides.py`, from outside."""

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

SIDES = Path(__file__).with_name("sides.py")
LIMIT = 240  # seconds to warm up; a dtype that the processor emulates may need far longer
LIKE_JAXTUNE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as the command `jaxtune` begins
# One more before them is not counted: memory and caches are then as the other side has left them.
STEPS_A_TURN = 3
PAUSE = 0.5  # seconds between turns, in which the other sides' idle threads stop spinning


class Side:
    """A side's process.

    Args:
        name: a key of `WORKERS` in `sides.py`.
        dtype: of its spec; for generation the number of rows.
        data: `random`, `news` or `generate`.
        python: the interpreter, where it is not this one.

    """

    def __init__(self, name, dtype, data="random", python=sys.executable):
        self.command = [python, str(SIDES), name, dtype, data]
        self.name, self.dtype, self.seconds, self.tokens, self.peak = name, dtype, [], [], None

    def start(self):
        quiet = subprocess.DEVNULL if "BENCH_DEBUG" not in os.environ else None
        environment = os.environ | (LIKE_JAXTUNE if self.name in ("jaxtune", "floor") else {})
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=quiet,
            text=True,
            env=environment,
        )

    def line(self):
        """The next line of its output; None where it takes longer than the limit or has ended."""
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        return (self.process.stdout.readline() if ready else None) or None

    def turn(self):
        self.step()
        for _ in range(STEPS_A_TURN):
            seconds, tokens = self.step()
            self.seconds.append(seconds)
            self.tokens.append(tokens)

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    @property
    def rates(self):
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    @property
    def rate(self):
        """Tokens of all its steps over their seconds, the slowest and the fastest step left out."""
        order = sorted(range(len(self.seconds)), key=lambda k: self.rates[k])
        kept = order[1:-1] if len(order) > 4 else order
        return sum(self.tokens[k] for k in kept) / sum(self.seconds[k] for k in kept)

    def close(self):
        self.process.stdin.close()
        self.peak = int(self.line())
        self.process.wait()


def by_turns(sides, turns):
    """Let the sides make their steps; those that did not get through their warm-up are left
    without seconds.
    """
    alive = []
    for side in sides:  # one after the other: on a GPU compilers time their kernels
        side.start()
        if side.line() == "ready\n":
            alive.append(side)
        else:
            side.process.kill()
            print(
                f"{side.name} {side.dtype}: no step within {LIMIT} s, or it ended", file=sys.stderr
            )
    for number in range(turns):
        for side in alive if number % 2 else reversed(alive):
            time.sleep(PAUSE)
            side.turn()
        print(f"  turn {number + 1}/{turns}", file=sys.stderr, flush=True)
    for side in alive:
        side.close()
    return alive
