"""Weights that are NaN or infinite are named as they load, and nothing is said by such a model."""

import ml_dtypes
import numpy as np
import pytest
import torch

import jaxtune
from jaxtune.core.errors import RunError, UserError
from jaxtune.inference.engine import Engine
from jaxtune.weights.finite import all_finite
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import talker, tools

pytestmark = pytest.mark.usefixtures("quick_compilation")

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_pattern_is_told_as_numpy_tells_it(dtype):
    width = np.dtype(dtype).itemsize
    bits = np.arange(2**16, dtype=np.uint16).astype(f"u{width}") << 8 * (width - 2)
    values = bits.view(dtype)
    with np.errstate(invalid="ignore"):
        expected = np.isfinite(values.astype(np.float64)).tolist()
    assert [all_finite(values[[at]]) for at in range(len(values))] == expected
    assert not all_finite(values)
    assert all_finite(np.zeros((0, 3), dtype))


NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
@pytest.mark.parametrize("keys", [{}, {"dtype": "int8"}, {"trainable": ("all",)}], ids=str)
def test_a_tensor_that_is_not_finite_is_named(bad, keys, tmp_path, one_device):
    tools.save_model(tmp_path, tools.tiny_config(), max_shard_size="30KB")
    (path,) = [
        path
        for path in tmp_path.glob("*.safetensors")
        if NAME.encode() in path.read_bytes()[:20_000]
    ]
    spoil(path, NAME, bad)
    with pytest.raises(UserError, match=rf"{path.name}: tensor {NAME} holds NaN or infinity"):
        load_model(resolve(str(tmp_path)), one_device, **keys)


def spoil(path, name, value):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_pytorch_file_too(tmp_path, one_device):
    model = tools.random_model(tools.tiny_config())
    model.config.save_pretrained(tmp_path)
    state = model.state_dict()
    state["model.norm.weight"][0] = torch.inf
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: tensor model\.norm\.weight holds"):
        load_model(resolve(str(tmp_path)), one_device)


def test_what_a_dtype_cannot_hold_is_said(tmp_path, one_device):
    tools.save_model(tmp_path, tools.tiny_config())
    spoil(tmp_path / "model.safetensors", "model.norm.weight", 1e6)
    load_model(resolve(str(tmp_path)), one_device)
    with pytest.raises(UserError, match=r"model\.norm\.weight holds numbers that float16 cannot"):
        load_model(resolve(str(tmp_path)), one_device, dtype="float16")


def test_no_text_is_made_of_nan(tmp_path, one_device):
    """Finite weights whose products are not: neither a first token, nor a later one, nor a stop
    token; nor a score.
    """
    directory = talker.save(tmp_path / "base")
    large = ("lm_head.weight", "model.norm.weight")
    tools.rewrite_tensors(
        directory,
        lambda tensors: {
            name: tensor * 3e38 if name in large else tensor for name, tensor in tensors.items()
        },
    )
    with pytest.raises(RunError, match="logits are NaN or infinite"):
        jaxtune.generate(str(directory), ["well?"], max_new_tokens=4)
    model = load_model(resolve(str(directory)), one_device)
    with pytest.raises(RunError, match="logits are NaN or infinite"):
        Engine(model, list(range(288)), batch=1).generate([[1, 2]], 4)
    engine = Engine(model, [], batch=1)
    with pytest.raises(RunError, match="logits are NaN or infinite"):
        engine.score(engine.prefill([[1, 2]], 4), [[3, 4]])
