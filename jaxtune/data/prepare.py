"""From what `data.train` and `data.eval` name to examples: read, tokenized once, kept on disk."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal

import numpy as np

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError, listed
from jaxtune.core.tokenizer import Tokenizer
from jaxtune.data.chat.template import template_of
from jaxtune.data.chat.tokenize import ConversationTokenizer, Document
from jaxtune.data.comparisons import build_comparisons
from jaxtune.data.examples import Examples, build_examples, join_examples
from jaxtune.data.formats.answers import AnswerComparison, read_answers
from jaxtune.data.formats.conversation import Conversation
from jaxtune.data.formats.registry import AUTO, detect_format, read_conversation
from jaxtune.data.sources.row import RowError, RowErrors
from jaxtune.data.sources.source import RowSource, open_source
from jaxtune.data.store import VERSION, Store, Writer, cache_directory, new_store, open_store

Which = Literal["train", "eval"]
ReadProgress = Callable[[float, str], None]
"""Called with the fraction that is done and a few words."""

_CHUNK_ROWS, _CHUNK_CHARACTERS = 512, 1 << 20
_ENCODERS = 2  # while one waits for Python's lock to hand over its tokens, the other encodes
_REPORT_SECONDS = 1.0


def prepare(
    data: DataSection,
    tokenizer: Tokenizer,
    which: Which = "train",
    *,
    progress: ReadProgress | None = None,
    day: date | None = None,
    comparison: AnswerComparison | None = None,
) -> Examples:
    """Tokenize, mask and truncate all rows of a part of the data; from the second time on they are
    read from the cache.

    Args:
        data: sources, format, mask and length.
        tokenizer: the model's tokenizer.
        which: the training part or the evaluation part.
        progress: see `ReadProgress`; not called for what is quick.
        day: the date for chat templates that print one; today's by default.
        comparison: what is compared where the objective compares answers.

    Raises:
        UserError: a source that does not exist; a bad row, with its line; or no row has anything
            supervised.

    """
    settings = _Tokenization(data, tokenizer, day, comparison)
    parts = []
    for source, weight in _open_sources(data, which):
        store = _tokenize(source, settings, progress)
        documents = np.flatnonzero(_belongs_to(store.documents["prompt"], data, which))
        store.release()
        length, name = data.max_length, source.name
        parts.append(
            build_comparisons(store, documents, length, name, comparison, weight)
            if comparison
            else build_examples(store, documents, length, name, weight)
        )
    examples = join_examples(parts)
    if not len(examples.items):
        raise _nothing_to_train(examples, data, which)
    return examples


def _nothing_to_train(examples: Examples, data: DataSection, which: Which) -> UserError:
    if data.fraction and not examples.rows:
        return UserError(
            f"{examples.source}: data.split = {data.split} leaves no row for {which}. Give "
            "more rows or another share."
        )
    rows = [
        location
        for locations in (examples.cut_off, examples.unanswered, examples.bad)
        for location in locations[:3]
    ]
    return UserError(
        f"{examples.source}: no row has a supervised token within data.max_length = "
        f"{data.max_length}. Raise data.max_length, or give rows with an assistant's answer "
        f"({listed(rows, 3)})."
    )


def read_conversations(
    data: DataSection,
    which: Which,
    errors: RowErrors | None = None,
    *,
    answered: bool = True,
    comparison: AnswerComparison | None = None,
) -> Iterator[Conversation]:
    """Yield the rows of a part of the data as they were written, one after the other.

    Args:
        data: sources and format.
        which: the training part or the evaluation part.
        errors: takes the bad rows; by default what `data.on_error` says.
        answered: whether a prompt needs a completion.
        comparison: what is compared where the objective compares answers; each answer is a
            conversation then.

    Raises:
        UserError: a source that does not exist, or a bad row.

    """
    errors = errors or RowErrors(data.on_error)
    for source, _ in _open_sources(data, which):
        for row in _ConversationReader(source, data, comparison, answered):
            if isinstance(row, RowError):
                errors.add(row)
            elif _belongs_to(np.array([row.digests()[1]], np.uint64), data, which)[0]:
                yield row


def has_part(data: DataSection, which: Which) -> bool:
    """Return whether there is anything to train or to evaluate on."""
    return bool(data.entries(which)) or (which == "eval" and data.fraction > 0 and bool(data.train))


@dataclass(frozen=True)
class _Tokenization:
    """All that the tokens of a source depend on, beside its rows; arguments of `prepare`."""

    data: DataSection
    tokenizer: Tokenizer
    day: date | None
    comparison: AnswerComparison | None

    def key(self, identity: str) -> str:
        """Return the name of a store, a digest of all that its contents depend on."""
        data, tokenizer = self.data, self.tokenizer
        parts = [
            VERSION, identity, data.format, data.columns, data.train_on,
            template_of(tokenizer, self.day).source(), str(tokenizer.chat_template),
            tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str(),
            *([self.comparison] if self.comparison else []),
        ]  # fmt: skip
        text = json.dumps(parts, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _tokenize(source: RowSource, settings: _Tokenization, progress: ReadProgress | None) -> Store:
    """Return a source's tokens, from the cache where they are there.

    Raises:
        UserError: a bad row (with `data.on_error=raise`), or a disk that cannot be written.

    """
    identity = source.identity()
    path = cache_directory() / settings.key(identity or f"{source.name}:{time.time_ns()}")
    store = open_store(path) if identity else None
    if store and (settings.data.on_error == "skip" or not store.manifest["bad"]):
        return store
    with new_store(path, settings.tokenizer) as writer:
        _fill(writer, source, settings, progress)
    store = open_store(path)
    if store is None:
        raise UserError(f"{path} was removed while it was being written. Run the command again.")
    return store


def _open_sources(data: DataSection, which: Which) -> list[tuple[RowSource, float]]:
    """Open what a part is read from, each with its weight: with `data.split`, both parts are read
    from `data.train`.
    """
    part: Which = "train" if data.fraction else which
    entries = data.entries(part)
    if not entries:
        raise UserError(
            f"data.{part} is not set. Give a file of examples, for example data.{part}=rows.jsonl."
        )
    return [
        (open_source(entry, part), entry.weight if which == "train" else 1.0) for entry in entries
    ]


def _belongs_to(prompts: np.ndarray, data: DataSection, which: Which) -> np.ndarray:
    """Return which rows belong to a part, by the hashes of their prompts: rows with the same prompt
    are never on both sides.
    """
    if not data.fraction:
        return np.ones(len(prompts), bool)
    held_out = prompts < np.uint64(data.fraction * 2.0**64)
    return held_out if which == "eval" else ~held_out


class _ConversationReader:
    """A source's rows as conversations; the format is that of the first row that has one."""

    def __init__(
        self,
        source: RowSource,
        data: DataSection,
        comparison: AnswerComparison | None,
        answered: bool = True,
    ) -> None:
        self.source, self.data, self.format, self.answered = source, data, data.format, answered
        self.comparison: AnswerComparison | None = comparison

    def __iter__(self) -> Iterator[Conversation | RowError]:
        columns = self.data.columns
        for row in self.source.rows():
            if isinstance(row, RowError):
                yield row
                continue
            if self.format == AUTO:
                self.format = detect_format(row.value, columns) or AUTO
            try:
                if self.comparison:
                    yield from read_answers(row, self.format, columns, self.comparison)
                else:
                    yield read_conversation(
                        row, self.format, columns=columns, answered=self.answered
                    )
            except RowError as error:
                yield error


