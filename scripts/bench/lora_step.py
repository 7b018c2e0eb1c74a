#!/usr/bin/env python
"""Speed and memory of one LoRA step, jaxtune beside transformers + PEFT, in turns on the same machine.

    .venv/bin/python scripts/bench/lora_step.py [--rounds 2] [--steps 4] [--dtypes float32,bfloat16] [--record]

The model is SmolLM2-135M (packaged), LoRA r=16 on all linear layers of the blocks, AdamW, a batch of 4 x 256 random tokens, every token
supervised. Each measurement is a process of its own: two steps to warm up, then `--steps` timed ones; peak memory is the process's.
`--record` appends the table to RESULTS.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROWS, LENGTH, RANK, ALPHA = 4, 256, 16, 32.0
WARM_UP = 2  # the first step compiles, the second may do so again for its own results' layout
LIMIT = 240  # seconds for one measurement; a dtype that the processor emulates may need far longer


def tokens():
    import numpy as np

    return np.random.default_rng(0).integers(0, 49152, (ROWS, LENGTH + 1)).astype(np.int32)


def timed(step, steps):
    for _ in range(WARM_UP):
        step()
    found = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        found.append(time.perf_counter() - began)
    return found


def jaxtune(dtype, steps, remat):
    import jax
    import numpy as np

    from jaxtune.adapters.inject import inject, split_trainable
    from jaxtune.adapters.lora import LoRAConfig
    from jaxtune.config.schema import OptimizerSection
    from jaxtune.core.mesh import make_mesh
    from jaxtune.data.loader import on_devices
    from jaxtune.objectives.sft import Batch, sft
    from jaxtune.train.optim import optimizer
    from jaxtune.train.setup import AUTO_REMAT
    from jaxtune.train.step import init_state, train_step
    from jaxtune.weights.load import load_model
    from jaxtune.weights.packaged import smollm2
    from jaxtune.weights.source import resolve

    mesh = make_mesh()
    model = load_model(resolve(str(smollm2())), mesh, dtype=dtype, compute=dtype)
    inject(model, "all-linear", LoRAConfig(RANK, ALPHA), 0, mesh)
    graph, trainable, frozen = split_trainable(model)
    del model
    update = optimizer(OptimizerSection(), 1000)
    run = train_step(graph, sft, update, remat or AUTO_REMAT, dropout=False)
    ids, ones = tokens(), np.ones((ROWS, LENGTH), np.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, np.cumsum(ones, axis=1, dtype=np.int32) - 1)
    state = init_state(trainable, update, 0)

    def step():
        nonlocal state
        state, metrics = run(state, frozen, on_devices(batch, 1, mesh))
        jax.block_until_ready(metrics)

    return timed(step, steps)


def peft(dtype, steps, remat):
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

    return timed(step, steps)


def worker(options):
    seconds = {"jaxtune": jaxtune, "peft": peft}[options.worker](options.dtype, options.steps, options.remat)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "peak": peak}))


def measure(side, dtype, steps):
    command = [sys.executable, __file__, "--worker", side, "--dtype", dtype, "--steps", str(steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--worker", choices=("jaxtune", "peft"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat")
    options = parser.parse_args()
    if options.worker:
        return worker(options)
    found = {}
    for number in range(options.rounds):
        for dtype in options.dtypes.split(","):
            for side in ("peft", "jaxtune"):
                if number and found.get((side, dtype)) == []:
                    continue  # it ran out of time once
                result = measure(side, dtype, options.steps)
                found.setdefault((side, dtype), []).extend([result] if result else [])
                print(side, dtype, result or f"not done in {LIMIT} s", file=sys.stderr)
    text = table(found)
    print(text)
    if options.record:
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write(heading() + text + "\n")
    return None


def table(found):
    lines = ["| | tok/s, median (range) | peak memory, GB |", "|---|---|---|"]
    medians = {}
    for (side, dtype), results in found.items():
        name = f"{'transformers + PEFT' if side == 'peft' else 'jaxtune'}, {dtype}"
        if not results:
            lines.append(f"| {name} | one warm-up and the timed steps not done in {LIMIT} s | |")
            continue
        rates = [ROWS * LENGTH / second for result in results for second in result["seconds"]]
        medians[side, dtype] = statistics.median(rates), max(result["peak"] for result in results) / 1e9
        lines.append(
            f"| {name} | {medians[side, dtype][0]:.0f} ({min(rates):.0f} to {max(rates):.0f}) | {medians[side, dtype][1]:.2f} |"
        )
    if ("peft", "float32") in medians and ("jaxtune", "float32") in medians:
        (peer, peer_peak), (ours, our_peak) = medians["peft", "float32"], medians["jaxtune", "float32"]
        lines.append(f"| **ratio, float32** | **{ours / peer:.2f}x** | **{our_peak / peer_peak:.2f}x** |")
    best = {
        side: max((rate for (who, _), (rate, _) in medians.items() if who == side), default=None) for side in ("jaxtune", "peft")
    }
    if all(best.values()):
        lines.append(f"| **ratio, fastest dtype of each** | **{best['jaxtune'] / best['peft']:.2f}x** | |")
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
