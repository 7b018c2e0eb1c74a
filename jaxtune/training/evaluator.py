"""The objective over all evaluation rows."""

from collections.abc import Callable

import jax
import numpy as np

from jaxtune.data.loader import BatchSchedule, local_rows, on_devices
from jaxtune.tracking.metrics_log import perplexity
from jaxtune.training.setup import Setup
from jaxtune.training.state import TrainState
from jaxtune.training.step import eval_step


class Evaluator:
    """The objective over all evaluation rows: sums of losses and weights, divided once.

    Args:
        setup: the run.
        schedule: the evaluation's batches.
        check: called between batches; what it raises ends the evaluation.

    """

    def __init__(
        self, setup: Setup, schedule: BatchSchedule, check: Callable[[], None] | None = None
    ) -> None:
        self.setup, self.schedule, self._check = setup, schedule, check
        self._step = eval_step(setup.spec)

    def __call__(self, state: TrainState) -> dict[str, float]:
        """Return the loss and the objective's further metrics; of supervised training the loss is
        in nats per supervised token, and perplexity comes with it.
        """
        sums, params = [], self.setup.eval_params(state)
        rows = local_rows(self.schedule.layout.rows, 1, self.setup.mesh)
        for index in range(len(self.schedule)):
            batch = on_devices(self.schedule.batch(index, rows), 1, self.setup.mesh)
            batch = jax.tree.map(lambda part: part[0], batch)
            sums.append(self._step(params, self.setup.frozen, batch))
            if self._check:
                # One batch is computed while the next is prepared, so that little is left to wait
                # for when a signal comes.
                jax.block_until_ready(sums[-2:][0])
                self._check()
        loss, weight, extra = jax.tree.map(
            lambda *parts: float(np.sum(np.asarray(parts, np.float64))), *jax.device_get(sums)
        )
        metrics = {"loss": loss / weight}
        if not self.setup.config.on_pairs:
            metrics["perplexity"] = perplexity(loss / weight)
        return metrics | {name: value / weight for name, value in extra.items()}
