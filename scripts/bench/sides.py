#!/usr/bin/env python
"""The sides of a comparison: each is a process of its own that makes its steps when it is its turn,
so that what else the machine does falls on all alike. `turns.py` starts and asks them; run as a
program, this file is one of them.

The model is that of `models.py`, LoRA r=16 on all linear layers of the blocks, AdamW, clipping at
1. Of `random` data a batch is 4 x 256 tokens (BENCH_ROWS x BENCH_LENGTH), every one supervised; of
`packed` each row is several texts, which do not see each other; of `news` it is what the quickstart
trains on: peers pad eight rows a step, as their users do, jaxtune packs rows of 512. With
BENCH_CHECKPOINTING the peers compute their layers' activations again in the backward pass;
BENCH_COMPILER is the backend of torch.compile.
"""

import argparse
import json
import os
import resource
import sys
import time

import models
from batches import PACKED_LENGTH, news, positions_of, random_ids, texts_of
from models import ALPHA, RANK

ROWS, LENGTH = int(os.environ.get("BENCH_ROWS", 4)), int(os.environ.get("BENCH_LENGTH", 256))
NEWS_ROWS, PACKED_ROWS = 8, 2
WARM_UP = 2  # the first step compiles, the second may do so again for its own results' layout


class Jaxtune:
    """The step of `jaxtune train`, with the state laid out as there."""

    def __init__(self, dtype, data, remat="auto"):
        import jax

        from jaxtune.core.hardware import release_freed_memory
        from jaxtune.core.mesh import make_mesh

        keys = {
            "int8": ["model.dtype=int8", "model.products=int8"],
            "nf4": ["model.dtype=nf4"],
        }.get(dtype, [f"model.dtype={dtype}", f"model.compute_dtype={dtype}"])
        lora = [f"adapter.rank={RANK}", f"adapter.alpha={ALPHA}", f"train.remat={remat}"]
        self.mesh, self.keys = make_mesh(), [*keys, *lora]
        self.ready, self.give_back = jax.block_until_ready, release_freed_memory
        self.model = models.trained(self.config(ROWS, LENGTH), self.mesh)
        if data == "news":
            self.assemble(PACKED_ROWS, PACKED_LENGTH)
            self.batches = self.news_batches()
        else:
            self.use(ROWS, LENGTH, data == "packed")

    def config(self, rows, length):
        from jaxtune.config.load import load_config

        shape = [f"data.max_length={length}", f"train.batch_size={rows}"]
        return load_config(overrides=[*self.keys, *shape])

    def assemble(self, rows, length):
        import jax
        import jax.numpy as jnp

        from jaxtune.training.setup import assemble_step
        from jaxtune.training.state import init_state
        from jaxtune.training.step import train_step

        config = self.config(rows, length)
        spec, trainable, self.frozen, update = assemble_step(config, self.model, 1000)
        self.run, self.programs, self.remat = train_step(spec, update), {}, spec.remat
        self.state = init_state(jax.tree.map(jnp.copy, trainable), update, 0)

    def use(self, rows, length, packed):
        """Make steps of one batch of random tokens from now on."""
        import numpy as np

        from jaxtune.data.batch import Batch
        from jaxtune.data.loader import on_devices

        self.assemble(rows, length)
        ids, texts = random_ids(rows, length), texts_of(rows, length, packed)
        weights = np.diff(texts, axis=1, append=texts[:, -1:]) == 0
        batch = Batch(
            ids[:, :-1], ids[:, 1:], weights.astype(np.float32), texts, positions_of(texts)
        )
        self.batches = [(on_devices(batch, 1, self.mesh), rows * length)]

    def news_batches(self):
        from jaxtune.data.loader import BatchSchedule, on_devices
        from jaxtune.data.packing import Layout

        layout = Layout(PACKED_ROWS, PACKED_LENGTH, True, True, 0)
        schedule = BatchSchedule(news()[0], layout, 1)
        return [
            (on_devices(schedule.batch(k), 1, self.mesh), schedule.tokens(k))
            for k in range(len(schedule) - 1)
        ]

    def __call__(self, number):
        batch, tokens = self.batches[number % len(self.batches)]
        shape = batch.input_ids.shape
        if shape not in self.programs:  # as the loop does
            self.programs[shape] = self.run.lower(self.state, self.frozen, batch).compile()
            self.give_back()
        self.state, metrics = self.programs[shape](self.state, self.frozen, batch)
        self.ready(metrics)
        self.loss = metrics.loss
        return tokens


