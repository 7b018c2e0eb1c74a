#!/usr/bin/env python
"""What training the last four layers alone saves: time and temporary memory of a step, predicted
and measured.

    .venv/bin/python scripts/bench/last_layers.py [--steps 5] [--record]

SmolLM2-135M (packaged), float32, 4 x 256 random tokens, every token supervised, activations kept
(`remat=none`). Both sides take a step each by turns. The prediction counts 2 FLOP a parameter and
token forward, 2 for the gradient of an input, 2 for that of a weight; and for memory the
activations of the layers that have a backward pass, and gradients of what trains.
"""

import argparse
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from jaxtune.config.load import load_config
from jaxtune.core.mesh import make_mesh
from jaxtune.data.batch import Batch
from jaxtune.data.loader import on_devices
from jaxtune.training.methods import trained_model
from jaxtune.training.setup import assemble_step, count_parameters
from jaxtune.training.state import init_state
from jaxtune.training.step import train_step
from jaxtune.weights.bundled import smollm2
from jaxtune.weights.source import resolve

ROWS, LENGTH, LAST = 4, 256, 4


class Side:
    """A step that is compiled and run."""

    def __init__(self, trainable, mesh, batch):
        config = load_config(
            overrides=[
                "adapter.method=none",
                f"trainable={trainable}",
                "train.remat=none",
                "optimizer.learning_rate=1e-5",
            ]
        )
        model = trained_model(config, resolve(str(smollm2())), None, mesh)
        self.layers = model.config.num_layers
        spec, leaves, self.frozen, update = assemble_step(config, model, 1000)
        self.state, self.batch = init_state(leaves, update, 0), batch
        self.trains, self.rest = count_parameters(leaves), count_parameters(self.frozen.base)
        self.program = train_step(spec, update).lower(self.state, self.frozen, batch).compile()
        self.temporary, self.seconds = self.program.memory_analysis().temp_size_in_bytes, []

    def step(self):
        began = time.perf_counter()
        self.state, metrics = self.program(self.state, self.frozen, self.batch)
        jax.block_until_ready(metrics)
        self.seconds.append(time.perf_counter() - began)


def random_batch(mesh):
    """Return rows of random tokens, all supervised."""
    random = np.random.default_rng(0)
    ids = random.integers(0, 49152, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    positions = np.cumsum(ones, 1, dtype=np.int32) - 1
    batch = Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)
    return on_devices(batch, 1, mesh)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    mesh = make_mesh()
    batch = random_batch(mesh)
    whole, few = (Side(trainable, mesh, batch) for trainable in ("all", f"last:{LAST}"))
    for _ in range(options.steps + 1):
        whole.step(), few.step()
    blocks = few.trains / LAST * whole.layers
    head = whole.trains - blocks
    everything = 6 * (blocks + head)
    last = 2 * (blocks + head) + 2 * head + 4 * few.trains
    kept = whole.temporary - 4 * whole.trains
    predicted = kept * LAST / whole.layers + 4 * few.trains
    ratio = statistics.median(
        b / a for a, b in zip(whole.seconds[1:], few.seconds[1:], strict=True)
    )
    rows = {
        "seconds a step": (
            statistics.median(whole.seconds[1:]),
            statistics.median(few.seconds[1:]),
            ratio,
            last / everything,
        ),
        "temporaries, GB": (
            whole.temporary / 1e9,
            few.temporary / 1e9,
            few.temporary / whole.temporary,
            predicted / whole.temporary,
        ),
    }
    lines = [
        f"| | all weights | the last {LAST} of {whole.layers} layers | ratio | predicted |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {a:.2f} | {b:.2f} | **{c:.2f}x** | {d:.2f}x |"
        for name, (a, b, c, d) in rows.items()
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.record:
        command = f"python scripts/bench/last_layers.py --steps {options.steps}"
        heading = f"\n## The last layers alone\n\n`{command}`, 2 cores, float32:\n\n"
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write(heading + text)


if __name__ == "__main__":
    main()
