"""Every kernel of attention against the plain formula: outputs and gradients, packed segments,
windows, caps, grouped heads, shards.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtune.core.mesh import make_mesh
from jaxtune.models.kernels import attention, blockwise, cudnn
from jaxtune.models.kernels.attention import attend
from jaxtune.models.kernels.mask import Mask
from jaxtune.models.kernels.splash import Splash
from jaxtune.models.remat import CUDNN, remat
from tests.support.attention import SCALE, arrays, formula, packed

BATCH, TOKENS, HEADS, KV_HEADS, SIZE = 2, 256, 4, 2, 32
EVERYTHING = np.iinfo(np.int32).max


def assert_equals_the_formula(run, mask, cap, dtype, tolerance):
    *parts, dout = arrays(SIZE, dtype, mask.query_positions.shape[1])

    def of(function):
        def value(*parts):
            return jnp.sum(function(*parts).astype(jnp.float32) * dout.astype(jnp.float32))

        return jax.jit(function)(*parts), jax.jit(jax.grad(value, (0, 1, 2)))(*parts)

    found, wanted = of(run), of(lambda q, k, v: formula(q, k, v, mask, cap))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=tolerance
        )


@pytest.mark.gpu
@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("block", [64, 100, 256])
def test_blockwise(block, window, cap, monkeypatch):
    monkeypatch.setattr(blockwise, "BLOCK", block)
    mask = packed(window)
    assert_equals_the_formula(
        lambda q, k, v: blockwise.attend_blockwise(q, k, v, mask, scale=SCALE, cap=cap),
        mask,
        cap,
        jnp.float32,
        1e-5,
    )


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize(
    ("windows", "window"),
    [((None,), None), ((50,), 50), ((None, 50), 50), ((None, 50), EVERYTHING)],
)
def test_splash(windows, window, cap):
    mask = packed(window)
    kernel = Splash(TOKENS, HEADS // KV_HEADS, windows, cap, interpret=True)
    assert_equals_the_formula(partial(attended, kernel, mask), mask, cap, jnp.bfloat16, 0.04)


def attended(kernel, mask, q, k, v):
    return kernel(kernel.kernels, q, k, v, mask, scale=SCALE)


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    "sizes", [{"context": 2, "fsdp": 2}, {"tensor": 2, "data": 2}, {"context": 4, "fsdp": 1}]
)
def test_splash_on_a_mesh(sizes, monkeypatch):
    """As the decoder calls it on TPUs: each device has its queries' part of the mask, its heads,
    and all keys.
    """
    monkeypatch.setattr(attention, "platform", lambda: "tpu")
    monkeypatch.setattr(attention, "Splash", partial(Splash, interpret=True))
    mask, mesh = packed(tokens=512), make_mesh(devices=jax.devices()[:4], **sizes)
    with jax.set_mesh(mesh):
        assert_equals_the_formula(
            lambda q, k, v: attend(q, k, v, mask, scale=SCALE, windows=(None,)),
            mask,
            None,
            jnp.bfloat16,
            0.04,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 50])
def test_what_cudnn_is_asked_for(window):
    """The same call in XLA: which query sees which key, and the scale."""
    mask = packed(window)
    run = partial(cudnn.attend, mask=mask, scale=SCALE, causal=True, implementation="xla")
    with jax.numpy_dtype_promotion("standard"):
        assert_equals_the_formula(run, mask, None, jnp.bfloat16, 0.06)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="no NVIDIA GPU here")
@pytest.mark.parametrize("window", [None, 50])
def test_cudnn(window):
    mask = packed(window)
    assert_equals_the_formula(
        partial(cudnn.attend, mask=mask, scale=SCALE, causal=True), mask, None, jnp.bfloat16, 0.06
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("policy", "passes"), [("none", 1), ("dots", 1), ("full", 2)])
def test_what_cudnn_computed_is_kept_and_not_computed_again(policy, passes, monkeypatch):
    """Its results have no name, so the policy knows JAX's primitive, which may change its own."""
    monkeypatch.setattr(
        "jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91900
    )  # traced, not compiled
    q, k, v, _ = arrays(SIZE, jnp.bfloat16)
    layer = remat(partial(cudnn.attend, mask=packed(), scale=SCALE, causal=True), policy)
    trace = jax.make_jaxpr(jax.grad(lambda q: jnp.sum(layer(q, k, v).astype(jnp.float32))))(q)
    assert str(trace).count(f"{CUDNN}[") == passes


@pytest.mark.gpu
def test_one_query_over_a_cache():
    """Decoding: slots that hold nothing yet are positions beyond the query's."""
    q, k, v, _ = arrays(SIZE, jnp.float32)
    positions, slots = (
        jnp.asarray([[17], [200]], jnp.int32),
        jnp.broadcast_to(jnp.arange(TOKENS, dtype=jnp.int32), (BATCH, TOKENS)),
    )
    mask = Mask(positions, slots, jnp.ones_like(positions), jnp.ones_like(slots))
    found = attend(q[:, :1], k, v, mask, scale=SCALE)
    np.testing.assert_allclose(found, formula(q[:, :1], k, v, mask, None), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(
    jax.default_backend() == "gpu",
    reason="on a GPU blocks are not passed over: the condition would cost more",
)
def test_blocks_that_nobody_sees_are_not_computed(monkeypatch):
    """A NaN in a block of another segment, or of the future, would spread through a product with
    zero.
    """
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    segments = jnp.asarray([np.repeat([1, 2], [64, 192])] * BATCH, jnp.int32)
    positions = jnp.asarray([[*range(64), *range(192)]] * BATCH, jnp.int32)
    mask = Mask(positions, positions, segments, segments)
    q, k, v, _ = arrays(SIZE, jnp.float32)
    hidden = v.at[:, :64].set(jnp.nan)
    assert np.isfinite(attend(q, k, hidden, mask, scale=SCALE)[:, 64:]).all()
    last = v.at[:, 192:].set(jnp.nan)
    assert np.isfinite(attend(q, k, last, mask, scale=SCALE)[:, :192]).all()


@pytest.mark.gpu
def test_the_scores_of_a_row_never_exist_at_once():
    tokens = 4096
    queries, keys = (
        jax.ShapeDtypeStruct((1, tokens, heads, SIZE), jnp.float32) for heads in (HEADS, KV_HEADS)
    )
    ids = jnp.zeros((1, tokens), jnp.int32)
    mask = Mask(
        jnp.arange(tokens, dtype=jnp.int32)[None],
        jnp.arange(tokens, dtype=jnp.int32)[None],
        ids,
        ids,
    )
    run = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend(q, k, v, mask, scale=SCALE)), (0, 1, 2)))
    memory = run.lower(queries, keys, keys).compile().memory_analysis()
    assert memory.temp_size_in_bytes < HEADS * tokens * tokens * 4 / 8
