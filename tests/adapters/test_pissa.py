"""PiSSA where a matrix has no such start: refused before anything trains, by the module's name."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtune.adapters.inject import inject
from jaxtune.adapters.pissa import PiSSAConfig
from jaxtune.core.errors import UserError
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import tools
from tests.support.steps import Steps

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Keys and values have 16 outputs, and nothing else less than 32."""
    return tools.save_model(tmp_path_factory.mktemp("base"), tools.tiny_config())


@pytest.mark.parametrize(
    ("keys", "module", "rank"),
    [
        (["adapter.rank=17"], r"layers\.0\.self_attn\.(k|v)_proj has 16", 17),
        (
            ["adapter.rank_pattern={layers.2.self_attn.k_proj: 20}"],
            r"layers\.2\.self_attn\.k_proj has 16",
            20,
        ),
        (["adapter.rank=64", "adapter.targets=[down_proj]"], r".*\.down_proj has 32", 64),
    ],
)
def test_a_rank_above_a_matrixs_is_refused_at_the_start(keys, module, rank, base, one_device):
    with pytest.raises(UserError, match=rf"pissa: model\.{module} .* rank {rank}\. Lower") as error:
        Steps(base, one_device, "adapter.init=pissa", *keys)
    assert "\n" not in str(error.value)


def test_the_largest_rank_that_there_is_starts_from_the_base(base, one_device):
    model = load_model(resolve(str(base)), one_device)
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    untouched = np.asarray(model(ids))
    inject(model, PiSSAConfig(rank=16, alpha=32.0, targets=("k_proj",)), 0, one_device)
    np.testing.assert_allclose(model(ids), untouched, atol=1e-5)


@pytest.mark.parametrize(("number", "kind"), [(0.0, "is zero"), (np.nan, "holds NaN or infinity")])
def test_a_matrix_without_a_principal_part_is_refused(number, kind, tmp_path, one_device):
    directory = tools.save_model(tmp_path, tools.tiny_config())
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][:] = number
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def begin():
        model = load_model(resolve(str(directory)), one_device)  # which refuses NaN
        inject(model, PiSSAConfig(rank=4, alpha=8.0), 0, one_device)

    with pytest.raises(UserError, match=rf"{name}(\.weight)? {kind}"):
        begin()
