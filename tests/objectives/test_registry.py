"""The registry: every objective of the schema is built from its file, and code outside the
package adds its own.
"""

from typing import get_args

import jax.numpy as jnp
import pytest

from jaxtune.config.load import load_config
from jaxtune.config.schema import TrainSection
from jaxtune.core.errors import UserError
from jaxtune.objectives import registry
from jaxtune.objectives.objective import Objective, Sums, hidden_and_head
from jaxtune.objectives.registry import build_objective, register
from jaxtune.objectives.sequence_log_probs import token_log_probs
from tests.support import tools
from tests.support.steps import Steps, batch_of, random_rows

NAMES = get_args(TrainSection.model_fields["objective"].annotation)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))


@pytest.mark.parametrize("name", NAMES)
def test_every_objective_of_the_schema_is_built_and_compares_what_the_schema_says(name):
    keys = ["distill.teacher=somewhere"] if name == "distill" else []
    config = load_config(overrides=[f"train.objective={name}", *keys])
    objective = build_objective(config)
    assert isinstance(objective, Objective)
    assert config.on_pairs == (objective.compares is not None)


@pytest.mark.usefixtures("registered", "quick_compilation")
def test_an_objective_from_outside_the_package_trains(tmp_path, one_device):
    """Minus the mean probability of the supervised tokens, scaled by a key of the configuration."""

    @register("expected_accuracy")
    def build(config):
        def loss(models, batch, options, shared):
            model = models.policy
            hidden, head = hidden_and_head(model, batch, options)
            probabilities = jnp.exp(
                token_log_probs(hidden, head, batch.target_ids, model.config.logit_softcap)
            )
            total = jnp.sum(probabilities * batch.weights)
            scale = config.distill.temperature
            return Sums(-scale * total, jnp.sum(batch.weights), {"probability": total})

        return Objective(loss)

    base = tools.save_model(tmp_path / "base", tools.tiny_config())
    run = Steps(base, one_device, "distill.temperature=3", objective="expected_accuracy")
    batch = batch_of(random_rows(4), length=24)
    rows = run.train([batch] * 5, micro_batches=2)
    for loss, norm, metrics in rows:
        assert loss == pytest.approx(-3 * metrics["probability"], rel=1e-6)
        assert norm > 0
    assert rows[-1][0] < rows[0][0]


@pytest.mark.usefixtures("registered")
def test_a_name_that_nobody_registered_is_an_error_that_says_how():
    with pytest.raises(UserError, match=r"no objective 'mine'.*register"):
        build_objective(load_config(), "mine")
    with pytest.raises(UserError, match="no objective 'cross_entropy'"):
        build_objective(load_config(), "cross_entropy")


@pytest.mark.usefixtures("registered")
def test_a_name_is_not_taken_from_another_module():
    build_objective(load_config(), "dpo")
    with pytest.raises(ValueError, match=r"'dpo' is registered by jaxtune\.objectives\.dpo"):
        register("dpo")(lambda config: Objective(lambda *_: None))
