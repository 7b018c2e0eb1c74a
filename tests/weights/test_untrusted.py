"""Directories of models and adapters that others have filled: no link leads out of them, nothing in
them waits for ever, and what is damaged is named in a line.
"""

import json
import os
import shutil
import socket
import struct
import time

import numpy as np
import pytest

from jaxtune.core.errors import UserError
from jaxtune.weights import hub
from jaxtune.weights.convert import convert_model
from jaxtune.weights.peft import open_adapter
from jaxtune.weights.safetensors_files import open_file
from jaxtune.weights.source import resolve
from jaxtune.weights.tokenizer_files import load_tokenizer

FILES = [
    "config.json",
    "generation_config.json",
    "merges.txt",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates/tools.jinja",
]


@pytest.fixture
def model(chat_model, tmp_path):
    return shutil.copytree(chat_model, tmp_path / "model")


def replace_by(path, make):
    path.parent.mkdir(exist_ok=True)
    content = path.read_bytes() if path.exists() else b"secret"
    path.unlink(missing_ok=True)
    make(path, content)


def link(path, content):
    outside = path.parent.parent.parent / "outside" / path.name
    outside.parent.mkdir(exist_ok=True)
    outside.write_bytes(content)
    path.symlink_to(outside)


def pipe(path, content):
    os.mkfifo(path)


def listening(path, content):
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def device(path, content):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", [link, pipe, listening, device])
@pytest.mark.parametrize("name", FILES)
def test_no_file_of_a_model_leads_out_of_it_or_waits(kind, name, model, one_device, tmp_path):
    replace_by(model / name, kind)
    with pytest.raises(UserError, match=rf"{name} is a (link|pipe)"):
        convert_model(tmp_path / "out", resolve(str(model)), "hf", one_device)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [link, pipe, device])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_no_file_of_an_adapter_leads_out_of_it_or_waits(kind, name, tmp_path):
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter").mkdir(exist_ok=True)
        (tmp_path / "adapter" / file).write_bytes(b"{}")
    replace_by(tmp_path / "adapter" / name, kind)
    with pytest.raises(UserError, match=rf"{name} is a (link|pipe)"):
        open_adapter(tmp_path / "adapter")


def test_links_into_the_hubs_own_blobs_are_followed(model, tmp_path):
    """And those within the directory."""
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(model.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    source = resolve(str(snapshot))
    assert source.tensors().keys() == resolve(str(model)).tensors().keys()
    assert source.tokenizer().get_vocab() == resolve(str(model)).tokenizer().get_vocab()
    (model / "weights").mkdir()
    (model / "model.safetensors").rename(model / "weights" / "model.safetensors")
    (model / "model.safetensors").symlink_to("weights/model.safetensors")
    assert resolve(str(model)).tensors()


def test_no_link_is_uploaded(tmp_path):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    (tmp_path / "out" / "sub" / "notes").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match="notes is a link that leads out"):
        hub.push(tmp_path / "out", "org/name")


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw["model"].update(type="Nonsense"),
        lambda raw: raw["model"]["vocab"].update({"x": -1}),
        lambda raw: raw["model"].update(merges=[["zzz", "yyy"]]),
        lambda raw: raw.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(("}}),
        lambda raw: raw.update(added_tokens=[{"id": 2**40, "content": "x"}]),
        lambda raw: raw.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
        lambda raw: raw.clear(),
    ],
)
def test_a_damaged_tokenizer_is_one_line_with_its_file(change, model):
    """Also where the library panics."""
    raw = json.loads((model / "tokenizer.json").read_text())
    change(raw)
    (model / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(UserError) as error:
        load_tokenizer(model)
    assert str(error.value).startswith(f"{model / 'tokenizer.json'}: ")
    assert "\n" not in str(error.value)


def write_header(path, header, data=b""):
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def test_names_of_many_tensors_are_checked_at_once(tmp_path):
    path, count = tmp_path / "model.safetensors", 100_000
    entries = [
        f'"layers.{n}.weight":{{"dtype":"F32","shape":[1],"data_offsets":[{4 * n},{4 * n + 4}]}}'
        for n in range(count)
    ]
    data = np.zeros(count, "<f4").tobytes()
    write_header(path, ("{" + ",".join(entries) + "}").encode(), data)
    began = time.process_time()
    assert len(open_file(path)) == count
    assert time.process_time() - began < 8  # a second where nothing else runs
    twice = entries[:-1] + [entries[0]]
    write_header(path, ("{" + ",".join(twice) + "}").encode(), data)
    began = time.process_time()
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_file(path)
    assert time.process_time() - began < 8  # a second where nothing else runs


@pytest.mark.parametrize("size", [0, 7, 2**20, 2**40, 2**63, 2**64 - 1])
def test_sizes_of_headers_that_cannot_be_are_named(size, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", size) + b"{}" + b" " * 100)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        open_file(path)
