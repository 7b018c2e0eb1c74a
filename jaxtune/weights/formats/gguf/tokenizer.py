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
# Of these, where a word that is a token is that token, whatever the merges would make of it.
_IGNORES_MERGES = {"llama-bpe", "llama3", "llama-v3"}

# What the metadata of a tokenizer may be: a type, or a list of one.
_TEXTS = {"model", "pre", "chat_template"}
_LISTS: dict[str, tuple[type, ...]] = {
    "tokens": (str,), "merges": (str,), "scores": (float, int), "token_type": (int,),
}  # fmt: skip


def read_tokenizer(file: GGUF) -> Tokenizer:
    """Return a `PreTrainedTokenizerFast` with the file's vocabulary, special tokens and template.

    Raises:
        UserError: the file has no tokenizer, or a kind that is not implemented.

    """
    from transformers import PreTrainedTokenizerFast

    meta = _checked_metadata(file)
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


def _checked_metadata(file: GGUF) -> dict[str, Any]:
    """Return the tokenizer's metadata without its prefix.

    Raises:
        UserError: a value is of another type than its key says, or an id is none of a token.

    """
    meta = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.")
    }
    wrong = [f"{key} is not a text" for key in _TEXTS & meta.keys() if type(meta[key]) is not str]
    if not isinstance(tokens := meta.get("tokens"), list):
        raise UserError(f"{file.path}: the tokenizer cannot be read: tokens is not a list of str.")
    for key, types in _LISTS.items():
        if not isinstance(items := meta.get(key, []), list) or not all(
            type(item) in types for item in items
        ):
            wrong.append(f"{key} is not a list of {types[0].__name__}")
        elif key != "merges" and key in meta and len(items) != len(tokens):
            wrong.append(f"{key} has {len(items)} items for {len(tokens)} tokens")
    if not wrong and len(set(tokens)) != len(tokens):
        wrong.append("tokens has a token twice")
    if not wrong and (odd := [m for m in meta.get("merges", []) if m and " " not in m[1:]]):
        wrong.append(f"merges has {odd[0][:40]!r}, which is no pair")
    for key in (key for key in meta if key.endswith("_token_id")):
        value = meta[key]
        if type(value) is not int or not 0 <= value < len(tokens):
            wrong.append(f"{key} {str(value)[:40]} is the id of no token")
    if not wrong and meta.get("model") == "llama" and "scores" not in meta:
        wrong.append("scores is missing")
    if wrong:
        raise UserError(f"{file.path}: the tokenizer cannot be read: {listed(wrong)}.")
    return meta


def _byte_level(file: GGUF, meta: dict[str, Any]) -> tokenizers.Tokenizer:
    kind = meta.get("pre", "default")
    if kind not in _SPLITS:
        raise UserError(
            f"{file.path}: pre-tokenizer {kind!r} is not supported; supported are "
            f"{listed(_SPLITS, 20)}."
        )
    vocab = {token: index for index, token in enumerate(meta["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in meta.get("merges", []) if merge]
    if odd := [m for m in merges if not (m[0] in vocab and m[1] in vocab and "".join(m) in vocab)]:
        raise UserError(f"{file.path}: the merge {' '.join(odd[0])[:80]!r} makes no token.")
    ignores = kind in _IGNORES_MERGES
    backend = tokenizers.Tokenizer(BPE(vocab=vocab, merges=merges, ignore_merges=ignores))
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
        # llama.cpp wants merges, and the gguf package writes no empty list: a pair of nothing.
        metadata = {"model": "gpt2", "pre": _pre(raw), "merges": merges or [""]}
    plain = tokenizer("a")["input_ids"]
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
    }
    metadata |= {"tokens": tokens, "token_type": kinds}
    metadata |= {f"{name}_token_id": token for name, token in ids.items() if token is not None}
    metadata |= {
        "add_bos_token": plain[0] == tokenizer.bos_token_id,
        "add_eos_token": plain[-1] == tokenizer.eos_token_id,
    }
    prefixed = {f"tokenizer.ggml.{key}": value for key, value in metadata.items()}
    prefixed |= _templates(tokenizer.chat_template)
    return with_stops(prefixed, stop_ids)


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
        if key.startswith(prefix) and isinstance(text, str)
    }
    return {**({_DEFAULT: default} if default else {}), **named} if named else default


def with_stops(metadata: dict[str, Any], stop_ids: list[int]) -> dict[str, Any]:
    """Return a tokenizer's metadata by which generation ends at all of these tokens, as far as the
    format has a place: it names an end of the sequence, of a turn and of a message.
    """
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    rest = [token for token in stop_ids if token not in [metadata.get(key) for key in keys]]
    free = [key for key in keys[1:] if metadata.get(key) is None]
    return metadata | dict(zip(free, rest, strict=False))


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


def _pre(raw: dict[str, Any]) -> str:
    """Return llama.cpp's name for how text is split into words, and whether words that are tokens
    are merged.
    """
    pre_tokenizer, model = raw["pre_tokenizer"], raw["model"]
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
    names = [
        name
        for name in ("gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2")
        if tuple(patterns) == _SPLITS[name]
    ]
    if not names:
        raise UserError(
            "GGUF needs llama.cpp's name for how this tokenizer splits text into words, and "
            f"{listed(patterns)} has none that is known here; known are {listed(_SPLITS, 20)}."
        )
    ignores = bool(model.get("ignore_merges"))
    for name in names:
        if (name in _IGNORES_MERGES) == ignores:
            return name
    if unmerged := _unmerged(raw):
        raise UserError(
            f"llama.cpp has no place for ignore_merges with the words of {names[0]}, and this "
            f"tokenizer has tokens that merging does not make: {listed(unmerged)}."
        )
    return names[0]


def _unmerged(raw: dict[str, Any]) -> list[str]:
    """Return tokens of words that are not what merging makes of their own characters."""
    model, added = raw["model"], {token["content"] for token in raw["added_tokens"]}
    merges: Any = [
        tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]
    ]
    merging = BPE(vocab=model["vocab"], merges=merges)
    words = (token for token in model["vocab"] if token not in added)
    return [token for token in words if len(merging.tokenize(token)) != 1]
