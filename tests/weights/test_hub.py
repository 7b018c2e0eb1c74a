"""Hub ids: from the cache, and from a stand-in for the hub on this machine; every refusal says
how to mend it.
"""

import json
import shutil

import pytest
import yaml
from peft import PeftConfig

from jaxtune.adapters.inject import inject
from jaxtune.adapters.lora import LoRAConfig
from jaxtune.core.errors import UserError
from jaxtune.weights import hub
from jaxtune.weights.card import model_card
from jaxtune.weights.formats.peft import FORMAT as PEFT
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import open_adapter, write_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.verify import Comparison
from tests.support.hub import Hub, serve

UNREAD = [
    "pytorch_model.bin", "consolidated.safetensors", "consolidated.00.pth", "model.gguf",
    "onnx/model.onnx", "original/params.json", "original/consolidated.00.pth", "image.png",
    "LICENSE.txt", "training_args.json", "README.md",
]  # fmt: skip


@pytest.fixture
def stand_in(chat_model, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in chat_model.iterdir() if path.is_file()}
    other = {
        "config.json": files["config.json"],
        "pytorch_model.bin": b"x",
        "original/consolidated.00.pth": b"y",
        "training.py": b"z",
    }
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "b.safetensors"}}
    files |= dict.fromkeys(UNREAD, b"unread")
    files["additional_chat_templates/tool_use.jinja"] = b"{{ tools }}"
    sharded = dict.fromkeys((*shards["weight_map"].values(), *UNREAD), b"x")
    sharded |= {
        "config.json": files["config.json"],
        "model.safetensors.index.json": json.dumps(shards).encode(),
    }
    monkeypatch.setattr(
        Hub,
        "files",
        {"org/model": files, "org/gated": files, "org/torch": other, "org/shards": sharded},
    )
    monkeypatch.setattr(Hub, "uploaded", {})
    monkeypatch.setattr(Hub, "asked", [])
    with serve(Hub) as address:
        for place in (
            "huggingface_hub.constants.ENDPOINT",
            "huggingface_hub.hf_api.constants.ENDPOINT",
        ):
            monkeypatch.setattr(place, address)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield Hub


def test_a_model_is_fetched_once_and_then_found_without_the_hub(stand_in, monkeypatch):
    source = resolve("org/model")
    assert source.name == "org/model"
    assert "lm_head.weight" in source.tensors()
    assert source.tokenizer().chat_template
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stand_in.asked.clear()
    assert resolve("org/model").path == source.path
    assert not stand_in.asked


def test_without_a_connection_the_cache_will_do_and_an_upload_says_so(
    stand_in, tmp_path, monkeypatch
):
    path = resolve("org/model").path
    for place in (
        "huggingface_hub.constants.ENDPOINT",
        "huggingface_hub.hf_api.constants.ENDPOINT",
    ):
        monkeypatch.setattr(place, "http://127.0.0.1:9")
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda seconds: None
    )  # it tries five times
    assert resolve("org/model").path == path
    with pytest.raises(
        UserError, match="org/torch is not a path here, and the hub cannot be reached"
    ):
        resolve("org/torch")
    with pytest.raises(UserError, match="the hub cannot be reached"):
        hub.push(tmp_path, "org/mine")


def test_a_revision_is_asked_for(stand_in):
    assert resolve("org/model@v2").name == "org/model@v2"
    assert any("/v2" in path for _, path in stand_in.asked)
    with pytest.raises(UserError, match="org/model has no revision 'v3' on the hub"):
        resolve("org/model@v3")


def test_only_the_files_that_are_read_are_fetched(stand_in):
    def names(model):
        directory = resolve(model).path
        return {
            path.relative_to(directory).as_posix()
            for path in directory.rglob("*")
            if not path.is_dir()
        }

    assert names("org/torch") == {"config.json", "pytorch_model.bin"}
    assert not names("org/model") & set(UNREAD)
    assert names("org/model") >= {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "additional_chat_templates/tool_use.jinja",
    }  # fmt: skip
    assert names("org/shards") == {
        "config.json", "model.safetensors.index.json", "b.safetensors",
        "model-00001-of-00002.safetensors",
    }  # fmt: skip


def test_gated_missing_and_unreachable_say_what_to_do(stand_in, monkeypatch):
    with pytest.raises(
        UserError,
        match=r"org/gated is gated. Accept its license on its hub page, "
        "then run 'hf auth login' or set HF_TOKEN",
    ):
        resolve("org/gated")
    monkeypatch.setenv("HF_TOKEN", "good")
    assert resolve("org/gated").config_json()["model_type"] == "llama"
    with pytest.raises(
        UserError, match="org/nothing is neither a path here nor a model on the hub"
    ):
        resolve("org/nothing")


def test_an_upload_holds_every_file(stand_in, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("# model")
    with pytest.raises(UserError, match=r"\(403: no\)\. Run 'hf auth login'"):
        hub.push(tmp_path / "out", "org/mine")
    monkeypatch.setenv("HF_TOKEN", "good")
    hub.push(tmp_path / "out", "org/mine")
    assert list(stand_in.uploaded) == ["README.md"]


@pytest.mark.parametrize("status", [400, 401, 403, 409, 413])
def test_a_refused_upload_says_why(status, stand_in, tmp_path, monkeypatch):
    """The hub's own words, in one line."""
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr(stand_in, "refusal", (status, "You have too many\nprivate repositories"))
    with pytest.raises(UserError, match=rf"org/mine: .*\({status}: You have too many") as error:
        hub.push(tmp_path, "org/mine")
    assert "private repositories" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_repository_that_is_there_is_written_to(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "good")
    monkeypatch.setattr(stand_in, "refusal", (409, "You already created this model repo"))
    (tmp_path / "README.md").write_text("# model")
    assert hub.push(tmp_path, "org/model").endswith("/org/model")
    assert list(stand_in.uploaded) == ["README.md"]


def test_a_card_and_an_adapter_name_the_base_without_its_revision(stand_in, tmp_path, one_device):
    source = resolve("org/model@v2")
    same = Comparison(1, 1.0, 0.0, None, "not here")
    card = model_card(PEFT, source, same, "", is_merged=False)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "org/model"
    assert 'from_pretrained("org/model", revision="v2")' in card
    model = load_model(source, one_device)
    inject(model, LoRAConfig(targets=("q_proj",), rank=2, alpha=2.0), 0, one_device)
    write_adapter(tmp_path, model, source.name)
    written = PeftConfig.from_pretrained(tmp_path)
    assert (written.base_model_name_or_path, written.revision) == ("org/model", "v2")
    assert open_adapter(tmp_path).tensors


def test_a_card_of_a_model_on_disk_names_no_base(chat_model):
    same = Comparison(1, 1.0, 0.0, None, "not here")
    card = model_card(PEFT, resolve(str(chat_model)), same, "", is_merged=False)
    assert "base_model" not in yaml.safe_load(card.split("---")[1])
    assert "base_model is left out" in card


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
    with pytest.raises(
        UserError, match=r"no/such-model is not a path here, and the hub cannot be reached"
    ) as error:
        resolve("no/such-model")
    assert "\n" not in str(error.value)
