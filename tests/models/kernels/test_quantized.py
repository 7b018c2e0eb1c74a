"""QuantizedTensor bases: NF4 as the paper and bitsandbytes have it, eight bits a row, products
and gradients, memory, merging.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from scipy.stats import norm

from jaxtune.core.errors import UserError
from jaxtune.core.mesh import make_mesh
from jaxtune.models.kernels.quantized import NF4_CODES, QuantizedTensor, decode_dynamic
from jaxtune.models.layers import matmul
from jaxtune.weights.load import load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import open_adapter, write_adapter
from jaxtune.weights.quantize import to_int8, to_nf4
from jaxtune.weights.source import OverriddenSource, resolve
from tests.support import tools
from tests.support.steps import Steps, ragged_batch

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]


def code_book():
    """The paper's appendix E: quantiles of a normal distribution, half on each side of an exact
    zero, over the largest.
    """
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    found = np.sort(np.concatenate([above, below, [0.0]]))
    return (found / found.max()).astype(np.float32)


def dynamic_map():
    """Dettmers et al. 2022: a sign, an exponent in unary and a linear fraction; zero and one are
    added.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        borders = np.linspace(0.1, 1, 2**exponent + 1)
        means = (borders[:-1] + borders[1:]) / 2
        for sign in (1, -1):
            found += list(sign * 10.0 ** (exponent - 6) * means)
    return np.sort(np.array(found, np.float32))


def published(matrix):
    """De-quantized by bitsandbytes' scheme: blocks of 64 in reading order, their scales less
    their mean in blocks of 256 on the map.
    """
    blocks = matrix.reshape(-1, 64)
    largest = np.abs(blocks).max(axis=1)
    book, table = code_book(), dynamic_map()
    codes = np.abs((blocks / largest[:, None])[..., None] - book).argmin(axis=-1)
    mean = largest.mean(dtype=np.float32)
    rest = largest - mean
    padded = np.pad(rest, (0, -len(rest) % 256)).reshape(-1, 256)
    wide = np.abs(padded).max(axis=1)
    places = np.abs((padded / wide[:, None])[..., None] - table).argmin(axis=-1)
    scales = (table[places] * wide[:, None]).reshape(-1)[: len(rest)] + mean
    return (book[codes] * scales[:, None]).reshape(matrix.shape), codes


def test_the_code_book_and_the_map_of_scales_are_the_published_ones():
    np.testing.assert_allclose(NF4_CODES, code_book(), atol=3e-7)
    np.testing.assert_allclose(
        decode_dynamic(jnp.arange(256, dtype=jnp.uint8)), dynamic_map(), rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("shape", [(96, 192), (4, 64), (300, 128)])
def test_nf4_equals_the_published_scheme(shape):
    matrix = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    matrix[1, 3] = 0.4  # an outlier
    found = to_nf4(matrix)
    wanted, codes = published(matrix)
    high, low = (
        np.asarray(found.codes).reshape(-1, 32) >> 4,
        np.asarray(found.codes).reshape(-1, 32) & 15,
    )
    assert (
        np.concatenate([high, low], axis=1) != codes
    ).mean() < 1e-3  # a number half way between two codes may take either
    ours = np.asarray(found.astype(jnp.float32))
    close = np.isclose(ours, wanted, rtol=1e-4, atol=1e-8)
    assert close.mean() > 0.999
    errors = [np.abs(part - matrix).mean() for part in (ours, wanted)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)
    assert found.shape == shape


def test_what_is_all_zero_stays_zero():
    for quantize in (to_nf4, to_int8):
        found = quantize(np.zeros((4, 128), np.float32)).astype(jnp.float32)
        assert not np.asarray(found).any()


def test_int8_is_the_nearest_of_127_steps():
    matrix = np.random.default_rng(0).normal(0, 0.02, (50, 70)).astype(np.float32)
    found = np.asarray(to_int8(matrix).astype(jnp.float32))
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert (np.abs(found - matrix) <= step / 2 * 1.0001).all()


@pytest.mark.parametrize("columns", [128, 512])
@pytest.mark.parametrize("quantize", [to_nf4, to_int8])
def test_products_and_their_gradients_are_those_of_the_dequantized_matrix(quantize, columns):
    random = np.random.default_rng(0)
    weight = quantize(random.normal(0, 0.02, (96, columns)).astype(np.float32))
    x, dy = (random.normal(size=size).astype(np.float32) for size in ((3, 5, columns), (3, 5, 96)))
    wide = np.asarray(weight.astype(jnp.float32))
    y, back = jax.vjp(lambda x: matmul(x, weight), x)
    np.testing.assert_allclose(y, x @ wide.T, atol=1e-5)
    np.testing.assert_allclose(back(dy)[0], dy @ wide, atol=1e-5)


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """A model whose matrices have several blocks a row."""
    config = tools.tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    return config, tools.save_model(
        tmp_path_factory.mktemp("wide"), config, tools.byte_tokenizer(), dtype=torch.bfloat16
    )


def quantized_leaves(state):
    return [
        leaf
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor))
        if isinstance(leaf, QuantizedTensor)
    ]


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4.13), ("int8", 8 + 32 * 2048 / 589_824)])
def test_the_compiled_step_holds_so_many_bits_a_parameter(kind, bits, wide_model, one_device):
    """Of the blocks' matrices; embedding, head and norms are kept as they are. Nothing wide is
    an argument or a result.
    """
    run = Steps(wide_model[1], one_device, f"model.dtype={kind}")
    held = quantized_leaves(run.frozen.base)
    numbers = sum(leaf.size for leaf in held)
    assert len(held) == 7
    assert numbers == 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)
    batch = jax.tree.map(lambda part: jnp.asarray(part)[None], ragged_batch(rows=2))
    program = run.step.lower(run.state, run.frozen, batch).compile()
    others = jax.tree.leaves(
        run.frozen.base, is_leaf=lambda leaf: isinstance(leaf, QuantizedTensor)
    )
    rest = sum(leaf.nbytes for leaf in others if not isinstance(leaf, QuantizedTensor))
    rest += (
        sum(leaf.nbytes for leaf in jax.tree.leaves((run.state._replace(key=None), batch))) + 8
    )  # the key
    base_bytes = program.memory_analysis().argument_size_in_bytes - rest
    assert 8 * base_bytes / numbers == pytest.approx(bits, abs=0.03)


