"""The remat policy of train.remat=auto, from an estimate of the memory that each policy takes."""

from typing import NamedTuple

from jax.sharding import Mesh

from jaxtune.config.schema import Config
from jaxtune.core.hardware import platform
from jaxtune.core.sharding import axis_size
from jaxtune.models.decoder import CausalLM
from jaxtune.models.kernels.blockwise import BLOCK
from jaxtune.objectives.cross_entropy import max_chunk_tokens

_SHARE = 0.9  # of the memory that an estimate may fill
# Arrays of the MLP's and of the model's width that one layer's backward pass holds at once, by
# compiled steps.
_WIDE, _NARROW = 10, 12
_SCORES = 4  # blocks of attention's scores at once
_LOGITS = 3  # arrays of a chunk's logits that are there at once


class MemoryBudget(NamedTuple):
    """A device's memory, in bytes.

    Attributes:
        capacity: all of it.
        fixed: what is taken under every policy: weights, what trains, its moments and gradients.

    """

    capacity: int
    fixed: int


def choose_policy(config: Config, model: CausalLM, mesh: Mesh | None, budget: MemoryBudget) -> str:
    """Return the first of `dots`, `full` and `offload` that seems to fit; else the last.

    Args:
        config: the resolved configuration.
        model: the model, of which only shapes matter.
        mesh: the devices; None is one.
        budget: the memory of one device.

    """
    policies = ("dots", "full") if platform() == "cpu" else ("dots", "full", "offload")
    fits = (
        policy
        for policy in policies
        if activation_bytes(config, model, mesh, policy) + budget.fixed <= _SHARE * budget.capacity
    )
    return next(fits, policies[-1])


def activation_bytes(config: Config, model: CausalLM, mesh: Mesh | None, policy: str) -> int:
    """Estimate the peak bytes of activations on a device: what is kept of all layers, the layer at
    work, logits.
    """
    parts = {
        axis: 1 if mesh is None else axis_size(mesh, axis)
        for axis in ("batch", "seq", "kept_seq", "act_mlp", "vocab")
    }
    train, shape, item = config.train, model.config, model.compute_dtype.itemsize
    rows = train.micro_batch_size or train.batch_size
    answers = rows * config.row_length // config.data.max_length
    tokens = -(-rows * config.row_length // (parts["batch"] * parts["seq"]))
    wide = (
        (shape.experts.size if shape.experts else shape.intermediate_size)
        * (shape.experts.per_token if shape.experts else 1)
        // parts["act_mlp"]
    )
    heads = (2 * shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim // parts["act_mlp"]
    inputs = shape.hidden_size * parts["seq"] // parts["kept_seq"]
    kept = {
        "offload": 2 * inputs / shape.num_layers,
        "full": inputs,
        "dots": inputs + heads + shape.hidden_size + 2 * wide,
    }[policy]
    work = _WIDE * wide + _NARROW * shape.hidden_size
    logits = _LOGITS * max_chunk_tokens() * (shape.vocab_size // parts["vocab"]) * 4
    square = min(BLOCK, config.data.max_length) ** 2
    scores = (
        _SCORES
        * -(-answers // parts["batch"])
        * (shape.num_heads // parts["act_mlp"] or 1)
        * square
        * 4
    )
    return int(tokens * item * (kept * shape.num_layers + work) + logits + scores)
