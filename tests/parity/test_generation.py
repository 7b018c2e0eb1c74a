"""Greedy generation against transformers, token for token, on the real model."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from jaxtune.inference.engine import Engine
from jaxtune.weights.load import load_model
from jaxtune.weights.source import resolve

PROMPTS = [
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain gravity to a child in two sentences.",
    "List three fruits.",
    "Translate 'good morning' to Spanish, then say why mornings matter to people who work at "
    "night.",
]


@pytest.mark.slow
def test_five_chats_of_forty_tokens(smollm2, one_device):
    source = resolve(str(smollm2))
    tokenizer = source.tokenizer()
    ids = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True)[
            "input_ids"
        ]
        for p in PROMPTS
    ]
    engine = Engine(load_model(source, one_device), source.stop_ids(), batch=len(ids))
    ours = engine.generate(ids, 40)
    reference = AutoModelForCausalLM.from_pretrained(
        smollm2.parent, gguf_file=smollm2.name, dtype=torch.float32
    )
    for prompt, answer in zip(ids, ours, strict=True):
        out = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=40,
            do_sample=False,
        )
        theirs = out[0, len(prompt) :].tolist()
        end = next(
            (at for at, token in enumerate(theirs) if token in source.stop_ids()), len(theirs)
        )
        assert answer == theirs[:end]
    assert len(ours[4]) == 40
    assert np.all(
        [
            engine.generate([prompt], 40)[0] == answer
            for prompt, answer in zip(ids[:2], ours, strict=False)
        ]
    )