@pytest.mark.devices(8)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_mesh_changes_no_number(kind, wide_model, one_device):
    batches = [ragged_batch(number) for number in range(2)]
    alone = Steps(wide_model[1], one_device, f"model.dtype={kind}").train(batches)
    spread = Steps(wide_model[1], make_mesh(1, 2, 4), f"model.dtype={kind}")
    codes = quantized_leaves(spread.frozen.base)[0].codes
    assert max(shard.data.nbytes for shard in codes.addressable_shards) == codes.nbytes // 8
    for ours, theirs in zip(spread.train(batches), alone, strict=True):
        np.testing.assert_allclose(ours[:2], theirs[:2], rtol=1e-4)


def test_the_base_is_quantized_matrix_by_matrix(wide_model, one_device, monkeypatch):
    """What is read wide is one matrix at a time, and is gone before the next."""
    from jaxtune.weights import load

    alive, most = [0], [0]

    class Counted(np.ndarray):
        def __del__(self):
            alive[0] -= 1

    read = load.check_source

    def check_source(source):
        config, tensors = read(source)

        def counted(tensor):
            def reading(index):
                found = tensor.read(index).view(Counted)
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                return found

            return load.LazyTensor(tensor.shape, tensor.dtype, reading)

        return config, {
            name: counted(tensor) if "proj" in name else tensor for name, tensor in tensors.items()
        }

    monkeypatch.setattr(load, "check_source", check_source)
    load_model(resolve(str(wide_model[1])), one_device, dtype="nf4")
    assert 0 < most[0] <= 2


def test_the_merge_is_of_the_original_weights(wide_model, tmp_path, one_device):
    """A small update, lost below the steps of four bits, survives; the merged weights keep the
    base's dtype and size.
    """
    _, directory = wide_model
    run = Steps(directory, one_device, "model.dtype=nf4", "optimizer.learning_rate=1e-3")
    run.train([ragged_batch(number) for number in range(3)])
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", run.exportable(), "base")
    source, adapter = resolve(str(directory)), open_adapter(tmp_path / "adapter")
    tensors, raw = merged(source.tensors(), adapter, source.config_json(), np.dtype("float32"))
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter.tensors[f"base_model.model.{name}.lora_{part}.weight"].all() for part in "AB")
    original = source.tensors()[f"{name}.weight"].all().astype(np.float32)
    change = 2 * b @ a
    assert np.abs(change).max() > 0
    np.testing.assert_allclose(tensors[f"{name}.weight"].all() - original, change, atol=1e-6)
    requantized = np.asarray(to_nf4(original + change).astype(jnp.float32)) - np.asarray(
        to_nf4(original).astype(jnp.float32)
    )
    assert np.linalg.norm(requantized - change) > 0.5 * np.linalg.norm(
        change
    )  # what the naive way would have lost
    kept, _ = merged(source.tensors(), adapter, source.config_json())
    assert {tensor.dtype.name for tensor in kept.values()} == {"bfloat16"}
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, kept), one_device)
    assert not quantized_leaves(nnx.state(whole))


def test_rows_without_whole_blocks_are_refused(chat_model, one_device):
    with pytest.raises(
        UserError,
        match=r"model.dtype=nf4: model.layers.0.\S+ has rows of \d+ numbers"
        r".* Use model.dtype=int8",
    ):
        load_model(resolve(str(chat_model)), one_device, dtype="nf4")
