"""Gradients and whole training runs against transformers + PEFT."""

import json

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM

from jaxtune.adapters.inject import partition_trainable
from jaxtune.config.load import validated
from jaxtune.data.batch import Batch
from jaxtune.data.prepare import prepare
from jaxtune.models.names import names_of
from jaxtune.objectives.objective import DETERMINISTIC
from jaxtune.objectives.sft import sft
from jaxtune.tracking.metrics_log import read_metrics
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter
from jaxtune.weights.source import resolve
from tests.support import peft_side, tools
from tests.support.cases import thinned

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("remat", thinned(["none", "dots", "full"], "dots"))
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True, "attention_bias": True, "head_dim": 24}],
    ids=["plain", "tied"],
)
def test_gradients_equal_peft(changes, remat, tmp_path, one_device):
    config = tools.tiny_config(**changes)
    tools.save_model(tmp_path / "base", config)
    reference = peft_side.lora(tools.random_model(config), b_std=0.1)
    reference.save_pretrained(tmp_path / "adapter")
    random = np.random.default_rng(0)
    rows = [(random.integers(0, 256, 20), random.random(20) < 0.5) for _ in range(3)]

    total, _ = peft_side.token_loss(reference, rows)
    total.backward()
    expected = {
        name.replace(".default", ""): p.grad.numpy()
        for name, p in reference.named_parameters()
        if p.grad is not None
    }

    model = load_model(resolve(str(tmp_path / "base")), one_device)
    attach(model, open_adapter(tmp_path / "adapter"), one_device)
    graph, trainable, frozen = partition_trainable(model)
    ids, supervised = (np.stack(part) for part in zip(*rows, strict=True))
    ones = np.ones((3, 19), np.int32)
    batch = Batch(
        ids[:, :-1].astype(np.int32),
        ids[:, 1:].astype(np.int32),
        supervised[:, 1:].astype(np.float32),
        ones,
        np.cumsum(ones, 1) - 1,
    )
    loss, grads = jax.jit(
        jax.value_and_grad(
            lambda part: sft(
                nnx.merge(graph, part, frozen), batch, DETERMINISTIC._replace(remat=remat)
            )[0]
        )
    )(trainable)
    np.testing.assert_allclose(loss, float(total.detach()), rtol=1e-5)
    found = {}
    for path, leaf in nnx.to_flat_state(grads):
        names = names_of((*path, "weight"), model.config)[1]
        found |= {
            f"base_model.model.{name}": value
            for name, value in zip(names, np.asarray(leaf.get_value()), strict=True)
        }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= 1e-3 * np.linalg.norm(value), name


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twenty_steps_of_the_real_model_equal_peft(smollm2, tmp_path):
    """Same adapter to start from, same rows, same order: loss, gradient norm, learning rate and
    the change of the adapter.
    """
    steps, rows_a_step = 20, 2
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    reference = peft_side.lora(reference, rank=16, alpha=32.0)
    reference.save_pretrained(tmp_path / "start", save_embedding_layers=False)
    start = peft_side.factors(reference)
    topics = ["sea", "sun", "rain", "wind"]
    chats = [
        tools.chat(f"Say a word about the {topics[n % 4]}, number {n}.", f"{topics[n % 4]} {n * n}")
        for n in range(steps * rows_a_step)
    ]
    keys = {
        "model": {"source": str(smollm2)},
        "adapter": {"init": str(tmp_path / "start")},
        "data": {
            "train": tools.write_rows(tmp_path / "rows.jsonl", chats),
            "packing": False,
            "shuffle": False,
            "max_length": 128,
        },
        "optimizer": {"learning_rate": 1e-3, "warmup": 5, "schedule": "cosine"},
        "train": {"batch_size": rows_a_step},
        "run": {"dir": str(tmp_path / "run")},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(keys))
    done = tools.jaxtune("train", tmp_path / "config.yaml", torch=True, timeout=1000)
    assert done.returncode == 0, done.stderr
    assert "PEFT's differ by" in done.stdout
    ours = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]

    config = validated(keys)
    items = prepare(config.data, resolve(str(smollm2)).tokenizer()).items[:]
    batches = [
        [(item.ids, item.supervised) for item in items[k : k + rows_a_step]]
        for k in range(0, len(items), rows_a_step)
    ]
    warm = [1e-3 * (k + 1) / 5 for k in range(5)]
    rates = warm + [
        1e-3 * 0.5 * (1 + np.cos(np.pi * (k - 5) / (steps - 5))) for k in range(5, steps)
    ]
    theirs = peft_side.train(reference, batches, rates)

    for row, (loss, norm), rate in zip(ours, theirs, rates, strict=True):
        assert abs(row["loss"] - loss) < 1e-3, row
        assert abs(row["grad_norm"] - norm) < 0.005 * norm, row
        assert row["learning_rate"] == pytest.approx(rate, rel=1e-6), row
    final = peft_side.factors(reference)
    adapter = open_adapter(tmp_path / "run" / "adapter")
    ours_end = {name: adapter.tensors[name].all() for name in final}
    error = sum(np.sum((ours_end[name] - final[name]) ** 2) for name in final) ** 0.5
    change = sum(np.sum((final[name] - start[name]) ** 2) for name in final) ** 0.5
    assert error < 0.02 * change, (error, change)
