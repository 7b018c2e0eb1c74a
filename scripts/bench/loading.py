"""Loading a model: memory and time of jaxtune and of transformers, beside reading its files; and
how much two processes read.

    python scripts/bench/loading.py [--parameters 3.2e9] [--record]

A random Llama in bfloat16, in shards, is written by jaxtune's own writer to a temporary folder (6.4
GB by default) that is removed afterwards. Every measurement is a process of its own, by turns;
anonymous memory is the peak of RssAnon, which leaves mapped files out.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "RESULTS.md"
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 3072,
    "intermediate_size": 8192, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 8192, "dtype": "bfloat16",
}  # fmt: skip


def make(directory: Path, parameters: float) -> int:
    """Write the model; its bytes."""
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from jaxtune.models.decoder import abstract_model
    from jaxtune.models.families.from_hf import from_hf
    from jaxtune.weights.formats.hf import write_weights
    from jaxtune.weights.mapping import leaf_mappings
    from jaxtune.weights.tensors import LazyTensor

    layers = max(1, round((parameters - 128256 * 3072) / (3072 * (3072 * 2 + 2 * 1024 + 3 * 8192))))
    raw = CONFIG | {"num_hidden_layers": layers}
    config, dtype = from_hf(raw, "config.json"), jnp.dtype(jnp.bfloat16)
    bits = np.random.default_rng(0).integers(0, 2**16, 1 << 20, dtype=np.uint16) & 0xBFFF

    def tensor(shape: tuple[int, ...]) -> LazyTensor:
        def read(index: tuple[slice, ...]) -> np.ndarray:
            size = int(np.prod([len(range(n)[part]) for n, part in zip(shape, index, strict=True)]))
            return (
                np.resize(bits, size)
                .view(dtype)
                .reshape([len(range(n)[part]) for n, part in zip(shape, index, strict=True)])
            )

        return LazyTensor(shape, dtype, read)

    table = leaf_mappings(nnx.split(abstract_model(config, dtype, dtype))[1], config)
    write_weights(
        directory, {name: tensor(row.shape) for row in table for name in row.names}, 2_000_000_000
    )
    (directory / "config.json").write_text(json.dumps(raw))
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


class Peak(threading.Thread):
    """The largest RssAnon of this process while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes, self.bytes, self.running = anonymous(), 0, True
        self.start()

    def run(self) -> None:
        while self.running:
            self.bytes = max(self.bytes, anonymous())
            time.sleep(0.005)


def anonymous() -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.split("RssAnon:")[1].split()[0]) * 1024


def child(task: str, directory: str, rank: int, port: int) -> None:
    """One measurement, printed as JSON."""
    found: dict = {}
    if task == "read":
        kept, began = [], time.monotonic()
        for path in sorted(Path(directory).glob("*.safetensors")):
            kept.append(path.read_bytes())
        found = {"seconds": time.monotonic() - began}
    elif task == "scan":
        began = time.monotonic()
        for path in sorted(Path(directory).glob("*.safetensors")):
            with path.open("rb", buffering=0) as file:
                buffer = bytearray(1 << 24)
                while file.readinto(buffer):
                    pass
        found = {"seconds": time.monotonic() - began}
    elif task == "transformers":
        import torch
        from transformers import AutoModelForCausalLM

        peak, began = Peak(), time.monotonic()
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
        total = sum(
            float(value.detach().view(torch.int16).sum()) for value in model.parameters()
        )  # lazily mapped weights are read
        found = {
            "seconds": time.monotonic() - began,
            "anonymous": peak.bytes - peak.start_bytes,
            "sum": total,
        }
    else:
        found = _ours(task, directory, rank, port)
    print(json.dumps(found))


def _ours(task: str, directory: str, rank: int, port: int) -> dict:
    import jax

    if task == "two":
        jax.distributed.initialize(f"localhost:{port}", 2, rank)
    from jaxtune.core.mesh import make_mesh
    from jaxtune.weights import safetensors_files
    from jaxtune.weights.load import load_model
    from jaxtune.weights.source import resolve
    from jaxtune.weights.tensors import LazyTensor

    read = [0]
    real = safetensors_files._lazy

    def counted(*arguments: object) -> LazyTensor:
        tensor = real(*arguments)

        def reader(index: tuple) -> object:
            out = tensor.read(index)
            read[0] += out.nbytes
            return out

        return LazyTensor(tensor.shape, tensor.dtype, reader)

    safetensors_files._lazy = counted
    mesh = make_mesh(1, 2, 1) if task == "two" else make_mesh(devices=jax.devices()[:1])
    peak, began = Peak(), time.monotonic()
    model = load_model(resolve(directory), mesh)
    jax.block_until_ready(jax.tree.leaves(model))
    return {
        "seconds": time.monotonic() - began,
        "anonymous": peak.bytes - peak.start_bytes,
        "read": read[0],
    }


def measure(task: str, directory: Path, processes: int = 1) -> list[dict]:
    port = 20000 + os.getpid() % 20000
    started = [
        subprocess.Popen(
            [
                sys.executable,
                __file__,
                "--child",
                task,
                "--directory",
                str(directory),
                "--rank",
                str(rank),
                "--port",
                str(port),
            ],
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
        )
        for rank in range(processes)
    ]
    return [json.loads(process.communicate()[0].splitlines()[-1]) for process in started]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parameters", type=float, default=3.2e9, help="about how many")
    parser.add_argument("--rounds", type=int, default=2, help="times each side is measured")
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    for name, kind in (("--child", str), ("--directory", str), ("--rank", int), ("--port", int)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.directory, options.rank, options.port)
        return
    directory = Path(tempfile.mkdtemp(prefix="loading-"))
    try:
        size = make(directory, options.parameters)
        measure("scan", directory)  # so that all sides find the files in the page cache alike
        rows = [
            {task: measure(task, directory)[0] for task in ("scan", "read", "ours", "transformers")}
            for _ in range(options.rounds)
        ]
        two = measure("two", directory, 2)
    finally:
        shutil.rmtree(directory)
    best = {
        task: min((row[task] for row in rows), key=lambda item: item["seconds"]) for task in rows[0]
    }
    lines = [
        f"Loading {size / 1e9:.2f} GB of bfloat16 in shards, files in the page cache, "
        f"{os.cpu_count()} CPU cores, best of {options.rounds}; "
        f"`python scripts/bench/loading.py --parameters {options.parameters:g}`:",
        "",
        "| | seconds | of reading | peak anonymous memory | of the model |",
        "|---|---|---|---|---|",
        f"| reading the files into memory | {best['read']['seconds']:.1f} | 1.00x | | |",
        f"| reading them through one small buffer | {best['scan']['seconds']:.1f} | "
        f"{best['scan']['seconds'] / best['read']['seconds']:.2f}x | | |",
    ]
    for task, name in (("ours", "jaxtune"), ("transformers", "transformers")):
        item = best[task]
        lines.append(
            f"| {name} | {item['seconds']:.1f} | {item['seconds'] / best['read']['seconds']:.2f}x "
            f"| {item['anonymous'] / 1e9:.2f} GB "
            f"| {item['anonymous'] / size:.2f}x |"
        )
    together = sum(item["read"] for item in two)
    lines += [
        "",
        f"Two processes of a mesh of fsdp 2 read {together / 1e9:.2f} GB together, "
        f"{together / size:.3f}x of the files.",
    ]
    print("\n".join(lines))
    if options.record:
        with RESULTS.open("a") as file:
            file.write("\n## Loading\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
