"""What every adapter method keeps: it starts from the base, what it adds is what it merges, and
what it writes it reads.
"""

import typing
from dataclasses import dataclass

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtune.adapters.config import AdapterConfig
from jaxtune.adapters.inject import adapted, exportable, inject, partition_trainable
from jaxtune.adapters.method import (
    COMMON_KEYS,
    METHODS,
    AdaptedLayer,
    AdapterMethod,
    AdapterParam,
    all_methods,
    method_named,
    method_of,
)
from jaxtune.adapters.tokens import TOKEN_ROWS
from jaxtune.config.schema import AdapterSection
from jaxtune.core.errors import UserError
from jaxtune.models.layers import Linear
from jaxtune.weights.load import load_model
from jaxtune.weights.merge import merged
from jaxtune.weights.peft import attach, entries, open_adapter, write_adapter
from jaxtune.weights.source import OverriddenSource, resolve
from tests.support import tools
from tests.support.cases import thinned
from tests.support.steps import tensors_of

pytestmark = pytest.mark.usefixtures("quick_compilation")

IDS = np.random.default_rng(0).integers(0, 288, (2, 12))
SOME_LAYERS = r".*\.(0|2)\..*(q|up|down)_proj"
CASES = {
    "lora": {},
    "lora rows": {"tokens": (("embed_tokens", (5, 9, 200)), ("lm_head", (7, 5)))},
    "lora embedding": {"targets": ("embed_tokens", "q_proj", "lm_head")},
    "dora": {},
    "dora head": {"targets": ("lm_head", "k_proj")},
    "pissa": {},
    "pissa head": {"targets": ("lm_head", "k_proj")},
    "ia3": {},
    "ia3 head": {"targets": ("lm_head", "k_proj")},
} | {f"{name} some layers": {"targets": SOME_LAYERS} for name in ("lora", "dora", "pissa", "ia3")}
# m / |W| is 1, and a head's start subtracted from itself 0, but for rounding.
STARTS_ROUNDED = ("dora", "pissa head")


def section_of(name):
    method = method_named(name.split()[0])
    return AdapterSection(
        method=method.starts or method.name,
        init=method.name if method.starts else None,
        **({"rank": 4, "alpha": 8} if method.low_rank else {}),
    )


def config_of(name):
    section = section_of(name)
    method = method_of(section)
    return method.config(**method.from_section(section), **CASES[name])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    config = tools.tiny_config(attention_bias=True)
    return tools.save_model(tmp_path_factory.mktemp("base"), config)


def with_method(name, base, mesh):
    model = load_model(resolve(str(base)), mesh)
    inject(model, config_of(name), 0, mesh)
    return model


def moved(model):
    """The model with every leaf that trains away from where it started."""
    graph, trainable, frozen = partition_trainable(model)
    leaves, tree = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, leaves), frozen)


def test_the_schema_names_the_registered_methods():
    kinds = typing.get_args(AdapterSection.model_fields["method"].annotation)
    methods = [name for name, method in all_methods().items() if not method.starts]
    assert {*methods, "none"} == set(kinds)


def test_every_key_of_the_section_means_something_to_some_method():
    keys = COMMON_KEYS.union(*(method.keys for method in all_methods().values()))
    assert keys == set(AdapterSection.model_fields)


def test_a_start_is_a_method_of_its_own_and_an_unknown_name_is_refused():
    assert method_of(AdapterSection(init="pissa")).name == "pissa"
    assert method_of(AdapterSection(init="runs/a/adapter")).name == "lora"
    assert method_of(AdapterSection(method="dora", init="default")).name == "dora"
    with pytest.raises(UserError, match=r"no adapter method 'lokr'; there are .*lora"):
        method_named("lokr")


def test_a_tensor_of_a_file_belongs_to_one_leaf_of_one_method():
    for method in all_methods().values():
        leaves = [*method.leaves.items(), *TOKEN_ROWS.leaves.items()]
        for leaf, end in leaves:
            owners = [other for other, tail in leaves if f".{end}".endswith(f".{tail}")]
            assert owners == [leaf]


@pytest.mark.parametrize("name", ["lora", "dora", "ia3"])
def test_a_section_comes_back_from_its_config(name):
    changes = {"rank": 4, "rslora": True, "rank_pattern": {"q_proj": 2}} if name != "ia3" else {}
    section, method = AdapterSection(method=name, **changes), method_named(name)
    config = method.config(**method.from_section(section))
    for key, value in method.to_section(config).items():
        assert getattr(section, key) == value, key


