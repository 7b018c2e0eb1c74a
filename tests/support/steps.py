"""The step of a run on batches made by hand: built from a configuration as a run builds it,
without data or run directory.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxtune.adapters.inject import exportable
from jaxtune.config.load import load_config
from jaxtune.data.batch import Batch
from jaxtune.data.loader import on_devices
from jaxtune.objectives.registry import build_objective
from jaxtune.training.methods import trained_model
from jaxtune.training.setup import assemble_step
from jaxtune.training.state import init_state
from jaxtune.training.step import train_step
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import entries, open_adapter
from jaxtune.weights.source import resolve

LENGTH = 24


class Steps:
    """A model, what trains of it, and its step.

    `keys` are overrides of the configuration; the learning rate is 1e-2, constant and without
    warmup unless they say otherwise. `objective` is the name of a registered one, where it is not
    that of the configuration.
    """

    def __init__(self, directory, mesh, *keys, steps=10, objective=None):
        plain = [
            "optimizer.learning_rate=1e-2",
            "optimizer.warmup=0",
            "optimizer.schedule=constant",
            "adapter.rank=4",
            "adapter.alpha=8",
        ]
        if any(key.startswith("adapter.init=/") for key in keys):
            plain = plain[:3]
        self.config = load_config(overrides=[f"model.source={directory}", *plain, *keys])
        self.mesh, adapter, teacher = mesh, self.config.adapter.start, self.config.distill.teacher
        model = trained_model(
            self.config, resolve(str(directory)), open_adapter(adapter) if adapter else None, mesh
        )
        teacher = load_model(resolve(teacher), mesh) if teacher else None
        self.spec, self.trainable, self.frozen, self.optimizer = assemble_step(
            self.config, model, steps, teacher, objective=build_objective(self.config, objective)
        )
        self.step = train_step(self.spec, self.optimizer, self.config.train.ema)
        self.state = self.fresh()

    def fresh(self):
        return init_state(
            jax.tree.map(jnp.copy, self.trainable),
            self.optimizer,
            self.config.train.seed,
            average=self.config.train.ema > 0,
        )

    def model(self, trainable=None):
        return nnx.merge(
            self.spec.graph, self.trainable if trainable is None else trainable, self.frozen.base
        )

    def exportable(self):
        """The model as trained so far, its adapter as it is written."""
        return exportable(self.model(self.state.trainable))

    def train(self, batches, micro_batches=1):
        """`[(loss, gradient norm, further metrics)]` a step; the state goes on from step to
        step.
        """
        steps = []
        with jax.set_mesh(self.mesh):
            for batch in batches:
                self.state, metrics = self.step(
                    self.state, self.frozen, on_devices(batch, micro_batches, self.mesh)
                )
                extra = {name: float(value) for name, value in metrics.extra.items()}
                steps.append((float(metrics.loss), float(metrics.grad_norm), extra))
        return steps

    def gradient(self, batch, trainable=None, logits=False):
        """`(loss, gradient of the leaves that train)` of the mean loss of a batch; with `logits`
        the first is `(loss, logits)`.
        """

        def mean(trainable):
            single = jax.tree.map(lambda part: part[0], on_devices(batch, 1, self.mesh))
            models = self.spec.models(trainable, self.frozen)
            loss, weight, _ = self.spec.objective.loss(models, single, *self._options(single))
            places = {"segment_ids": single.segment_ids, "positions": single.positions}
            further = models.policy(single.input_ids, **places) if logits else None
            return loss / weight, further

        with jax.set_mesh(self.mesh):
            run = jax.jit(jax.value_and_grad(mean, has_aux=True))
            (loss, further), grads = run(self.trainable if trainable is None else trainable)
            return (loss, further) if logits else loss, grads

    def _options(self, batch):
        from jaxtune.objectives.objective import DETERMINISTIC

        shared = self.spec.objective.shared
        return DETERMINISTIC._replace(remat=self.spec.remat), (
            None if shared is None else shared(self.spec.models(self.trainable, self.frozen), batch)
        )


def tensors_of(model):
    """The leaves of an adapter by PEFT's names, each layer's cut to its rank."""
    return {entry.name: np.asarray(entry.variable[...])[entry.index] for entry in entries(model)}


def leaves(state):
    return {
        ".".join(map(str, path)): np.asarray(leaf.get_value())
        for path, leaf in nnx.to_flat_state(state)
    }


def batch_of(rows, rows_in_batch=None, length=None, packed=False):
    """Rows of (ids, supervised) as a batch, one a row, or all in as few rows as they fit in."""
    length = length or max(len(ids) - 1 for ids, _ in rows)
    laid = [[row] for row in rows]
    if packed:
        laid = []
        for row in rows:
            if not laid or sum(len(ids) - 1 for ids, _ in [*laid[-1], row]) > length:
                laid.append([])
            laid[-1].append(row)
    shape = (rows_in_batch or len(laid), length)
    batch = Batch(
        *(np.zeros(shape, kind) for kind in (np.int32, np.int32, np.float32, np.int32, np.int32))
    )
    for number, row in enumerate(laid):
        at = 0
        for segment, (ids, supervised) in enumerate(row, 1):
            size = len(ids) - 1
            place = (number, slice(at, at + size))
            batch.input_ids[place], batch.target_ids[place] = ids[:-1], ids[1:]
            batch.weights[place], batch.segment_ids[place], batch.positions[place] = (
                supervised[1:],
                segment,
                np.arange(size),
            )
            at += size
    return batch


def random_rows(count, seed=0, shortest=3, longest=LENGTH, vocabulary=256):
    """Rows of (ids, supervised) of unequal lengths whose supervised share differs widely."""
    random, rows = np.random.default_rng(seed), []
    for number in range(count):
        length = int(random.integers(shortest, longest))
        supervised = random.random(length + 1) < (number + 1) / count
        supervised[1] = True
        rows.append((random.integers(0, vocabulary, length + 1).astype(np.int32), supervised))
    return rows


def ragged_batch(seed=0, rows=8):
    """A batch that averaging of averages gets wrong."""
    return batch_of(random_rows(rows, seed), length=LENGTH)
