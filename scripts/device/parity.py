#!/usr/bin/env python
"""Numbers of this accelerator beside the CPU's in float32, of one process: logits, loss and every
gradient of tiny models of each family, of quantized bases, adapter methods and remat policies, and
cuDNN's attention beside its formula.

    parity.py families K N    # the K-th of N shares of the families
    parity.py methods K N     # of quantized bases, adapter methods and remat policies
    parity.py attention 1 1   # cuDNN

A difference is relative: of logits ||ours - theirs|| / ||theirs||, of gradients the same for the
leaf where it is largest.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import findings  # noqa: E402 (the path above)

from jaxtune.core.mesh import make_mesh  # noqa: E402 (likewise)
from jaxtune.models.kernels import attention, cudnn  # noqa: E402 (likewise)
from jaxtune.models.kernels.blockwise import attend_blockwise  # noqa: E402 (likewise)
from tests.support import families  # noqa: E402 (likewise)
from tests.support.attention import SCALE, arrays, formula, packed  # noqa: E402 (likewise)
from tests.support.steps import Steps, batch_of  # noqa: E402 (likewise)

# (logits, loss, gradients). bfloat16 has eight bits: one product rounds by 2e-3 to 4e-3, a model
# of some layers by ten times that. Its limits are about twice what a CPU's bfloat16 shows.
LIMITS = {"float32": (1e-5, 1e-5, 1e-3), "bfloat16": (5e-2, 2e-2, 2e-1)}
EXPERTS = (2e-1, 2e-2, 5e-1)  # of bfloat16, where rounding sends a token to another expert
ACCELERATOR = jax.default_backend() != "cpu"


def meshes():
    """One device of the CPU, and the accelerator's, which in a dry run is the CPU as well."""
    return make_mesh(devices=jax.devices("cpu")[:1]), make_mesh(devices=jax.devices()[:1])


def batch():
    """Packed rows, some tokens unsupervised."""
    random = np.random.default_rng(0)
    texts = [
        (random.integers(0, 256, size).tolist(), (random.random(size) < 0.7).tolist())
        for size in (33, 14, 20, 9, 30, 25)
    ]
    return batch_of(texts, length=48, packed=True)


def numbers(directory, mesh, *keys):
    """`(logits, loss, {leaf: gradient})`, adapters being random numbers and not zeros."""
    steps = Steps(directory, mesh, *keys)
    random = np.random.default_rng(1)
    trainable = jax.tree.map(
        lambda leaf: jax.device_put(
            np.asarray(leaf) + 0.1 * random.normal(size=leaf.shape).astype(leaf.dtype),
            leaf.sharding,
        ),
        steps.trainable,
    )
    (loss, logits), grads = steps.gradient(batch(), trainable, logits=True)
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf, np.float64)
        for path, leaf in jax.tree.leaves_with_path(grads)
    }
    return np.asarray(logits, np.float64), float(loss), leaves


