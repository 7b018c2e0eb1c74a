"""Write a model in another format, verified: OUT appears only if a reload is the same model.

jaxtune convert MODEL OUT --to hf|gguf|meta|orbax
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_model, add_processes, add_writing
    from jaxtune.weights.formats.registry import model_format_names

    add_model(parser)
    parser.add_argument(
        "out", metavar="OUT", help="the directory to make, for gguf also a file that ends in .gguf"
    )
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"one of {', '.join(model_format_names())}"
    )
    add_writing(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from jaxtune.cli.options import print_export
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.convert import convert_to

    result = convert_to(
        options.model,
        options.out,
        options.to,
        dtype=options.dtype,
        adapter=options.adapter,
        push=options.push,
        reporter=Reporter(),
    )
    print_export(result, options.to, options.json)
