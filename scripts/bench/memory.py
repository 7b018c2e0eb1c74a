#!/usr/bin/env python
"""Memory of one training step by method, compiled for a TPU v5e chip that is not there.

    .venv/bin/pip install -c scripts/lock.txt -e '.[plan]'
    .venv/bin/python scripts/bench/memory.py [--models 1B,8B] [--micro 1] [--record]

The step is the one that `jaxtune train` runs, lowered from shapes alone: Llama-3.2-1B's and Llama-3.1-8B's architectures, bfloat16 base,
rank 16 on all linear maps, 4 rows of 2,048 tokens, whole layers recomputed. `sum` is what a chip holds at once by the safe reading:
arguments + results - what they replace + temporaries. Each case is compiled in a process of its own, at the compiler's low effort.
`--record` appends the table to RESULTS.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

GIB, CHIP, ROWS, LENGTH = 2**30, 15.75, 4, 2048
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "max_position_embeddings": 131072, "torch_dtype": "bfloat16", "num_key_value_heads": 8, "num_attention_heads": 32,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}  # fmt: skip
MODELS = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "tie_word_embeddings": False},
}  # fmt: skip
METHODS = {
    "full": ["adapter.method=none"],
    "last:4": ["adapter.method=none", "trainable=last:4"],
    "LoRA": [],
    "DoRA": ["adapter.method=dora"],
    "QLoRA, int8": ["model.dtype=int8"],
    "QLoRA, nf4": ["model.dtype=nf4"],
}
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "JAX_EXEC_TIME_OPTIMIZATION_EFFORT": "-1.0",
}  # fmt: skip


def shapes(config, raw, mesh):
    """The model of a configuration with shapes for numbers, as `load_model` and `inject` would make it."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from jaxtune.adapters.inject import inject
    from jaxtune.adapters.selection import Selection
    from jaxtune.models.decoder import abstract_model
    from jaxtune.models.families import from_hf
    from jaxtune.train.methods import _lora, selected
    from jaxtune.weights.load import _block_matrices
    from jaxtune.weights.quantise import to_int8, to_nf4
    from jaxtune.weights.rows import rows

    architecture = from_hf(raw, "config.json")
    chosen = Selection(selected(config), architecture.num_layers)
    plain = nnx.split(abstract_model(architecture, jnp.bfloat16, jnp.bfloat16))[1]
    names = [name for row in rows(plain, architecture) for name in row.names]
    architecture = replace(architecture, cuts=chosen.cuts(names))
    graph, state = nnx.split(abstract_model(architecture, jnp.bfloat16, jnp.bfloat16))
    matrices, leaves = _block_matrices(graph, state), dict(nnx.to_flat_state(state))
    rounding = {"int8": to_int8, "nf4": to_nf4}.get(config.model.dtype)
    for row in rows(state, architecture):
        leaf = leaves[row.path]
        if chosen.trains(row.names[0]):
            value = jax.ShapeDtypeStruct((*row.stack, *row.shape), jnp.float32)
            leaves[row.path] = nnx.Param(value, axes=leaf.get_metadata()["axes"], trained=True)
        elif rounding and row.path in matrices:
            one = jax.eval_shape(rounding, jax.ShapeDtypeStruct(row.shape, jnp.float32))
            value = jax.tree.map(lambda part, stack=row.stack: jax.ShapeDtypeStruct((*stack, *part.shape), part.dtype), one)
            leaves[row.path] = nnx.Param(value, axes=leaf.get_metadata()["axes"])
    state = nnx.from_flat_state(leaves)
    if config.adapter.method == "none":
        return nnx.merge(graph, state)
    made = []

    def adapted(state):
        model = nnx.merge(graph, state)
        inject(model, _lora(config.adapter, None, model, None), 0, mesh)
        made.append(nnx.split(model)[0])
        return nnx.split(model)[1]

    found = jax.eval_shape(adapted, state)
    return nnx.merge(made[0], found)


def measure(model, method, micro):
    """Bytes of the compiled step on one chip."""
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from jaxtune.config.loading import load_config
    from jaxtune.core.mesh import make_mesh
    from jaxtune.objectives.objective import Batch
    from jaxtune.train.setup import assembled
    from jaxtune.train.step import init_state, train_step

    options = {"chips_per_host_bounds": (1, 1, 1)}
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", **options).devices
    mesh = make_mesh(devices=list(devices))
    keys = [*METHODS[method], "adapter.rank=16", "train.remat=full", f"train.batch_size={ROWS}"]
    config = load_config(overrides=keys)
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere), tree)

    with jax.set_mesh(mesh):
        parts = assembled(config, shapes(config, LLAMA | MODELS[model], mesh), 1000)
        state = placed(jax.eval_shape(lambda leaves: init_state(leaves, parts.optimizer, 0), parts.trainable))
        cut = jax.ShapeDtypeStruct((ROWS // micro, micro, LENGTH), np.int32)
        batch = placed(Batch(cut, cut, jax.ShapeDtypeStruct(cut.shape, np.float32), cut, cut))
        lowered = (
            train_step(parts.computation, parts.optimizer)
            .trace(state, placed(parts.frozen), batch)
            .lower(lowering_platforms=("tpu",))
        )
        found = lowered.compile().memory_analysis()
    sizes = {name: getattr(found, f"{name}_size_in_bytes") for name in ("argument", "output", "alias", "temp")}
    sizes["frozen"] = sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(parts.frozen))
    return sizes | {"peak": found.peak_memory_in_bytes}


def case(model, method, micro):
    """The same in a process of its own; where it does not fit the GiB of temporaries that the compiler wanted."""
    command = [sys.executable, __file__, "--one", model, method, str(micro)]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    needed = re.search(r"RESOURCE_EXHAUSTED.*\((\d+\.\d+)G\) exceeds available HBM", done.stderr)
    if needed is None:
        sys.exit(done.stderr)
    return {"temporaries": needed[1]}


def table(models, micro):
    lines = [f"| model, method | base | arguments | temporaries | peak | sum | fits {CHIP} |", "|---|---|---|---|---|---|---|"]
    for model in models:
        for method in METHODS:
            found = case(model, method, micro)
            print(model, method, found, file=sys.stderr, flush=True)
            if "temporaries" in found:  # the compiler says no more than this
                lines.append(f"| {model}, {method} | | | {found['temporaries']} | | | no |")
                continue
            total = found["argument"] + found["output"] - found["alias"] + found["temp"]
            numbers = (found["frozen"], found["argument"], found["temp"], found["peak"], total)
            cells = " | ".join(f"{number / GIB:.2f}" for number in numbers)
            lines.append(
                f"| {model}, {method} | {cells} | {'yes' if total / GIB <= CHIP else 'by peak' if found['peak'] / GIB <= CHIP else 'no'} |"
            )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="1B,8B")
    parser.add_argument("--micro", type=int, default=ROWS, help="rows computed together (default: all 4)")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        model, method, micro = options.one
        print(json.dumps(measure(model, method, int(micro))))
        return
    text = table(options.models.split(","), options.micro)
    print(text)
    if options.record:
        command = f"python scripts/bench/memory.py --micro {options.micro}"
        heading = f"\n## Memory of a step by method\n\n`{command}`, v5e, GiB a chip, 4 x 2,048 tokens, {options.micro} rows at a time:\n\n"
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write(heading + text)


if __name__ == "__main__":
    main()
