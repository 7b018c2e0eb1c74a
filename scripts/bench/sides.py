#!/usr/bin/env python
"""The sides of a comparison: each is a process of its own that makes its steps when it is its turn,
so that what else the machine does falls on all alike. `turns.py` starts and asks them; run as a
program, this file is one of them.

The model is SmolLM2-135M (packaged) or the directory in BENCH_MODEL, LoRA r=16 on all linear layers
of the blocks, AdamW, clipping at 1. Of `random` data a batch is 4 x 256 tokens (BENCH_ROWS x
BENCH_LENGTH), every one supervised; of `news` it is what the quickstart trains on: peers pad eight
rows a step, as their users do, jaxtune packs rows of 512.
"""

import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

ROWS, LENGTH = int(os.environ.get("BENCH_ROWS", 4)), int(os.environ.get("BENCH_LENGTH", 256))
RANK, ALPHA = 16, 32.0
NEWS_ROWS, PACKED_ROWS, PACKED_LENGTH = 8, 2, 512
WARM_UP = 2  # the first step compiles, the second may do so again for its own results' layout


def random_ids(rows=ROWS, length=LENGTH):
    import numpy as np

    return np.random.default_rng(0).integers(0, 49152, (rows, length + 1)).astype(np.int32)


def model_path():
    from jaxtune.weights.bundled import smollm2

    return Path(os.environ.get("BENCH_MODEL") or smollm2())


def torch_model(dtype, **options):
    import torch
    from transformers import AutoModelForCausalLM

    path = model_path()
    if path.is_file():
        path, options = path.parent, options | {"gguf_file": path.name}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options)
    return model.to(device), device


def news():
    """The quickstart's rows: `(ids, supervised)` each."""
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import prepare
    from jaxtune.weights.bundled import smollm2
    from jaxtune.weights.source import resolve
    from jaxtune.workflows.news import write_news

    with tempfile.TemporaryDirectory() as folder:
        trained, _ = write_news(Path(folder))
        found = prepare(
            DataSection(train=str(trained), max_length=PACKED_LENGTH),
            resolve(str(smollm2())).tokenizer(),
        )
        return found, [(list(item.ids), list(item.supervised)) for item in found.items[:]]


class Jaxtune:
    """The step of `jaxtune train`, with the state laid out as there."""

    def __init__(self, dtype, data, remat="auto"):
        import jax
        import numpy as np

        from jaxtune.config.load import load_config
        from jaxtune.core.hardware import release_freed_memory
        from jaxtune.core.mesh import make_mesh
        from jaxtune.data.batch import Batch
        from jaxtune.data.loader import BatchSchedule, on_devices
        from jaxtune.data.packing import Layout
        from jaxtune.training.methods import trained_model
        from jaxtune.training.setup import assemble_step
        from jaxtune.training.state import init_state
        from jaxtune.training.step import train_step
        from jaxtune.weights.source import resolve

        self.mesh, source = make_mesh(), resolve(str(model_path()))
        plain = [f"model.dtype={dtype}", f"model.compute_dtype={dtype}"]
        keys = {
            "int8": ["model.dtype=int8", "model.products=int8"],
            "nf4": ["model.dtype=nf4"],
        }.get(dtype, plain)
        shape = [f"data.max_length={LENGTH}", f"train.batch_size={ROWS}"]
        config = load_config(
            overrides=[
                *keys,
                *shape,
                f"adapter.rank={RANK}",
                f"adapter.alpha={ALPHA}",
                f"train.remat={remat}",
            ]
        )
        spec, trainable, self.frozen, update = assemble_step(
            config, trained_model(config, source, None, self.mesh), 1000
        )
        self.run = train_step(spec, update)
        self.state = init_state(trainable, update, 0)
        if data == "random":
            ids, ones = random_ids(), np.ones((ROWS, LENGTH), np.int32)
            batch = Batch(
                ids[:, :-1],
                ids[:, 1:],
                ones.astype(np.float32),
                ones,
                np.cumsum(ones, axis=1, dtype=np.int32) - 1,
            )
            self.batches = [(on_devices(batch, 1, self.mesh), ROWS * LENGTH)]
        else:
            plan = BatchSchedule(news()[0], Layout(PACKED_ROWS, PACKED_LENGTH, True, True, 0), 1)
            self.batches = [
                (on_devices(plan.batch(k), 1, self.mesh), plan.tokens(k))
                for k in range(len(plan) - 1)
            ]
        self.ready, self.give_back = jax.block_until_ready, release_freed_memory
        self.programs = {}

    def __call__(self, number):
        batch, tokens = self.batches[number % len(self.batches)]
        shape = batch.input_ids.shape
        if shape not in self.programs:  # as the loop does
            self.programs[shape] = self.run.lower(self.state, self.frozen, batch).compile()
            self.give_back()
        self.state, metrics = self.programs[shape](self.state, self.frozen, batch)
        self.ready(metrics)
        return tokens


