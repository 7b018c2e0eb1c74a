"""GGUF files damaged at random: read, or refused in one line, in little memory.

JAXTUNE_FUZZ_CASES is the number of cases; a case is a function of its number.
"""

import os
import random
import tracemalloc

import pytest

from jaxtune.core.errors import UserError
from jaxtune.models.families.from_hf import from_hf
from jaxtune.weights.formats.gguf.file import open_gguf
from jaxtune.weights.load import check_source
from jaxtune.weights.source import resolve
from tests.support import gguf_files

CASES = int(os.environ.get("JAXTUNE_FUZZ_CASES", "40"))
FAMILIES = {
    "llama": {}, "gemma3_pattern": {"query_pre_attn_scalar": 16},
    "phi3_long": {"sliding_window": None}, "qwen3": {}, "granite": {},
}  # fmt: skip
NUMBERS = [
    0,
    1,
    2,
    3,
    7,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
]
OTHERS = [
    -1, True, False, 0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"), "", "x", "linear", "yarn",
    "longrope", "none", [1, 2], [0.5], ["a", "b"], [True, False], [1] * 1000,
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    for name, changes in FAMILIES.items():
        gguf_files.write_model(folder / f"{name}.gguf", name, num_hidden_layers=2, **changes)
    return sorted(folder.iterdir())


def damaged(path, out, draw):
    """Write the file with other values of some keys, or with other bytes."""
    kind = draw.choice(["values", "values", "values", "bytes", "cut", "tensors"])
    if kind == "values":
        keys = sorted(open_gguf(path).metadata)
        change = {
            key: draw.choice([None, *NUMBERS, *OTHERS])
            for key in draw.sample(keys, draw.choice([1, 1, 1, 2, 4]))
            if key != "general.architecture"
        }
        try:
            return gguf_files.rewrite(path, out, change)
        except (TypeError, ValueError, OverflowError):  # the gguf package has no type for it
            kind = "bytes"
    if kind == "tensors":
        gone = draw.random()
        return gguf_files.rewrite(path, out, keep=lambda name: draw.random() > gone)
    data = bytearray(path.read_bytes())
    size = data.rindex(b".weight") + 40
    if kind == "cut":
        data = data[: draw.randrange(len(data))]
    else:
        for _ in range(draw.choice([1, 1, 3])):
            at = draw.randrange(size)
            data[at : at + 8] = draw.choice(
                [bytes([draw.randrange(256)]), draw.choice(NUMBERS).to_bytes(8, "little")]
            )
    out.write_bytes(data)
    return out


def read_all(path):
    source = resolve(str(path))
    from_hf(source.config_json(), str(path))
    check_source(source)
    source.stop_ids()
    source.generation_config()
    source.tokenizer()
    for tensor in source.tensors().values():
        tensor.all()


def test_a_damaged_file_is_read_or_refused_in_one_line_and_in_little_memory(originals, tmp_path):
    refused = 0
    tracemalloc.start()
    for number in range(CASES):
        draw = random.Random(f"gguf {number}")
        path = damaged(draw.choice(originals), tmp_path / f"{number}.gguf", draw)
        tracemalloc.reset_peak()
        start = tracemalloc.get_traced_memory()[0]
        message = ""
        try:
            read_all(path)
        except UserError as error:
            refused, message = refused + 1, str(error)
        except Exception as error:
            raise AssertionError(f"case {number}: {type(error).__name__} {error}") from error
        assert "\n" not in message, f"case {number}: {message}"
        assert len(message) < 2000, f"case {number}: {message}"
        peak = tracemalloc.get_traced_memory()[1] - start
        assert peak < 100_000_000, f"case {number} took {peak} bytes"
        path.unlink()
    tracemalloc.stop()
    assert refused > CASES // 4
