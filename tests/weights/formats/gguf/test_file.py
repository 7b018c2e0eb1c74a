"""What is read of a GGUF file beside its weights: several files as one, metadata that changes the
model or nothing, and values that cannot be.
"""

import struct
import tracemalloc

import numpy as np
import pytest

from jaxtune.core.errors import UserError
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.formats.gguf.file import open_gguf
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve
from tests.support import gguf_files, tools


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "llama.gguf"
    return path, gguf_files.write_model(path)


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "gemma3.gguf"
    gguf_files.write_model(path, "gemma3_pattern", query_pre_attn_scalar=16)
    return path


def config_of(path):
    return from_hf(resolve(str(path)).config_json(), str(path))


def test_several_files_are_one_model(llama, tmp_path, one_device):
    path, model = llama
    shards = gguf_files.split(path, tmp_path, 3)
    ids = np.random.default_rng(0).integers(0, 288, (2, 12))
    source = resolve(str(shards[1]))
    assert source.short_name == "tiny"
    ours = np.asarray(load_model(source, one_device)(ids))
    np.testing.assert_allclose(ours, tools.torch_logits(model, ids), atol=2e-4)
    assert source.tokenizer()("ab")["input_ids"] == tools.byte_tokenizer()("ab")["input_ids"]


def test_a_missing_or_foreign_file_of_several_is_named(llama, tmp_path):
    shards = gguf_files.split(llama[0], tmp_path, 3)
    shards[1].rename(tmp_path / "aside")
    with pytest.raises(UserError, match=r"one of 3 files .*; tiny-00002-of-00003\.gguf must lie"):
        resolve(str(shards[0]))
    gguf_files.rewrite(llama[0], shards[1], {"split.no": 2, "split.count": 3})
    with pytest.raises(UserError, match=r"tiny-00002-of-00003\.gguf: split\.no .* are 2 and 3"):
        resolve(str(shards[0]))
    gguf_files.split(llama[0], tmp_path, 3, {1: {"split.no": 1}})
    empty = {"split.no": 2, "split.count": 3}
    gguf_files.rewrite(llama[0], shards[2], empty, keep=lambda name: False)
    with pytest.raises(UserError, match=r"split\.tensors\.count is 40, and the files have 27"):
        resolve(str(shards[0]))
    shards[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(UserError, match=r"must be named NAME-00001-of-0000N\.gguf"):
        resolve(str(tmp_path / "alone.gguf"))


def test_current_gemma3_files_are_read(gemma3, tmp_path):
    """Keys of llama.cpp's converter and of files that others quantized."""
    plain = config_of(gemma3)
    assert (plain.logit_softcap, plain.ropes[1].theta) == (5.0, 10000.0)
    out = gguf_files.rewrite(
        gemma3,
        tmp_path / "x.gguf",
        {
            "gemma3.rope.freq_base_swa": 5000.0,
            "gemma3.attention.sliding_window_pattern": 2,
            "gemma3.rope.dimension_count_swa": 16,
            "gemma3.attention.key_length_swa": 16,
            "gemma3.attention.value_length_swa": 16,
            "gemma3.attention.causal": True,
            "gemma3.attn_logit_softcapping": 0.0,
            "gemma3.final_logit_softcapping": 30.0,
            "gemma3.rope.scaling.type": "linear",
            "gemma3.rope.scaling.factor": 8.0,
        },
    )
    config = config_of(out)
    assert [layer.window for layer in config.layers] == [6, None, 6, None, 6, None, 6]
    assert config.ropes[1].theta == 5000.0
    assert (config.ropes[0].kind, config.ropes[0].get("factor")) == ("linear", 8.0)
    assert config.logit_softcap == 30.0
    pattern = [True, True, False, True, True, False, True]
    key = "gemma3.attention.sliding_window_pattern"
    listed = config_of(gguf_files.rewrite(gemma3, tmp_path / "y.gguf", {key: pattern}))
    assert [layer.window is not None for layer in listed.layers] == pattern


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
SAME = {
    "no scaling": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    "the old name of a factor": ({"rope.scale_linear": 4.0}, {"factor": 4.0}),
    "a factor alone": ({"rope.scaling.factor": 4.0}, {"factor": 4.0}),
    "yarn": (YARN, {"factor": 4.0}),
    "yarn, llama.cpp's factor": (
        YARN | {"rope.scaling.attn_factor": 2.0}, {"factor": 4.0, "attention_factor": 2.2772589},
    ),
    "yarn, the converter's keys": (
        YARN
        | {
            "rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_ext_factor": 1.0,
        },
        {"factor": 4.0, "attention_factor": 1.5, "beta_fast": 16.0, "beta_slow": 2.0},
    ),
    "a number for every layer": ({"attention.head_count": [4, 4, 4, 4]}, {}),
    "labels": ({"pooling_type": 1, "attention.causal": True}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_scaling_and_neutral_keys_are_read_as_llama_cpp_does(name, llama, tmp_path):
    keys, options = SAME[name]
    change = {f"llama.{key}": value for key, value in keys.items()}
    change |= {"llama.rope.scaling.original_context_length": None}
    keep = "rope_freqs.weight".__ne__
    rope = config_of(gguf_files.rewrite(llama[0], tmp_path / "x.gguf", change, keep)).ropes[0]
    assert dict(rope.options) == pytest.approx(options)
    assert (rope.kind == "default") == (not options)


UNKNOWN, COUNT = "does not understand", "not a positive whole number"
LONG = dict.fromkeys(
    ["llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"],
    1 << 30,
)
MANY = {"llama.expert_count": 8, "llama.expert_used_count": 2}
WRONG = {
    "not causal": ({"llama.attention.causal": False}, rf"{UNKNOWN}: llama\.attention\.causal"),
    "an extrapolation": ({"llama.rope.scaling.yarn_ext_factor": 0.5}, UNKNOWN),
    "two sizes": ({"llama.attention.value_length": 4}, r"beside llama\.attention\.key_length"),
    "a million layers": ({"llama.block_count": 1_000_000}, "in the tensors it is 4"),
    "layers beyond counting": ({"llama.block_count": 1 << 40}, f"{COUNT} below"),
    "another width": ({"llama.embedding_length": 64}, "in the tensors it is 32"),
    "a truth for a number": ({"llama.block_count": True}, COUNT),
    "a text for a number": ({"llama.attention.head_count": "4"}, COUNT),
    "unlike numbers": ({"llama.attention.head_count": [4, 4, 2, 4]}, COUNT),
    "no number": ({"llama.rope.freq_base": float("nan")}, "not a number from 0 on"),
    "below zero": ({"llama.attention.layer_norm_rms_epsilon": -1.0}, "not a number from 0 on"),
    "a base of zero": ({"llama.rope.freq_base": 0.0}, r"rope\.freq_base = 0"),
    "a number for a text": ({"llama.rope.scaling.type": 3}, "not a text"),
    "more experts than there are": (MANY, "in the tensors it is 0"),
    "a long head": (LONG, "divisors are needed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_metadata_that_cannot_be_is_one_line_and_takes_no_memory(name, llama, tmp_path):
    change, message = WRONG[name]
    path = gguf_files.rewrite(llama[0], tmp_path / "x.gguf", change)
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as error:
        config_of(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
    assert "\n" not in str(error.value)


def header(tensors, pairs, rest=b""):
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, pairs) + rest


def text(value, size=None):
    return struct.pack("<Q", len(value) if size is None else size) + value


def pair(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


HUGE = 1 << 50
HEADERS = {
    "tensors": header(HUGE, 0),
    "pairs": header(0, HUGE),
    "an array": header(0, 1, pair(b"a", 9, struct.pack("<IQ", 4, HUGE))),
    "an array of texts": header(0, 1, pair(b"a", 9, struct.pack("<IQ", 8, HUGE))),
    "an array of arrays": header(0, 1, pair(b"a", 9, struct.pack("<IQ", 9, 1))),
    "a text": header(0, 1, pair(b"a", 8, text(b"", HUGE))),
    "a key": header(0, 1, text(b"", HUGE)),
    "an unknown type": header(0, 1, pair(b"a", 99, b"")),
    "dimensions": header(1, 0, text(b"a") + struct.pack("<I", 1 << 31)),
    "a shape that wraps around": header(
        1, 0, text(b"a") + struct.pack("<IQQQIQ", 3, 32, 1 << 32, 1 << 32, 0, 0)
    ),
    "an offset": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 4, 0, HUGE)),
    "no numbers": header(1, 0, text(b"a") + struct.pack("<IQIQ", 1, 0, 0, 0)),
    "an alignment of zero": header(0, 1, pair(b"general.alignment", 4, struct.pack("<I", 0))),
    "an alignment in words": header(0, 1, pair(b"general.alignment", 8, text(b"32"))),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_without_the_file_for_it_is_one_line_and_takes_no_memory(name, tmp_path):
    (tmp_path / "x.gguf").write_bytes(HEADERS[name] + bytes(1 << 16))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"is not a whole GGUF file \(.+\)\. Download it again"):
        open_gguf(tmp_path / "x.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