class Peft:
    """transformers + PEFT, its loss its own, attention by PyTorch's kernels."""

    kernels = None

    def __init__(self, dtype, data):
        import torch
        from peft import LoraConfig, get_peft_model

        model, self.device = torch_model(dtype, attn_implementation="sdpa")
        if self.kernels == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        self.torch, self.model = torch, get_peft_model(model, lora)
        if self.kernels == "compile":
            self.model = torch.compile(self.model)
        self.mixed = (
            self.device == "cuda" and dtype == "bfloat16"
        )  # as transformers' Trainer with bf16=True
        self.update = torch.optim.AdamW(
            [leaf for leaf in self.model.parameters() if leaf.requires_grad], lr=2e-4
        )
        if data == "random":
            ids = torch.as_tensor(random_ids()[:, :-1]).long().to(self.device)
            self.batches = [({"input_ids": ids, "labels": ids}, ROWS * LENGTH)]
        else:
            rows = news()[1]
            groups = [
                rows[k : k + NEWS_ROWS] for k in range(0, len(rows) - NEWS_ROWS + 1, NEWS_ROWS)
            ]
            self.batches = [
                (self.padded(group), sum(len(ids) for ids, _ in group)) for group in groups
            ]

    def padded(self, rows):
        longest = max(len(ids) for ids, _ in rows)
        whole = {"input_ids": 2, "labels": -100, "attention_mask": 0}
        found = {name: self.torch.full((len(rows), longest), fill) for name, fill in whole.items()}
        for number, (ids, supervised) in enumerate(rows):
            found["input_ids"][number, : len(ids)] = self.torch.as_tensor(ids)
            found["attention_mask"][number, : len(ids)] = 1
            kept = [
                token if wanted else -100 for token, wanted in zip(ids, supervised, strict=True)
            ]
            found["labels"][number, : len(ids)] = self.torch.as_tensor(kept)
        return found

    def __call__(self, number):
        batch, tokens = self.batches[number % len(self.batches)]
        with self.torch.autocast("cuda", dtype=self.torch.bfloat16, enabled=self.mixed):
            loss = self.model(**batch).loss
        loss.backward()
        self.torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.update.step()
        self.update.zero_grad()
        if self.device == "cuda":
            self.torch.cuda.synchronize()
        return tokens


class Compiled(Peft):
    """The same through torch.compile."""

    kernels = "compile"


class Liger(Peft):
    """The same with Liger's kernels."""

    kernels = "liger"


class Tunix:
    """google-tunix: its Llama of this shape with random weights, its loss and its trainer's
    step; an environment of its own runs it.
    """

    def __init__(self, dtype, data):
        import jax
        import jax.numpy as jnp
        import optax
        import qwix
        from flax import nnx
        from tunix.models.llama3 import model as llama3
        from tunix.sft import peft_trainer

        assert data == "random"
        config = llama3.ModelConfig(
            num_layers=30, vocab_size=49152, embed_dim=576, hidden_dim=1536, num_heads=9,
            head_dim=64, num_kv_heads=3,
            rope_theta=100_000, norm_eps=1e-5, weight_tying=True,
        )  # fmt: skip
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
        module = ".*q_proj|.*k_proj|.*v_proj|.*o_proj|.*gate_proj|.*up_proj|.*down_proj"
        provider = qwix.LoraProvider(module_path=module, rank=RANK, alpha=ALPHA)
        model = qwix.apply_lora_to_model(model, provider, **model.get_model_input())
        update = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(2e-4))
        trainer = peft_trainer.PeftTrainer(
            model, update, peft_trainer.TrainingConfig(eval_every_n_steps=1000, max_steps=1000)
        )

        def inputs(tokens):
            size = tokens.shape[1]
            places = jnp.broadcast_to(jnp.arange(size), tokens.shape)
            seen = jnp.broadcast_to(
                jnp.tril(jnp.ones((size, size), bool)), (tokens.shape[0], size, size)
            )
            return {
                "input_tokens": tokens,
                "input_mask": jnp.ones_like(tokens),
                "positions": places,
                "attention_mask": seen,
            }

        trainer = trainer.with_gen_model_input_fn(inputs)
        self.step, _ = trainer.jit_train_and_eval_step()
        self.ids, self.ready = jnp.asarray(random_ids()[:, :-1]), jax.block_until_ready

    def __call__(self, number):
        self.ready(self.step(self.ids))
        return ROWS * LENGTH


