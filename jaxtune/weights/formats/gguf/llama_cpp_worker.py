"""Ask llama.cpp for the next token's probabilities; run as a process of its own.

llama.cpp aborts the process on some files, and logs to its standard error. Standard input holds
`{"path", "texts", "prompts", "context", "count"}` as JSON, standard output gets `{"tokens",
"likeliest"}`: for each text its ids, and for each prompt, which is a list of ids, the `count`
likeliest tokens as `[id, log-probability]`. It imports nothing of jaxtune, and so starts at once.
"""

import json
import os
import sys
import urllib.request
from typing import Any


def main() -> None:
    """Answer the question on standard input."""
    import xllamacpp

    question = json.load(sys.stdin)
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the server prints is no answer
    library: Any = xllamacpp  # compiled: a type checker sees none of its names
    server = library.Server(_parameters(xllamacpp, question["path"], question["context"]))
    address = server.listening_address
    # A token that is a part of a character has no probabilities in the server's answer: so another
    # is drawn, and the probabilities shown are those before the bias.
    letter = _post(address, "/tokenize", {"content": "a", "add_special": False})["tokens"][-1]
    body = {
        "n_predict": 1,
        "n_probs": question["count"],
        "temperature": 0,
        "cache_prompt": False,
        "logit_bias": [[letter, 1e6]],
    }
    rows = []
    for prompt in question["prompts"]:
        answer = _post(address, "/completion", {**body, "prompt": prompt})
        likeliest = answer["completion_probabilities"][0]["top_logprobs"]
        rows.append([[token["id"], token["logprob"]] for token in likeliest])
    tokens = [
        _post(address, "/tokenize", {"content": text, "add_special": True})["tokens"]
        for text in question["texts"]
    ]
    json.dump({"tokens": tokens, "likeliest": rows}, answers)
    answers.flush()
    os._exit(0)  # the server's threads do not end


def _parameters(xllamacpp: Any, path: str, context: int) -> Any:
    """Return settings by which llama.cpp computes in as few roundings as it can."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = path
    parameters.n_ctx, parameters.n_parallel = context, 1
    parameters.warmup = parameters.fit_params = False
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.chat_template = "chatml"  # the file's own is not asked for, and might be refused
    disabled = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    parameters.flash_attn_type = disabled
    return parameters


def _post(address: str, route: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        address + route, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
