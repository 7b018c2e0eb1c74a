"""GGUF files for tests: a tiny model's, and another with changed metadata or over several files."""

import gguf
import numpy as np

from jaxtune.weights.formats.gguf import writer as gguf_out
from jaxtune.weights.formats.gguf.file import open_gguf
from jaxtune.weights.formats.gguf.tokenizer import tokenizer_metadata
from jaxtune.weights.tensors import LazyTensor
from tests.support import families, tools


def write_model(path, family="llama", tokenizer=None, **changes):
    """Write a tiny random model; return transformers' model."""
    model = families.model(families.config(family, **changes))
    raw = model.config.to_dict() | {"architectures": [type(model).__name__]}
    tensors = {
        name: LazyTensor(tuple(value.shape), np.dtype("float32"), value.numpy().__getitem__)
        for name, value in model.state_dict().items()
        if not (name == "lm_head.weight" and raw["tie_word_embeddings"])
    }
    tokenizer = tokenizer or tools.byte_tokenizer()
    metadata = tokenizer_metadata(tokenizer, raw["vocab_size"], [])
    gguf_out.write_gguf(path, tensors, raw, metadata, "tiny", "float32")
    return model


def rewrite(path, out, change=None, keep=lambda name: True):
    """Write a file again with other metadata.

    Args:
        path: a file whose tensors are float32.
        out: the file to write.
        change: keys and their new values; None takes a key out.
        keep: which tensors are written.

    """
    file, change = open_gguf(path), change or {}
    metadata = {key: value for key, value in (file.metadata | change).items() if value is not None}
    writer = gguf.GGUFWriter(out, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        _add(writer, key, value)
    for name, tensor in file.tensors.items():
        if keep(name):
            writer.add_tensor(name, np.array(tensor.all()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _add(writer, key, value):
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_uint32 if 0 <= value < 1 << 32 else writer.add_int64)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif value:
        writer.add_array(key, value)


def split(path, folder, count, change=None):
    """Write a file as `count` files; `change` maps a number to metadata of that file alone."""
    names = list(open_gguf(path).tensors)
    shards = []
    for number in range(count):
        split_keys = {
            "split.no": number, "split.count": count, "split.tensors.count": len(names),
        }  # fmt: skip
        out = folder / f"tiny-{number + 1:05}-of-{count:05}.gguf"
        part = set(names[number::count])
        rewrite(path, out, split_keys | (change or {}).get(number, {}), part.__contains__)
        shards.append(out)
    return shards
