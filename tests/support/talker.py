"""A tiny model that answers everything with `yes` and its end-of-turn token, and begins again
where nothing stops it.
"""

from itertools import pairwise

import torch
from transformers import LlamaForCausalLM

from tests.support import tools

END, EOS = 259, 257  # <|im_end|>, </s>
ANSWER = "yes"


def save(directory, template=tools.CHATML, head=(), begins="\n", **changes):
    """Save it; its EOS is `</s>`, which ends no turn. The last token alone says what comes next:
    all layers add zero.

    Args:
        directory: where to.
        template: of the tokenizer.
        head: further pairs of a token and the one after it.
        begins: the last character before an answer.
        changes: of its configuration.

    """
    config = tools.tiny_config(hidden_size=96, num_hidden_layers=1, **changes)
    words = tools.byte_tokenizer(template, eos="</s>")
    first, *letters = words(begins + ANSWER)["input_ids"]
    ring = [first, *letters, END, letters[0]]
    following = dict(pairwise(ring)) | dict(head)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        rows = torch.nn.functional.normalize(torch.randn(config.vocab_size, 96))
        model.model.embed_tokens.weight.copy_(rows)
        model.lm_head.weight.zero_()
        for token, after in following.items():
            model.lm_head.weight[after] += rows[token]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory
