"""What the compiled step takes and does not do: memory by vocabulary and depth, no gradient of
frozen weights, nothing waited for.
"""

import re
from itertools import pairwise

import jax
import numpy as np
import pytest
from flax import nnx

from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.core.hardware import Memory
from jaxtune.core.mesh import make_mesh
from jaxtune.objectives.cross_entropy import CPU_CHUNK
from jaxtune.planning.lower import Lowered
from jaxtune.training import remat_auto
from jaxtune.training.remat_auto import MemoryBudget, activation_bytes, choose_policy
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools
from tests.support.steps import Steps, ragged_batch

HIDDEN, MLP, HEADS, ROWS, LENGTH = 64, 176, 4, 4, 512


@pytest.fixture
def lowered(tmp_path):
    """The step of a model of this vocabulary and depth."""

    def make(vocab=512, layers=2, *keys):
        folder = tmp_path / f"{vocab}-{layers}"
        numbers = {
            "vocab_size": vocab,
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": layers,
        }
        tools.tiny_config(
            **numbers, num_attention_heads=HEADS, tie_word_embeddings=False
        ).save_pretrained(folder)
        common = [
            f"model.source={folder}",
            f"data.max_length={LENGTH}",
            f"train.batch_size={ROWS}",
            "adapter.rank=4",
            "mesh.fsdp=1",
        ]
        return Lowered(load_config(overrides=[*common, *keys]), jax.devices()[:1])

    return make


def temporaries(lowered):
    memory = Memory.of(lowered.compile())
    assert memory is not None
    return memory.temp


def test_memory_does_not_grow_with_the_vocabulary_times_the_batch(lowered):
    """Four thousand more tokens to choose from, of 2,048 positions: whole logits would be 33 MB
    more, a chunk's are two.
    """
    more = temporaries(lowered(vocab=4608)) - temporaries(lowered(vocab=512))
    assert more < 3.5 * CPU_CHUNK * 4096 * 4 < ROWS * LENGTH * 4096 * 4 / 2


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_memory_grows_with_depth_by_what_the_policy_keeps(policy, lowered):
    sizes = [temporaries(lowered(512, layers, f"train.remat={policy}")) for layers in (4, 8, 16)]
    kept = {
        "full": HIDDEN,
        "dots": HIDDEN + 2 * (HEADS + 2) * HIDDEN // HEADS + HIDDEN + 2 * MLP + 7 * 4,
    }[policy]
    gradients = 4 * (7 * HIDDEN + 2 * (HEADS + 2) * HIDDEN // HEADS + 3 * MLP) * 2
    for (less, more), layers in zip(pairwise(sizes), (4, 8), strict=True):
        assert (more - less) / layers < 4 * (ROWS * LENGTH * kept * 1.1 + gradients)


def test_no_gradient_of_a_frozen_weight_is_computed(lowered):
    """No product in the program has the shape of a frozen matrix, in either order."""
    text = lowered(512, 3, "train.remat=full").compile().as_text()
    products = {
        tuple(map(int, sizes.split(",")))
        for sizes in re.findall(r"= \w+\[([\d,]+)\]\S* dot\(", text)
    }
    assert products
    frozen = [(MLP, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN // 2, HIDDEN), (512, HIDDEN)]
    assert not products & {size for pair in frozen for size in (pair, pair[::-1])}


def test_with_integer_products_a_step_is_near_the_exact_one(chat_model, one_device):
    exact, rounded = (
        Steps(chat_model, one_device, "model.dtype=int8", f"model.products={products}")
        for products in ("auto", "int8")
    )
    batches = [ragged_batch(seed) for seed in range(4)]
    losses = [np.asarray([loss for loss, _, _ in run.train(batches)]) for run in (exact, rounded)]
    assert 0 < np.abs(losses[0] - losses[1]).max() < 0.02


def test_integer_products_want_a_base_of_integers():
    with pytest.raises(
        UserError, match=r"model\.products=int8 multiplies the codes of model\.dtype=int8"
    ):
        load_config(overrides=["model.products=int8"])


@pytest.mark.parametrize(("gigabytes", "policy"), [(100, "dots"), (0.02, "full")])
def test_auto_takes_what_there_is_room_for(gigabytes, policy, lowered, monkeypatch):
    step = lowered(512, 16, "train.remat=auto")
    assert step.remat == "dots"
    config, model = step.config, step.model
    budget = MemoryBudget(int(gigabytes * 1e9), 0)
    assert choose_policy(config, model, None, budget) == policy
    monkeypatch.setattr(remat_auto, "platform", lambda: "tpu")
    assert choose_policy(config, model, None, MemoryBudget(1000, 0)) == "offload"


@pytest.mark.parametrize("policy", ["full", "dots"])
def test_the_estimate_is_near_what_the_compiler_says(policy, lowered):
    step = lowered(512, 16, f"train.remat={policy}")
    assert 0.7 < activation_bytes(step.config, step.model, None, policy) / temporaries(step) < 2.0


def test_on_cpu_bfloat16_weights_and_what_is_kept_are_not_taken_to_float32_as_stacks(lowered):
    keys = ["model.dtype=bfloat16", "model.compute_dtype=bfloat16", "train.remat=dots"]
    text = lowered(512, 3, *keys).compile().as_text()
    wide = set(re.findall(r"f32\[(3,[\d,]+)\]", text))
    assert not wide & {
        f"3,{MLP},{HIDDEN}",
        f"3,{HIDDEN},{MLP}",
        f"3,{HIDDEN},{HIDDEN}",
        f"3,{ROWS},{LENGTH},{MLP}",
    }


def test_gradients_of_bfloat16_weights_are_refused_on_cpu(chat_model):
    model = load_model(
        resolve(str(chat_model)),
        make_mesh(devices=jax.devices()[:1]),
        dtype="bfloat16",
        compute="bfloat16",
    )
    graph, leaves = nnx.split(model)
    with pytest.raises(TypeError, match="in float32"):
        jax.grad(lambda leaves: nnx.merge(graph, leaves)(np.ones((1, 8), np.int32)).sum())(leaves)


def test_under_dots_attention_and_thin_products_are_kept_in_bfloat16_as_in_float32(lowered):
    """On CPU they are kept as bits; a name that the policy did not see would show as more
    exponentials and products.
    """
    counts = {}
    for dtype in ("float32", "bfloat16"):
        text = (
            lowered(
                512, 3, f"model.dtype={dtype}", f"model.compute_dtype={dtype}", "train.remat=dots"
            )
            .compile()
            .as_text()
        )
        counts[dtype] = len(re.findall(r" exponential\(", text)), len(re.findall(r" dot\(", text))
    assert counts["bfloat16"] == counts["float32"]
