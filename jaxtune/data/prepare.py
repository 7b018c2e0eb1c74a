"""From what `data.train` and `data.eval` name to examples: read, tokenized once, kept on disk."""

import hashlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import date
from typing import Any, Literal

import numpy as np

from jaxtune.config.schema import DataSection
from jaxtune.core.errors import UserError, listed
from jaxtune.data.chat.tokenize import ConversationTokenizer, template_of
from jaxtune.data.examples import Examples, cut, joined
from jaxtune.data.formats.conversation import Conversation, conversation, detect
from jaxtune.data.formats.preference import Comparison, answers_of, compared
from jaxtune.data.sources.row import RowError, RowErrors
from jaxtune.data.sources.source import RowSource, open_source
from jaxtune.data.store import VERSION, Store, Writer, cache_directory, new_store, open_store

Which = Literal["train", "eval"]
Progress = Callable[[float, str], None]
"""Called with the fraction that is done and a few words."""

_CHUNK_ROWS, _CHUNK_CHARACTERS = 512, 1 << 20
_ENCODERS = 2  # while one waits for Python's lock to hand over its tokens, the other encodes
_REPORT_SECONDS = 1.0


def prepare(
    data: DataSection,
    tokenizer: Any,
    which: Which = "train",
    progress: Progress | None = None,
    day: date | None = None,
    comparison: Comparison | None = None,
) -> Examples:
    """Tokenize, mask and cut all rows of a part of the data; from the second time on they are read
    from the cache.

    Args:
        data: sources, format, mask and length.
        tokenizer: the model's tokenizer.
        which: the training part or the evaluation part.
        progress: see `Progress`; not called for what is quick.
        day: the date for chat templates that print one; today's by default.
        comparison: what is compared where the objective compares answers.

    Raises:
        UserError: a source that is not there; a bad row, with its line; or no row has anything
            supervised.

    """
    found = []
    for source, weight in _sources(data, which):
        store = tokenized(source, tokenizer, data, progress, day, comparison)
        chosen = np.flatnonzero(_belongs(store.documents["prompt"], data, which))
        store.let_go()
        if comparison:
            found.append(compared(store, chosen, data.max_length, source.name, comparison, weight))
        else:
            found.append(cut(store, chosen, data.max_length, source.name, weight))
    examples = joined(found)
    if not len(examples.items):
        if data.fraction and not examples.rows:
            raise UserError(
                f"{examples.source}: data.split = {data.split} leaves no row for {which}. Give "
                "more rows or another share."
            )
        which_rows = [
            place
            for places in (examples.cut_off, examples.unanswered, examples.bad)
            for place in places[:3]
        ]
        raise UserError(
            f"{examples.source}: no row has a supervised token within data.max_length = "
            f"{data.max_length}. "
            "Raise data.max_length, or give rows with an assistant's answer "
            f"({listed(which_rows, 3)})."
        )
    return examples


def conversations(
    data: DataSection,
    which: Which,
    problems: RowErrors | None = None,
    *,
    answered: bool = True,
    comparison: Comparison | None = None,
) -> Iterator[Conversation]:
    """The rows of a part of the data as they were written, one after the other; bad ones go to
    `problems`.

    Args:
        data: sources and format.
        which: the training part or the evaluation part.
        problems: what becomes of bad rows; by default what `data.on_error` says.
        answered: whether a prompt needs a completion.
        comparison: what is compared where the objective compares answers; each answer is a
            conversation then.

    Raises:
        UserError: a source that is not there, or a bad row.

    """
    problems = problems or RowErrors(data.on_error)
    for source, _ in _sources(data, which):
        for row in _Read(source, data, comparison, answered):
            if isinstance(row, RowError):
                problems.add(row)
            elif _belongs(np.array([row.digests()[1]], np.uint64), data, which)[0]:
                yield row


def has_part(data: DataSection, which: Which) -> bool:
    """Whether there is anything to train or to evaluate on."""
    return bool(data.entries(which)) or (which == "eval" and data.fraction > 0 and bool(data.train))


def tokenized(
    source: RowSource,
    tokenizer: Any,
    data: DataSection,
    progress: Progress | None = None,
    day: date | None = None,
    comparison: Comparison | None = None,
) -> Store:
    """A source's tokens, from the cache where they are there.

    Raises:
        UserError: a bad row (with `data.on_error=raise`), or a disk that cannot be written.

    """
    identity = source.identity()
    key = _key(identity or f"{source.name}:{time.time_ns()}", tokenizer, data, day, comparison)
    path = cache_directory() / key
    store = open_store(path) if identity else None
    if store and (data.on_error == "skip" or not store.about["bad"]):
        return store
    with new_store(path, tokenizer) as writer:
        _fill(writer, source, tokenizer, data, progress, day, comparison)
    store = open_store(path)
    if store is None:
        raise UserError(f"{path} was removed while it was being written. Run the command again.")
    return store


