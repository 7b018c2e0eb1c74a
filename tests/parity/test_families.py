"""Every family against transformers, float32: logits 2e-4."""

import numpy as np
import pytest

from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests import tools
from tests.parity import families


@pytest.mark.parametrize("name", families.FAMILIES)
def test_logits(name, tmp_path, one_device):
    reference = families.save(tmp_path, families.config(name))
    ids = np.random.default_rng(0).integers(0, 256, (2, 32))
    ours = np.asarray(load_model(resolve(str(tmp_path)), one_device)(ids))
    np.testing.assert_allclose(ours, tools.torch_logits(reference, ids), atol=2e-4, rtol=0)
