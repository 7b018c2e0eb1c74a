"""The tokenizer and chat template of a GGUF file: read as transformers', and written from one."""

import json
import re
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from jaxtune.core.errors import UserError, listed
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.weights.formats.gguf.file import GGUF

_TEMPLATE, _DEFAULT = "tokenizer.chat_template", "default"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|\p{N}" + _TAIL

# How text is split into words before byte-level BPE, by `tokenizer.ggml.pre` (llama.cpp,
# src/llama-vocab.cpp).
_SPLITS: dict[str, tuple[str, ...]] = {
    "default": (_GPT2,),
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "smaug-bpe": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}


def read_tokenizer(file: GGUF) -> Tokenizer:
    """Return a `PreTrainedTokenizerFast` with the file's vocabulary, special tokens and template.

    Raises:
        UserError: the file has no tokenizer, or a kind that is not implemented.

    """
    from transformers import PreTrainedTokenizerFast

    meta = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.")
    }
    kind = meta.get("model")
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{file.path}: tokenizer {kind!r} is not supported; supported are gpt2 and llama."
        )
    backend = _byte_level(file, meta) if kind == "gpt2" else _sentencepiece(meta)
    tokens = meta["tokens"]
    _add_special(backend, tokens, meta.get("token_type", []))
    bos, eos = (_token(tokens, meta.get(f"{name}_token_id")) for name in ("bos", "eos"))
    _add_bos_and_eos(
        backend,
        bos if meta.get("add_bos_token", kind == "llama") else None,
        eos if meta.get("add_eos_token") else None,
    )
    # Its token ids are attributes that no type checker sees.
    fast: Any = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        eos_token=eos,
        unk_token=_token(tokens, meta.get("unknown_token_id")),
        pad_token=_token(tokens, meta.get("padding_token_id")),
        chat_template=_read_templates(file),
        clean_up_tokenization_spaces=False,
    )
    return fast


def _byte_level(file: GGUF, meta: dict[str, Any]) -> tokenizers.Tokenizer:
    kind = meta.get("pre", "default")
    if kind not in _SPLITS:
        raise UserError(
            f"{file.path}: pre-tokenizer {kind!r} is not supported; supported are "
            f"{listed(_SPLITS, 20)}."
        )
    vocab = {token: index for index, token in enumerate(meta["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("merges", [])]
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges))
    splits = [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in _SPLITS[kind]
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(meta: dict[str, Any]) -> tokenizers.Tokenizer:
    """Build sentencepiece's BPE, its merges recovered from the scores: the best pair that forms a
    token first.
    """
    tokens = meta["tokens"]
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = []
    for token, score in zip(tokens, meta["scores"], strict=True):
        for middle in range(1, len(token)):
            left, right = token[:middle], token[middle:]
            if left in vocab and right in vocab:
                pairs.append((-score, vocab[left], vocab[right], left, right))
    merges = [(left, right) for *_, left, right in sorted(pairs)]
    backend = tokenizers.Tokenizer(
        BPE(
            vocab=vocab,
            merges=merges,
            fuse_unk=True,
            byte_fallback=True,
            unk_token=tokens[meta.get("unknown_token_id", 0)],
        )
    )
    prefix = [normalizers.Prepend("\u2581")] if meta.get("add_space_prefix", True) else []
    backend.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _add_special(backend: tokenizers.Tokenizer, tokens: list[str], kinds: list[int]) -> None:
    control = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _CONTROL]
    defined = [token for token, kind in zip(tokens, kinds, strict=False) if kind == _USER_DEFINED]
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in control]
    )
    backend.add_tokens([AddedToken(token, normalized=False, special=False) for token in defined])


def _add_bos_and_eos(backend: tokenizers.Tokenizer, bos: str | None, eos: str | None) -> None:
    if bos is None and eos is None:
        return
    from tokenizers.processors import TemplateProcessing

    single = " ".join([*([bos] if bos else []), "$A", *([eos] if eos else [])])
    pieces = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    backend.post_processor = TemplateProcessing(single=single, special_tokens=pieces)


def _token(tokens: list[str], index: int | None) -> str | None:
    return None if index is None else tokens[index]