def _sources(data: DataSection, which: Which) -> list[tuple[RowSource, float]]:
    """What a part is read from: with `data.split`, both are read from `data.train`."""
    part: Which = "train" if data.fraction else which
    entries = data.entries(part)
    if not entries:
        raise UserError(
            f"data.{part} is not set. Give a file of examples, for example data.{part}=rows.jsonl."
        )
    return [
        (open_source(entry, part), entry.weight if which == "train" else 1.0) for entry in entries
    ]


def _belongs(prompts: np.ndarray, data: DataSection, which: Which) -> np.ndarray:
    """Which rows are of a part, by the hashes of their prompts: rows with the same prompt are
    never on both sides.
    """
    if not data.fraction:
        return np.ones(len(prompts), bool)
    held_out = prompts < np.uint64(data.fraction * 2.0**64)
    return held_out if which == "eval" else ~held_out


class _Read:
    """A source's rows as conversations; the format is that of the first row which has one."""

    def __init__(
        self,
        source: RowSource,
        data: DataSection,
        comparison: Comparison | None,
        answered: bool = True,
    ) -> None:
        self.source, self.data, self.format, self.answered = source, data, data.format, answered
        self.comparison: Comparison | None = comparison

    def __iter__(self) -> Iterator[Conversation | RowError]:
        for row in self.source.rows():
            if isinstance(row, RowError):
                yield row
                continue
            if self.format == "auto":
                self.format = detect(row.value, self.data.columns) or "auto"
            try:
                if self.comparison:
                    yield from answers_of(row, self.format, self.data.columns, self.comparison)
                else:
                    yield conversation(
                        row, self.format, columns=self.data.columns, answered=self.answered
                    )
            except RowError as error:
                yield error


def _fill(
    writer: Writer,
    source: RowSource,
    tokenizer: Any,
    data: DataSection,
    progress: Progress | None,
    day: date | None,
    comparison: Comparison | None,
) -> None:
    """Read, render and encode; while one chunk is encoded, the next is read and rendered. What
    is compared is the last answer.
    """
    tokenizer = ConversationTokenizer(tokenizer, "last" if comparison else data.train_on, day)
    rows, problems = _Read(source, data, comparison), RowErrors(data.on_error)
    report = _Report(source, writer, progress)
    pending: deque[Future[Any]] = deque()
    with ThreadPoolExecutor(_ENCODERS) as pool:
        for chunk in _chunks(rows):
            texts = iter(tokenizer.render([row for row in chunk if not isinstance(row, RowError)]))
            rendered = [row if isinstance(row, RowError) else next(texts) for row in chunk]
            pending.append(pool.submit(tokenizer.encode, rendered))
            if len(pending) > _ENCODERS:
                _take(pending.popleft().result(), writer, problems)
            report()
        while pending:
            _take(pending.popleft().result(), writer, problems)
    writer.close({"source": source.name, "format": rows.format, "bad": problems.found})


def _take(found: list[Any], writer: Writer, problems: RowErrors) -> None:
    for documents in found:
        if isinstance(documents, RowError):
            problems.add(documents)
    writer.add(
        document
        for documents in found
        if not isinstance(documents, RowError)
        for document in documents
    )


def _chunks(rows: _Read) -> Iterator[list[Conversation | RowError]]:
    chunk: list[Conversation | RowError] = []
    size = 0
    for row in rows:
        chunk.append(row)
        size += (
            0
            if isinstance(row, RowError)
            else sum(len(message["content"]) for message in row.messages)
        )
        if len(chunk) >= _CHUNK_ROWS or size >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


class _Report:
    """Tells the progress once a second."""

    def __init__(self, source: RowSource, writer: Writer, progress: Progress | None) -> None:
        self._source, self._writer, self._progress = source, writer, progress
        self._began = self._last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self._progress is None or now - self._last < _REPORT_SECONDS:
            return
        self._last = now
        done, size = self._source.progress()
        rate = self._writer.tokens / (now - self._began)
        self._progress(
            min(done / size, 1.0) if size else 0.0,
            f"{self._writer.tokens:,} tokens  {rate:,.0f} tok/s",
        )


def _key(
    identity: str,
    tokenizer: Any,
    data: DataSection,
    day: date | None,
    comparison: Comparison | None,
) -> str:
    """Names a store by all that its contents depend on."""
    parts = [
        VERSION, identity, data.format, data.columns, data.train_on,
        template_of(tokenizer, day).source(), str(tokenizer.chat_template),
        tokenizer.special_tokens_map, tokenizer.backend_tokenizer.to_str(),
        *([comparison] if comparison else []),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
