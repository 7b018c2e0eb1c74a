"""Chat templates that behave as those of published families do, each beside an independent account
of the text it makes.

An account is a list of `(text, answer)` pieces: joined they are the rendering, and the pieces with
`answer` are what is supervised.
"""

from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "<|endoftext|>",
    "[INST]", "[/INST]",
]  # fmt: skip
SMOL_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."


@dataclass(frozen=True)
class Family:
    """A template, the special tokens it uses, and the account of what it renders."""

    template: str
    bos: str | None
    eos: str
    account: object
    system: bool = True


def chatml_like(default):
    """ChatML; `default` is the system message of conversations without one."""

    def account(messages):
        found = (
            []
            if default is None or messages[0]["role"] == "system"
            else [(f"<|im_start|>system\n{default}<|im_end|>\n", False)]
        )
        for m in messages:
            found.append((f"<|im_start|>{m['role']}\n", False))
            found.append((m["content"] + "<|im_end|>", m["role"] == "assistant"))
            found.append(("\n", False))
        return found

    first = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        + default
        + "<|im_end|>\n' }}{% endif %}"
        if default
        else ""
    )
    template = first + (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
        "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return Family(template, None, "<|im_end|>", account)


def llama2_account(messages):
    found, system = [], ""
    if messages[0]["role"] == "system":
        system, messages = f"<<SYS>>\n{messages[0]['content']}\n<</SYS>>\n\n", messages[1:]
    for number, m in enumerate(messages):
        if m["role"] == "user":
            content = (system if number == 0 else "") + m["content"]
            found.append((f"<s>[INST] {content.strip()} [/INST]", False))
        else:
            found += [(" ", False), (m["content"].strip() + " </s>", True)]
    return found


LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{%- else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{%- for message in loop_messages %}
  {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}
  {%- if loop.index0 == 0 and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}
  {%- else %}{% set content = message['content'] %}{% endif %}
  {%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
  {%- elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{%- endfor %}"""


def llama3_account(messages):
    found = [("<|begin_of_text|>", False)]
    for m in messages:
        found.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        found.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return found


LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
    "endif %}"
)


def mistral_account(messages):
    """The system message stands in the last user message, so that history changes when a turn is
    added.
    """
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    messages = messages[1:] if system is not None else messages
    last = max(number for number, m in enumerate(messages) if m["role"] == "user")
    found = [("<s>", False)]
    for number, m in enumerate(messages):
        if m["role"] == "user":
            content = (
                f"{system}\n\n{m['content']}"
                if system is not None and number == last
                else m["content"]
            )
            found.append((f"[INST] {content} [/INST]", False))
        else:
            found += [(" ", False), (m["content"] + "</s>", True)]
    return found


MISTRAL = """{%- if messages[0]['role'] == 'system' %}{% set system_message = messages[0]['content'] %}{% set loop_messages = messages[1:] %}
{%- else %}{% set loop_messages = messages %}{% endif %}{% set ns = namespace(last=0) %}
{%- for message in loop_messages %}{% if message['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}
{%- for message in loop_messages %}
  {%- if message['role'] == 'user' %}
    {%- if loop.index0 == ns.last and system_message is defined %}{{ '[INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
    {%- else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}
  {%- else %}{{ ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""


def gemma_account(messages):
    found = [("<bos>", False)]
    for m in messages:
        found.append(
            (f"<start_of_turn>{'model' if m['role'] == 'assistant' else m['role']}\n", False)
        )
        found += [(m["content"].strip() + "<end_of_turn>", m["role"] == "assistant"), ("\n", False)]
    return found


GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
    "supported') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) "
    "%}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% "
    "endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def phi_account(messages):
    found = []
    for m in messages:
        found.append((f"<|{m['role']}|>\n", False))
        found += [(m["content"] + "<|end|>", m["role"] == "assistant"), ("\n", False)]
    return [*found, ("<|endoftext|>", False)]


PHI = (
    "{% for message in messages %}{% if message['role'] in ('system', 'user', 'assistant') %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor "
    "%}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def qwen3_account(messages):
    """Thinking is kept in answers after the last user's message only; there an empty block
    stands where there is none.
    """
    last = max(number for number, m in enumerate(messages) if m["role"] == "user")
    found = []
    for number, m in enumerate(messages):
        found.append((f"<|im_start|>{m['role']}\n", False))
        if m["role"] == "assistant" and number > last:
            thought = m.get("reasoning_content", "")
            found.append((f"<think>\n{thought}\n</think>\n\n", bool(thought)))
        found += [(m["content"] + "<|im_end|>", m["role"] == "assistant"), ("\n", False)]
    return found


QWEN3 = """{%- set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
  {%- if m.role == 'assistant' %}
    {%- set reasoning = m.reasoning_content if m.reasoning_content is defined else '' %}{% set content = m.content %}
    {%- if '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip() %}{% set content = content.split('</think>')[-1].lstrip() %}{% endif %}
    {%- if loop.index0 > ns.last %}{{ '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}
    {%- else %}{{ '<|im_start|>assistant\\n' + content }}{% endif %}{{ '<|im_end|>\\n' }}
  {%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

FAMILIES = {
    "chatml": chatml_like(None),
    "smollm2": chatml_like(SMOL_SYSTEM),
    "qwen2.5": chatml_like(QWEN_SYSTEM),
    "qwen3": Family(QWEN3, None, "<|im_end|>", qwen3_account),
    "llama2": Family(LLAMA2, "<s>", "</s>", llama2_account),
    "llama3": Family(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", llama3_account),
    "mistral": Family(MISTRAL, "<s>", "</s>", mistral_account),
    "gemma": Family(GEMMA, "<bos>", "<eos>", gemma_account, system=False),
    "phi": Family(PHI, None, "<|endoftext|>", phi_account),
}

MARKED = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if "
        "message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ "
        "message['content'] + '<|im_end|>' }}{% endif %}"
        "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% "
        "endif %}"
    ),
    "last turn only with its thought": QWEN3.replace(
        "{{ '<|im_start|>assistant\\n<think>\\n' + reasoning + '\\n</think>\\n\\n' + content }}",
        "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ '<think>\\n' + reasoning + "
        "'\\n</think>\\n\\n' + content }}{% endgeneration %}",
    ).replace("{{ '<|im_start|>assistant\\n' + content }}",
    "{{ '<|im_start|>assistant\\n' }}{% generation %}{{ content }}{% endgeneration %}"),
}  # fmt: skip

CORPUS = [
    "The capital of France is Paris, and the answer to everything is 42. assistant user model end "
    "think system",
    "Grüße aus Köln! ¿Qué tal? Привет, мир. こんにちは 🙂 \n\n def f(x):\n    return x + 1",
] * 20


def tokenizer(family, kind):
    """A tokenizer with merges, made here: `bytes` as in GPT-2 and Llama 3, or `metaspace` as in
    Llama 2 and Gemma.
    """
    if kind == "bytes":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
    else:
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(content=" ", left=1),
            ]
        )
        fallback = [f"<0x{number:02X}>" for number in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[*SPECIAL, *fallback], show_progress=False
        )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.eos,
        chat_template=family.template,
    )
