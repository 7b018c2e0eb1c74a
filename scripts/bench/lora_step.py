#!/usr/bin/env python
"""Speed and memory of one LoRA step, jaxtune beside transformers + PEFT, in turns on the same machine.

    .venv/bin/python scripts/bench/lora_step.py [--steps 12] [--dtypes float32,bfloat16] [--record]

The model is SmolLM2-135M (packaged), LoRA r=16 on all linear layers of the blocks, AdamW, a batch of 4 x 256 random tokens, every token
supervised. Each side is a process of its own that warms up by two steps and then waits for its turn: the sides take one step each, by
turns, so that what else the machine does falls on both. The ratio is the median of the pairs'. Peak memory is the process's. `--record`
appends the table to RESULTS.md.
"""

import argparse
import datetime
import importlib.metadata
import platform
import resource
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, LENGTH, RANK, ALPHA = 4, 256, 16, 32.0
WARM_UP = 2  # the first step compiles, the second may do so again for its own results' layout
LIMIT = 240  # seconds to warm up; a dtype that the processor emulates may need far longer
PAUSE = 0.5  # seconds between turns, in which the other side's idle threads stop spinning


def tokens():
    import numpy as np

    return np.random.default_rng(0).integers(0, 49152, (ROWS, LENGTH + 1)).astype(np.int32)


def serve(step):
    """Warm up, then one step for every line of the input, its seconds for every line of the output; at the end the peak memory."""
    for _ in range(WARM_UP):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, flush=True)


def jaxtune(dtype, remat):
    import jax
    import numpy as np

    from jaxtune.config.loading import load_config
    from jaxtune.core.mesh import make_mesh
    from jaxtune.data.loader import on_devices
    from jaxtune.objectives.objective import Batch
    from jaxtune.train.methods import trained_model
    from jaxtune.train.setup import assembled
    from jaxtune.train.step import init_state, train_step
    from jaxtune.weights.packaged import smollm2
    from jaxtune.weights.source import resolve

    mesh, source = make_mesh(), resolve(str(smollm2()))
    keys = [f"model.dtype={dtype}", f"model.compute_dtype={dtype}", f"adapter.rank={RANK}", f"adapter.alpha={ALPHA}"]
    config = load_config(overrides=[*keys, f"train.remat={remat or 'auto'}"])
    computation, trainable, frozen, update = assembled(config, trained_model(config, source, None, mesh), 1000)
    run = train_step(computation, update)
    ids, ones = tokens(), np.ones((ROWS, LENGTH), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, np.cumsum(ones, axis=1, dtype=np.int32) - 1)
    state = init_state(trainable, update, 0)

    def step():
        nonlocal state
        state, metrics = run(state, frozen, on_devices(batch, 1, mesh))
        jax.block_until_ready(metrics)

    return step


def peft(dtype, remat):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from jaxtune.weights.packaged import smollm2

    path = smollm2()
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=getattr(torch, dtype))
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    if remat == "full":
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable()
    update = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-4)
    ids = torch.as_tensor(tokens()[:, :-1]).long()

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        update.zero_grad()

    return step


class Side:
    """One side's process."""

    def __init__(self, name, dtype):
        command = [sys.executable, __file__, "--worker", name, "--dtype", dtype]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name, self.dtype, self.seconds, self.peak = name, dtype, [], None

    def line(self):
        """The next line of its output; None where it takes longer than the limit."""
        ready, _, _ = select.select([self.process.stdout], [], [], LIMIT)
        text = self.process.stdout.readline() if ready else None
        if text == "":
            sys.exit(f"{self.name} {self.dtype} ended early")
        return text

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self.seconds.append(float(self.line()))

    def close(self):
        self.process.stdin.close()
        self.peak = int(self.line())
        self.process.wait()


def measure(dtype, steps):
    """Both sides of a dtype; a side that does not get through its warm-up in time has no seconds."""
    sides = []
    for name in ("peft", "jaxtune"):
        side = Side(name, dtype)
        if side.line() is None:
            side.process.kill()
            print(f"{name} {dtype}: warm-up not done in {LIMIT} s", file=sys.stderr)
        sides.append(side)
    alive = [side for side in sides if side.process.poll() is None]
    for number in range(steps):
        for side in alive if number % 2 else reversed(alive):
            time.sleep(PAUSE)
            side.step()
    for side in alive:
        side.close()
        print(side.name, dtype, side.seconds, side.peak, file=sys.stderr)
    return sides


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", choices=("jaxtune", "peft"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat")
    options = parser.parse_args()
    if options.worker:
        serve({"jaxtune": jaxtune, "peft": peft}[options.worker](options.dtype, options.remat))
        return
    text = table([measure(dtype, options.steps) for dtype in options.dtypes.split(",")])
    print(text)
    if options.record:
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write(heading() + text)


def table(pairs):
    lines = ["| | tok/s, median (range) | peak memory, GB |", "|---|---|---|"]
    for peer, ours in pairs:
        for side in (peer, ours):
            name = f"{'transformers + PEFT' if side is peer else 'jaxtune'}, {side.dtype}"
            if not side.seconds:
                lines.append(f"| {name} | warm-up not done in {LIMIT} s | |")
                continue
            rates = [ROWS * LENGTH / second for second in side.seconds]
            peak = f"{side.peak / 1e9:.2f}"
            lines.append(f"| {name} | {statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) | {peak} |")
        if peer.seconds and ours.seconds:
            ratios = sorted(p / o for p, o in zip(peer.seconds, ours.seconds, strict=True))
            middle, low, high = statistics.median(ratios), ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]
            lines.append(
                f"| **ratio, {ours.dtype}** | **{middle:.2f}x** ({low:.2f} to {high:.2f}) | **{ours.peak / peer.peak:.2f}x** |"
            )
    timed = [[pair[side] for pair in pairs if pair[side].seconds] for side in (0, 1)]
    if all(timed):
        peer, ours = (min(side, key=lambda one: statistics.median(one.seconds)) for side in timed)
        ratio = statistics.median(peer.seconds) / statistics.median(ours.seconds)
        lines.append(f"| **ratio, fastest dtype of each ({peer.dtype}, {ours.dtype})** | **{ratio:.2f}x** | |")
    return "\n".join(lines) + "\n"


def heading():
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch", "transformers", "peft")
    )
    simd = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {flag} " in Path("/proc/cpuinfo").read_text()]
    command = " ".join([".venv/bin/python scripts/bench/lora_step.py", *sys.argv[1:]])
    return f"\n## {datetime.date.today()}: `{command}`\n{platform.machine()}, {' '.join(simd)}, Python {platform.python_version()}, {versions}\n\n"


if __name__ == "__main__":
    main()
