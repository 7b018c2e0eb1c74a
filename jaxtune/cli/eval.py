"""Loss, perplexity and, where the answers are classes, accuracy of a model on a file of answered rows.

jaxtune eval MODEL [--adapter DIR] --data FILE [--task auto|lm|classification]
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_json, add_model

    add_model(parser)
    parser.add_argument("--data", required=True, metavar="FILE", help="a JSON Lines file")
    parser.add_argument("--task", default="auto", help="auto, lm or classification (default: auto, by the answers)")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="rows computed together; changes no number (default: 32)"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluate."""
    from jaxtune.api import evaluate
    from jaxtune.cli.options import metrics_table, write_json

    result = evaluate(options.model, options.data, options.adapter, task=options.task, batch_size=options.batch_size, quiet=False)
    if options.json != "-":
        print(metrics_table({result["task"]: result}))
    write_json(options.json, result)
