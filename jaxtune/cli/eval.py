"""Loss, perplexity and task metrics of a model on a file of answered rows, with 95% intervals; or
tasks of lm-evaluation-harness.

jaxtune eval MODEL [--adapter DIR] --data FILE [--task auto|lm|classification|qa|generation|choice]
jaxtune eval RUN --data FILE --base                  before and after, compared row by row
jaxtune eval MODEL --harness arc_easy,my_task [--include-path DIR] [--limit N] [--num-fewshot N]
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_json, add_model, add_processes

    add_model(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--data", metavar="FILE", help="a file, directory or data set of the hub with answered rows"
    )
    what.add_argument(
        "--harness",
        metavar="TASKS",
        help="instead: names of lm-evaluation-harness tasks, separated by commas",
    )
    parser.add_argument(
        "--task",
        default="auto",
        help="auto (by the answers), lm, classification, qa, generation or choice (default: auto)",
    )
    parser.add_argument(
        "--base",
        action="store_true",
        help="also evaluate the model before training, and compare the two row by row",
    )
    parser.add_argument("--against", metavar="MODEL", help="the same with another model")
    parser.add_argument(
        "--predictions",
        metavar="FILE",
        help="write each row's prompt, reference and model's answer (JSON Lines)",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help="the longest generated answer (default: 1.5 times the longest reference, + 16)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="rows computed together; it changes no number (default: 32)",
    )
    parser.add_argument(
        "--include-path",
        metavar="DIR",
        help="with --harness: a directory with your own tasks (YAML)",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="with --harness: only the first N rows of each task"
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="with --harness: examples before each question (default: the task's)",
    )
    parser.add_argument(
        "--chat", action="store_true", help="with --harness: through the model's chat template"
    )
    add_json(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    if options.harness:
        _run_harness(options)
        return
    from pathlib import Path

    from jaxtune.cli.options import metrics_table, write_json
    from jaxtune.core.distributed import is_main
    from jaxtune.core.files import write_jsonl
    from jaxtune.evaluation.evaluate import EvalOptions
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.evaluate import evaluate_model

    result = evaluate_model(
        options.model,
        options.data,
        options.adapter,
        options=EvalOptions(options.task, options.batch_size, options.max_new_tokens),
        base=options.base,
        against=options.against,
        reporter=Reporter(),
    )
    metrics = result.metrics
    if options.json != "-":
        columns = {metrics["task"]: metrics}
        if "base" in metrics:
            other = "base" if options.base else "the other"
            columns = {other: metrics["base"], "this": metrics}
        print(metrics_table(columns, metrics.get("comparison")))
    if options.predictions and is_main():
        write_jsonl(Path(options.predictions), result.predictions)
    write_json(options.json, metrics)


def _run_harness(options: argparse.Namespace) -> None:
    from jaxtune.cli.options import write_json
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.evaluate import run_harness

    results = run_harness(
        options.model,
        options.harness.split(","),
        options.adapter,
        base=options.base,
        against=options.against,
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        chat=options.chat,
        batch_size=options.batch_size,
        reporter=Reporter(),
    )
    if options.json != "-":
        from lm_eval.utils import make_table

        for name, of_model in results.items():
            print(f"{name}\n{make_table(of_model)}")
    write_json(options.json, results)