def _fill(
    writer: Writer, source: RowSource, settings: _Tokenization, progress: ReadProgress | None
) -> None:
    """Read, render and encode a source; while one chunk is encoded, the next is read and rendered.
    Where answers are compared, the last one of each conversation is trained.
    """
    data, comparison = settings.data, settings.comparison
    train_on = "last" if comparison else data.train_on
    tokenizer = ConversationTokenizer(settings.tokenizer, train_on, settings.day)
    rows, errors = _ConversationReader(source, data, comparison), RowErrors(data.on_error)
    report = _Report(source, writer, progress)
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(_ENCODERS) as pool:
        for chunk in _chunks(rows):
            texts = iter(tokenizer.render([row for row in chunk if not isinstance(row, RowError)]))
            rendered = [row if isinstance(row, RowError) else next(texts) for row in chunk]
            pending.append(pool.submit(tokenizer.encode, rendered))
            if len(pending) > _ENCODERS:
                _write(pending.popleft().result(), writer, errors)
            report()
        while pending:
            _write(pending.popleft().result(), writer, errors)
    writer.close({"source": source.name, "format": rows.format, "bad": errors.messages})


def _write(encoded: list[list[Document] | RowError], writer: Writer, errors: RowErrors) -> None:
    for documents in encoded:
        if isinstance(documents, RowError):
            errors.add(documents)
    writer.add(
        document
        for documents in encoded
        if not isinstance(documents, RowError)
        for document in documents
    )


def _chunks(rows: _ConversationReader) -> Iterator[list[Conversation | RowError]]:
    chunk: list[Conversation | RowError] = []
    size = 0
    for row in rows:
        chunk.append(row)
        if not isinstance(row, RowError):
            size += sum(len(message["content"]) for message in row.messages)
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Report:
    """Reports progress once a second."""

    def __init__(self, source: RowSource, writer: Writer, progress: ReadProgress | None) -> None:
        self._source, self._writer, self._progress = source, writer, progress
        self._began = self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._progress is None or now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        done, total = self._source.progress()
        rate = self._writer.tokens / (now - self._began)
        self._progress(
            min(done / total, 1.0) if total else 0.0,
            f"{self._writer.tokens:,} tokens  {rate:,.0f} tok/s",
        )
