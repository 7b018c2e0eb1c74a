"""What many tests need: tiny models made by transformers, tokenizers made here, rows, and
numbers of PyTorch's side.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + "
    "'<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
    "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ "
    "'<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | "
    "trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif "
    "%}{% endfor %}"
)
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def tiny_config(**changes):
    """A Llama of 3 layers; grouped-query attention unless told otherwise."""
    numbers = {
        "vocab_size": 288, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257,
        "pad_token_id": 257, "initializer_range": 0.2,
    }  # fmt: skip
    return LlamaConfig(**(numbers | changes))


def byte_tokenizer(template=CHATML, eos="<|im_end|>", add_bos=False, merges=()):
    """One token a byte, and the special tokens; pad is eos, as in many real tokenizers."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {
        token: number for number, token in enumerate([*alphabet, *SPECIAL, *map("".join, merges)])
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if add_bos:
        backend.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token=eos,
        pad_token=eos,
        chat_template=template,
    )


def save_model(directory, config, tokenizer=None, seed=0, dtype=torch.float32, **options):
    """A random model with norms that are not all one, saved by transformers."""
    model = random_model(config, seed).to(dtype)
    model.save_pretrained(directory, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return Path(directory)


def random_model(config, seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def rewrite_config(directory, change):
    """Edit config.json in place; `change` gets the dictionary."""
    path = Path(directory) / "config.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def json_file(path):
    return json.loads(Path(path).read_text())


def write_json_file(path, value):
    Path(path).write_text(json.dumps(value))


def old_dialect(raw):
    """rope_parameters written as rope_theta and rope_scaling, the dialect of transformers 4."""
    rope = raw.pop("rope_parameters")
    raw["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type", "default")
    raw["rope_scaling"] = (
        None if kind == "default" else {"type" if kind == "linear" else "rope_type": kind, **rope}
    )


def torch_logits(model, ids, **options):
    with torch.no_grad():
        return model(torch.as_tensor(np.asarray(ids)), **options).logits.numpy()


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def sums(count, seed=0):
    """Chat rows of unequal length: little sums."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        numbers = random.integers(0, 10, random.integers(1, 7))
        rows.append(chat("+".join(map(str, numbers)) + "?", str(numbers.sum())))
    return rows


def child_environment(torch=False):
    """One CPU device; without `torch`, only our own reader verifies exports and programs are
    compiled in a hurry.
    """
    paths = [str(Path(__file__).parent / "without_torch"), os.environ.get("PYTHONPATH")]
    quick = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    return os.environ | {"JAX_PLATFORMS": "cpu"} | ({} if torch else quick)


def jaxtune(*arguments, torch=False, timeout=500, **options):
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "jaxtune", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=child_environment(torch),
        check=False,
        **options,
    )


def tokenize(words, conversation, train_on):
    """The example of one conversation, which must not be several."""
    from jaxtune.data.chat.tokenize import ConversationTokenizer
    from jaxtune.data.sources.row import RowError

    (found,) = ConversationTokenizer(words, train_on)([conversation])
    if isinstance(found, RowError):
        raise found
    (document,) = found
    return document.example()


def rewrite_tensors(directory, change):
    """Replace the tensors of model.safetensors by what `change` makes of them."""
    from safetensors.torch import load_file, save_file

    path = Path(directory) / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def load_tensors(directory):
    """The tensors of model.safetensors, in PyTorch."""
    from safetensors.torch import load_file

    return load_file(Path(directory) / "model.safetensors")