class Floor:
    """The products with frozen matrices that a step cannot do without, alone: 4 FLOP a parameter
    and token.
    """

    def __init__(self, dtype, data):
        import jax
        import jax.numpy as jnp
        from transformers import AutoConfig

        assert data == "random"
        kind, tokens = jnp.dtype(dtype), ROWS * LENGTH
        raw = AutoConfig.from_pretrained(model_path()) if model_path().is_dir() else None
        width, mlp, layers, vocab = (576, 1536, 30, 49152) if raw is None else (
            raw.hidden_size, raw.intermediate_size, raw.num_hidden_layers, raw.vocab_size
        )  # fmt: skip
        heads = 192 if raw is None else raw.num_key_value_heads * raw.head_dim
        shapes = [
            (width, width, 2 * layers), (heads, width, 2 * layers), (mlp, width, 2 * layers),
            (width, mlp, layers), (vocab, width, 1)
        ]  # fmt: skip
        wide = (
            jnp.float32 if jax.default_backend() == "cpu" else None
        )  # the form of a product that is fastest there

        def forward(x, w):
            return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=wide)

        def backward(y, w):
            return jax.lax.dot_general(y, w, (((1,), (0,)), ((), ())), preferred_element_type=wide)

        self.work, self.waits = [], wide is not None  # on a GPU the host would be what is measured
        for out, width, count in shapes:
            x, y, w = (
                jax.random.normal(jax.random.key(0), size, kind)
                for size in ((tokens, width), (tokens, out), (out, width))
            )
            self.work += [(jax.jit(forward), (x, w), count), (jax.jit(backward), (y, w), count)]

    def __call__(self, number):
        for run, arrays, count in self.work:
            for _ in range(count):
                out = run(*arrays)
                if self.waits:
                    out.block_until_ready()
            out.block_until_ready()
        return ROWS * LENGTH


class Tokens:
    """Greedy generation, 64 tokens after each of `rows` prompts of 32 tokens; a step counts the
    new tokens.
    """

    def __init__(self, name, rows):
        self.rows, prompts = rows, random_ids(rows, 32)[:, :-1]
        if name == "jaxtune":
            from jaxtune.core.mesh import make_mesh
            from jaxtune.inference.engine import Engine
            from jaxtune.weights.load import load_model
            from jaxtune.weights.source import resolve

            engine = Engine(
                load_model(resolve(str(model_path())), make_mesh(), compute="float32"),
                [],
                batch=rows,
            )
            self.step = lambda: engine.generate([list(map(int, row)) for row in prompts], 64)
        else:
            import torch

            model, device = torch_model("float32")
            ids = torch.as_tensor(prompts).long().to(device)
            self.step = lambda: model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
            )

    def __call__(self, number):
        self.step()
        return self.rows * 64


WORKERS = {
    "jaxtune": Jaxtune,
    "peft": Peft,
    "peft-compile": Compiled,
    "peft-liger": Liger,
    "tunix": Tunix,
    "floor": Floor,
}


def peak_bytes():
    """Of this process: the accelerator's memory where it has used one, else the machine's."""
    torch = sys.modules.get("torch")  # which transformers may bring along
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if "jax" in sys.modules:
        stats = sys.modules["jax"].local_devices()[0].memory_stats() or {}
        if stats.get("peak_bytes_in_use"):
            return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=WORKERS)
    parser.add_argument("dtype")
    parser.add_argument("data", choices=("random", "news", "generate"))
    options = parser.parse_args()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if options.data == "generate":
        worker = Tokens(options.name, int(options.dtype))
    else:
        worker = WORKERS[options.name](options.dtype, options.data)
    for number in range(WARM_UP):
        worker(number)
    print("ready", file=out, flush=True)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        tokens = worker(number)
        print(json.dumps([time.perf_counter() - began, int(tokens)]), file=out, flush=True)
    print(peak_bytes(), file=out, flush=True)


if __name__ == "__main__":
    main()
