"""GGUF files in llama.cpp itself: the same next tokens with the same probabilities."""

import json
import subprocess
import sys

import numpy as np
import pytest

import jaxtune
from tests.support import families, tools
from tests.support.cases import thinned

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Beside what `families` varies: what GGUF has a place for.
MODELS = {
    "llama": {}, "mistral_without_window": {}, "qwen2": {}, "qwen3": {}, "qwen3_moe": {},
    "phi3": {"sliding_window": None, "hidden_size": 64},
    "mixtral": {"sliding_window": None}, "gemma2": {"query_pre_attn_scalar": 16}, "olmo2": {},
    "smollm3": {}, "granite": {},
    "gemma3_pattern": {"query_pre_attn_scalar": 16, "final_logit_softcapping": None},
}  # fmt: skip
PROMPTS = 6
# llama.cpp looks Gemma's activation up in a table of 16 bits.
TOLERANCE = {"gemma2": 2e-3, "gemma3_pattern": 2e-3}

# A process of its own: llama.cpp's log goes to its standard error and its threads end with it.
ASK = """
import json, os, sys, urllib.request
import xllamacpp

path, prompts = sys.argv[1], json.loads(sys.argv[2])
wanted = xllamacpp.CommonParams()
wanted.model.path, wanted.n_ctx, wanted.n_parallel, wanted.warmup, wanted.fit_params = path, 128, 1, False, False
wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(wanted)

def ask(prompt):
    body = {"prompt": prompt, "n_predict": 1, "n_probs": 20, "temperature": 0, "cache_prompt": False, "return_tokens": True}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
    return json.loads(urllib.request.urlopen(request).read())

print(json.dumps([ask(prompt) for prompt in prompts]), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("name", thinned(MODELS, "llama", "gemma3_pattern", "qwen3_moe"))
def test_llama_cpp_computes_the_same(name, tmp_path):
    config = families.config(name, **MODELS[name])
    families.save(tmp_path / "model", config)
    tools.byte_tokenizer(merges=[("a", "b")]).save_pretrained(tmp_path / "model")
    path = jaxtune.convert(str(tmp_path / "model"), tmp_path / "out.gguf", to="gguf")
    model, _ = jaxtune.load(str(tmp_path / "model"))
    ids = np.random.default_rng(0).integers(32, 126, (PROMPTS, 16))
    logits = np.asarray(model(ids))[:, -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(path), json.dumps(ids.tolist())],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    answers, compared = json.loads(done.stdout.splitlines()[-1]), 0
    for row, answer in enumerate(answers):
        assert answer["tokens"] == [expected[row].argmax()]
        for item in answer.get(
            "completion_probabilities", []
        ):  # none where the token is a part of a character
            for token in item["top_logprobs"]:
                assert abs(token["logprob"] - expected[row, token["id"]]) < TOLERANCE.get(
                    name, 1e-4
                )
                compared += 1
    assert compared or name == "gemma3_pattern"  # whose likeliest tokens here are such parts