def tokenizer_metadata(
    tokenizer: Tokenizer, vocab_size: int, stop_ids: list[int]
) -> dict[str, Any]:
    """Return the `tokenizer.` metadata of a GGUF file.

    Args:
        tokenizer: with a fast backend.
        vocab_size: rows of the embedding; those without a token get a name of their own.
        stop_ids: tokens that end an answer.

    Raises:
        UserError: a kind of tokenizer that the format, or this code, does not know.

    """
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    model = raw["model"]
    if model["type"] != "BPE":
        raise UserError(
            f"A {model['type']} tokenizer cannot be written to GGUF here; supported is BPE."
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    tokens, kinds = _tokens(tokenizer, raw, vocab_size)
    if model.get("byte_fallback"):
        prepends = "Prepend" in json.dumps(raw.get("normalizer"))
        metadata: dict[str, Any] = {
            "model": "llama",
            "scores": _scores(tokens, merges),
            "add_space_prefix": prepends or "Metaspace" in json.dumps(raw.get("pre_tokenizer")),
        }
    else:
        metadata = {"model": "gpt2", "pre": _pre(raw["pre_tokenizer"]), "merges": merges}
    plain = tokenizer("a")["input_ids"]
    rest = [token for token in stop_ids if token != tokenizer.eos_token_id]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    ids |= dict(zip(("eot", "eom"), rest, strict=False))
    metadata |= {"tokens": tokens, "token_type": kinds}
    metadata |= {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    metadata |= {
        "add_bos_token": plain[0] == tokenizer.bos_token_id,
        "add_eos_token": plain[-1] == tokenizer.eos_token_id,
    }
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    return prefixed | _templates(tokenizer.chat_template)


def _templates(templates: Any) -> dict[str, Any]:
    """Return the metadata of a chat template, or of several by name as llama.cpp stores them."""
    if not isinstance(templates, dict):
        return {_TEMPLATE: templates} if templates else {}
    named = {name: text for name, text in templates.items() if name != _DEFAULT}
    metadata: dict[str, Any] = {f"{_TEMPLATE}.{name}": text for name, text in named.items()}
    metadata |= {f"{_TEMPLATE}s": list(named)} if named else {}
    return metadata | ({_TEMPLATE: templates[_DEFAULT]} if _DEFAULT in templates else {})


def _read_templates(file: GGUF) -> Any:
    default, prefix = file.metadata.get(_TEMPLATE), f"{_TEMPLATE}."
    named = {
        key.removeprefix(prefix): text
        for key, text in file.metadata.items()
        if key.startswith(prefix)
    }
    return {**({_DEFAULT: default} if default else {}), **named} if named else default


def _tokens(
    tokenizer: Tokenizer, raw: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Return the token of every row of the embedding, and its kind."""
    vocab = tokenizer.get_vocab()
    if max(vocab.values()) >= vocab_size:
        raise UserError(
            f"The tokenizer has {max(vocab.values()) + 1} tokens, the model only {vocab_size} "
            "embeddings. Give the tokenizer that belongs to the model."
        )
    tokens = [f"[PAD{number}]" for number in range(vocab_size)]
    kinds = [_UNUSED] * vocab_size
    for token, number in vocab.items():
        tokens[number] = token
        is_byte = raw["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token)
        kinds[number] = _BYTE if is_byte else _NORMAL
    for added in raw["added_tokens"]:
        kinds[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if tokenizer.unk_token_id is not None and kinds[tokenizer.unk_token_id] == _NORMAL:
        kinds[tokenizer.unk_token_id] = _UNKNOWN
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """Return sentencepiece's scores: the earlier a pair is merged, the higher."""
    order = {}
    for number, merge in enumerate(merges):
        order.setdefault(merge.replace(" ", "", 1), number)
    return [-float(order.get(token, len(merges))) for token in tokens]


def _pre(pre_tokenizer: dict[str, Any]) -> str:
    """Return llama.cpp's name for how text is split into words."""
    is_sequence = pre_tokenizer["type"] == "Sequence"
    parts = pre_tokenizer["pretokenizers"] if is_sequence else [pre_tokenizer]
    patterns = []
    for part in parts:
        if part["type"] == "Split":
            patterns.append(part["pattern"].get("Regex") or re.escape(part["pattern"]["String"]))
        elif part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(r"\p{N}")
        elif part["type"] == "ByteLevel" and part.get("use_regex", True):
            patterns.append(_GPT2)
    for name in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        if tuple(patterns) == _SPLITS[name]:
            return name
    raise UserError(
        "GGUF needs llama.cpp's name for how this tokenizer splits text into words, and "
        f"{listed(patterns)} has none that is known here; known are {listed(_SPLITS, 20)}."
    )
