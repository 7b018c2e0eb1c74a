"""Hub ids: from the cache where the model is there, one clear error where it is not."""

import shutil

import pytest

from jaxtune.core.errors import UserError
from jaxtune.weights.source import resolve


def test_a_cached_model_is_found_offline_and_keeps_its_name(chat_model, tmp_path, monkeypatch):
    repository = tmp_path / "models--some--model"
    shutil.copytree(chat_model, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = resolve("some/model")
    assert source.name == "some/model"
    assert source.config_json()["model_type"] == "llama"
    assert "lm_head.weight" in source.tensors()
    assert source.tokenizer().chat_template


def test_what_is_neither_here_nor_cached_is_one_line():
    with pytest.raises(UserError, match=r"no/such-model is not a path here, and the hub cannot be reached") as error:
        resolve("no/such-model")
    assert "\n" not in str(error.value)