class Peft:
    """transformers + PEFT, its loss its own, attention by PyTorch's kernels."""

    kernels = None

    def __init__(self, dtype, data):
        import torch
        from peft import LoraConfig, get_peft_model

        model, self.device = models.transformers_model(dtype, attn_implementation="sdpa")
        if self.kernels == "liger":
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        lora = LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if "BENCH_CHECKPOINTING" in os.environ:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        self.torch, self.model = torch, get_peft_model(model, lora).train()
        if self.kernels == "compile":
            backend = os.environ.get("BENCH_COMPILER", "inductor")
            self.model = torch.compile(self.model, backend=backend)
        self.mixed = (
            self.device == "cuda" and dtype == "bfloat16"
        )  # as transformers' Trainer with bf16=True
        self.update = torch.optim.AdamW(
            [leaf for leaf in self.model.parameters() if leaf.requires_grad], lr=2e-4
        )
        if data == "news":
            rows = news()[1]
            groups = [
                rows[k : k + NEWS_ROWS] for k in range(0, len(rows) - NEWS_ROWS + 1, NEWS_ROWS)
            ]
            self.batches = [
                (self.padded(group), sum(len(ids) for ids, _ in group)) for group in groups
            ]
        else:
            self.use(ROWS, LENGTH, data == "packed")

    def use(self, rows, length, packed):
        """Make steps of one batch of random tokens from now on. Positions that begin again are
        how transformers is told of packed texts.
        """
        if self.device == "cuda":
            self.torch.cuda.empty_cache()
            self.torch.cuda.reset_peak_memory_stats()
        ids = self.torch.as_tensor(random_ids(rows, length)[:, :-1]).long().to(self.device)
        batch = {"input_ids": ids, "labels": ids}
        if packed:
            places = self.torch.as_tensor(positions_of(texts_of(rows, length, True))).long()
            places = places.to(self.device)
            labels = ids.masked_fill(places == 0, -100)
            batch |= {"position_ids": places, "labels": labels, "use_cache": False}
        self.batches = [(batch, rows * length)]

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
        self.loss = loss.detach()
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
        self.ids = jnp.asarray(random_ids(ROWS, LENGTH)[:, :-1])
        self.ready = jax.block_until_ready

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

        assert data == "random"
        kind, tokens = jnp.dtype(dtype), ROWS * LENGTH
        wide = (
            jnp.float32 if jax.default_backend() == "cpu" else None
        )  # the form of a product that is fastest there

        def forward(x, w):
            return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=wide)

        def backward(y, w):
            return jax.lax.dot_general(y, w, (((1,), (0,)), ((), ())), preferred_element_type=wide)

        self.work, self.waits = [], wide is not None  # on a GPU the host would be what is measured
        for (out, width), count in models.products().items():
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
    """Greedy generation after prompts of random tokens; a step counts the new tokens."""

    def __init__(self, name, dtype):
        self.ours = name == "jaxtune"
        if self.ours:
            from jaxtune.core.mesh import make_mesh

            self.model = models.loaded(make_mesh(), dtype)
        else:
            self.model, self.device = models.transformers_model(dtype)

    def use(self, rows, read=32, written=64):
        """Answer `rows` prompts of `read` tokens with `written` each from now on."""
        prompts, self.tokens = random_ids(rows, read)[:, :-1], rows * written
        if self.ours:
            from jaxtune.inference.engine import Engine

            engine, lists = Engine(self.model, [], batch=rows), prompts.tolist()
            self.step = lambda: engine.generate(lists, written)
        else:
            import torch

            ids = torch.as_tensor(prompts).long().to(self.device)
            options = {"min_new_tokens": written, "max_new_tokens": written, "do_sample": False}
            seen = torch.ones_like(ids)
            self.step = lambda: self.model.generate(input_ids=ids, attention_mask=seen, **options)

    def __call__(self, number):
        self.step()
        return self.tokens


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
        worker = Tokens(options.name, "float32")
        worker.use(int(options.dtype))
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
