"""Models with an adapter of ours that changes what they compute."""

import jax

from jaxtune.adapters.inject import adapted, inject
from jaxtune.adapters.lora import LoRAConfig
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve


def with_adapter(directory, mesh, targets="all-linear", seed=0, **numbers):
    """Load the model and give it an adapter whose B is not zero."""
    model = load_model(resolve(str(directory)), mesh)
    inject(
        model, LoRAConfig(**({"rank": 4, "alpha": 8.0, "targets": targets} | numbers)), seed, mesh
    )
    for number, layer in enumerate(adapted(model).values()):
        layer.lora_B.set_value(0.1 * jax.random.normal(jax.random.key(number), layer.lora_B.shape))
    return model
