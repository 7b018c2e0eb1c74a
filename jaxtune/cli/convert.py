"""Write a model in another format; it takes its name only once, read again, it is the same.

jaxtune convert MODEL OUT --to hf|gguf|meta|orbax
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_model, add_writing
    from jaxtune.weights.formats.registry import model_format_names

    add_model(parser)
    parser.add_argument(
        "out", metavar="OUT", help="the directory to make, for gguf also a file that ends in .gguf"
    )
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"one of {', '.join(model_format_names())}"
    )
    add_writing(parser)


def run(options: argparse.Namespace) -> None:
    """Convert."""
    from jaxtune.api import converted
    from jaxtune.cli.options import print_proof
    from jaxtune.tracking.progress import Reporter

    path, proof = converted(
        options.model,
        options.out,
        options.to,
        options.dtype,
        options.adapter,
        options.push,
        Reporter(),
    )
    print_proof(path, proof, options.to, options.json)