@pytest.mark.parametrize("name", thinned(CASES, "lora rows", "dora", "pissa", "ia3 some layers"))
def test_it_starts_from_the_base_and_what_it_adds_is_what_it_merges_writes_and_reads(
    name, base, tmp_path, one_device
):
    source = resolve(str(base))
    untouched = np.asarray(load_model(source, one_device)(IDS))
    model = with_method(name, base, one_device)
    if name == "lora embedding":  # PEFT draws B, and A is zero
        layers = {type(layer).__name__ for layer in adapted(model).values()}
        assert layers == {"LoRALinear", "LoRAEmbedding"}
    tolerance = 2e-5 if name.startswith(STARTS_ROUNDED) else 0
    np.testing.assert_allclose(model(IDS), untouched, atol=tolerance, rtol=0)

    model = exportable(moved(model))
    expected = np.asarray(model(IDS))
    assert np.abs(expected - untouched).max() > 0.05
    write_adapter(tmp_path, model, "base")
    adapter = open_adapter(tmp_path)
    assert adapter.config.method == model.adapter.method
    shapes = {entry.name: entry.shape for entry in entries(model)}
    assert adapter.tensors.keys() == shapes.keys()
    for key, tensor in adapter.tensors.items():
        chex.assert_shape(tensor.all(), shapes[key])

    again = load_model(source, one_device)
    attach(again, adapter, one_device)
    np.testing.assert_array_equal(again(IDS), expected)
    chex.assert_trees_all_equal(tensors_of(again), tensors_of(model))

    tensors, raw = merged(source.tensors(), adapter, source.config_json())
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, tensors), one_device)
    np.testing.assert_allclose(whole(IDS), expected, atol=5e-4)


@pytest.mark.parametrize("name", ["lora some layers", "dora some layers", "ia3 some layers"])
def test_layers_of_a_stack_that_are_not_adapted_have_no_gradient_and_no_tensor(
    name, base, one_device
):
    model = moved(with_method(name, base, one_device))
    graph, trainable, frozen = partition_trainable(model)
    gradient = jax.grad(lambda part: jnp.sum(nnx.merge(graph, part, frozen)(IDS)[:, -1]))(trainable)
    for path, leaf in nnx.to_flat_state(gradient):
        sizes = [float(np.abs(layer).max()) for layer in np.asarray(leaf.get_value())]
        assert sizes[0] > 0, path
        assert sizes[1] == 0, path
    assert not any(".layers.1." in entry.name for entry in entries(model))
    for layer in adapted(model).values():
        assert layer.adapted == (True, False, True)


@dataclass(frozen=True)
class GainConfig(AdapterConfig):
    method: typing.ClassVar[str] = "gain"


class GainLinear(AdaptedLayer, Linear):
    """y = g x W^T (+ b), one g a layer."""

    def __init__(self, base, site):
        self.weight, self.bias, self.site_adapted = base.weight, base.bias, site.adapted
        self.gain = AdapterParam(jnp.ones((*base.weight.shape[:-2], 1)), axes=(None,))

    @property
    def adapted(self):
        return self.site_adapted

    def __call__(self, x, dropout=None):
        y = self.times_weight(x) * self.gain[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)


class Gain(AdapterMethod):
    name, title, peft_type, config = "gain", "Gain", "GAIN", GainConfig
    leaves: typing.ClassVar = {"gain": "gain"}

    def wrap(self, base, site, config):
        return GainLinear(base, site)

    def merge(self, config, module, tensors):
        return {"weight": lambda block, rows: block * tensors["gain"]}


def test_a_method_from_outside_the_package_is_one_class_and_one_layer(
    base, tmp_path, one_device, monkeypatch
):
    monkeypatch.setitem(METHODS, "gain", Gain())
    source, model = resolve(str(base)), load_model(resolve(str(base)), one_device)
    untouched = np.asarray(model(IDS))
    inject(model, GainConfig(targets=("o_proj", "down_proj")), 0, one_device)
    np.testing.assert_array_equal(model(IDS), untouched)
    model = moved(model)
    expected = np.asarray(model(IDS))
    write_adapter(tmp_path, model, "base")
    adapter, again = open_adapter(tmp_path), load_model(source, one_device)
    assert set(adapter.tensors) == {
        f"base_model.model.model.layers.{layer}.{module}.gain"
        for layer in range(3)
        for module in ("self_attn.o_proj", "mlp.down_proj")
    }
    attach(again, adapter, one_device)
    np.testing.assert_array_equal(again(IDS), expected)
    tensors, raw = merged(source.tensors(), adapter, source.config_json())
    whole = load_model(OverriddenSource(source.name, source.path, source, raw, tensors), one_device)
    np.testing.assert_allclose(whole(IDS), expected, atol=2e-4)
    assert np.abs(expected - untouched).max() > 0.05


def test_every_method_has_a_case():
    assert {name.split()[0] for name in CASES} >= set(all_methods())


def test_a_layer_that_is_no_head_is_refused_as_one(base, one_device, monkeypatch):
    """The head is computed by `as_head`, so such an adapter would change nothing."""
    monkeypatch.setitem(METHODS, "gain", Gain())
    model = load_model(resolve(str(base)), one_device)
    with pytest.raises(UserError, match="Gain on lm_head is not supported"):
        inject(model, GainConfig(targets=("lm_head", "o_proj")), 0, one_device)


def test_a_leaf_that_the_method_does_not_name_is_not_written(base, one_device, monkeypatch):
    monkeypatch.setitem(METHODS, "gain", Gain())
    monkeypatch.setattr(Gain, "leaves", {})
    model = load_model(resolve(str(base)), one_device)
    inject(model, GainConfig(targets=("o_proj",)), 0, one_device)
    with pytest.raises(TypeError, match=r"GainLinear\.gain: its method's `leaves` do not name it"):
        list(entries(model))