def distance(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def compare(name, ours, theirs, limits):
    """A row each for logits, loss and gradients."""
    findings.compare(f"{name}: logits", distance(ours[0], theirs[0]), limits[0])
    findings.compare(f"{name}: loss", abs(ours[1] / theirs[1] - 1), limits[1])
    assert ours[2].keys() == theirs[2].keys()
    apart = {leaf: distance(ours[2][leaf], value) for leaf, value in theirs[2].items()}
    worst = max(apart, key=lambda leaf: np.nan_to_num(apart[leaf], nan=np.inf))
    findings.compare(f"{name}: gradients", apart[worst], limits[2], leaf=worst, leaves=len(apart))


def compute(dtype):
    return f"model.compute_dtype={dtype}"


def of_families(folder, share, shares):
    cpu, accelerator = meshes()
    for name in list(families.FAMILIES)[share - 1 :: shares]:
        directory = folder / name
        families.save(directory, families.config(name))
        reference = numbers(directory, cpu, compute("float32"))
        for dtype, limits in LIMITS.items():
            if dtype == "bfloat16" and ("moe" in name or name == "mixtral"):
                limits = EXPERTS
            ours = numbers(directory, accelerator, compute(dtype))
            compare(f"{name}, {dtype}", ours, reference, limits)


# name: (keys of both sides, keys of the accelerator's, limits)
EXACT, ROUNDED = LIMITS["float32"], LIMITS["bfloat16"]
METHODS = {
    "nf4": (["model.dtype=nf4"], [], EXACT),
    "nf4, bfloat16": (["model.dtype=nf4"], [compute("bfloat16")], ROUNDED),
    "int8": (["model.dtype=int8"], [], EXACT),
    # A number on the border of two codes may fall to either side.
    "int8 products": (["model.dtype=int8", "model.products=int8"], [], (1e-3, 1e-3, 2e-2)),
    "DoRA": (["adapter.method=dora"], [], EXACT),
    "(IA)^3": (["adapter.method=ia3"], [], EXACT),
    "all weights": (["adapter.method=none"], [], EXACT),
    "remat none": ([], ["train.remat=none"], EXACT),
    "remat dots": ([], ["train.remat=dots"], EXACT),
    "remat full": ([], ["train.remat=full"], EXACT),
    "remat offload": ([], ["train.remat=offload"], EXACT),
    "remat dots, bfloat16": ([], ["train.remat=dots", compute("bfloat16")], ROUNDED),
    "remat offload, bfloat16": ([], ["train.remat=offload", compute("bfloat16")], ROUNDED),
}


def of_methods(folder, share, shares):
    cpu, accelerator = meshes()
    directory = folder / "model"
    families.save(directory, families.config("llama", hidden_size=64, intermediate_size=128))
    references = {}
    for name, (shared, own, limits) in list(METHODS.items())[share - 1 :: shares]:
        if "offload" in name and not ACCELERATOR:
            findings.add(name, skipped="a CPU has no other memory to keep layers in")
            continue
        shared = [compute("float32"), *shared]
        key = tuple(shared)
        if key not in references:
            references[key] = numbers(directory, cpu, *shared)
        compare(name, numbers(directory, accelerator, *shared, *own), references[key], limits)


def of_attention(folder, share, shares):
    """bfloat16 on the accelerator against the formula in float32 on the CPU, both from the same
    rounded numbers; the blockwise form beside cuDNN's.
    """
    cpu, accelerator = meshes()
    for size in (32, 64, 128)[share - 1 :: shares]:
        for window in (None, 50):
            mask, rounded = packed(window), arrays(size, jnp.bfloat16)
            wide = [part.astype(np.float32) for part in rounded]
            theirs = outputs(cpu, partial(formula, mask=mask), wide)
            for kernel, run in kernels(mask, window):
                name = f"{kernel}, heads of {size}, window {window}"
                if run is None:
                    findings.add(name, skipped="no NVIDIA GPU here")
                    continue
                ours = outputs(accelerator, run, rounded)
                for part, *pair in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
                    findings.compare(f"{name}: {part}", distance(*pair), 1e-2)


def kernels(mask, window):
    """The forms of attention, None where it cannot be computed here."""
    known = {"mask": mask, "scale": SCALE}
    yield "blockwise", partial(attend_blockwise, **known)
    yield "cuDNN", partial(cudnn.attend, causal=True, **known) if ACCELERATOR else None
    yield "as chosen", partial(attention.attend, windows=(window,), **known)


def outputs(mesh, run, arrays):
    """The output and its gradients with respect to queries, keys and values."""

    def both(q, k, v, dout):
        out, back = jax.vjp(run, q, k, v)
        return out, *back(dout)

    with jax.set_mesh(mesh):
        placed = jax.device_put(arrays, jax.sharding.NamedSharding(mesh, jax.P()))
        return [np.asarray(part, np.float64) for part in jax.jit(both)(*placed)]


def main():
    kinds = {"families": of_families, "methods": of_methods, "attention": of_attention}
    with tempfile.TemporaryDirectory() as folder:
        kinds[sys.argv[1]](Path(folder), *map(int, sys.argv[2:]))


if __name__ == "__main__":
    main()
