"""Write what a run trained in another program's format; it takes its name only once, read again, it
computes the same.

jaxtune export RUN --to peft --out DIR               the adapter
jaxtune export RUN --to hf --out DIR                 the base with the adapter merged
jaxtune export RUN --to gguf --out model.gguf --dtype q8_0
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_writing
    from jaxtune.weights.formats.registry import format_names

    parser.add_argument("run_directory", metavar="RUN", help="a run directory, finished or stopped")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"one of {', '.join(format_names())}"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the directory to make, for gguf also a file"
    )
    add_writing(parser)


def run(options: argparse.Namespace) -> None:
    """Export."""
    from jaxtune.api import exported
    from jaxtune.cli.options import print_proof
    from jaxtune.tracking.progress import Reporter

    path, proof = exported(
        options.run_directory, options.to, options.out, options.dtype, options.push, Reporter()
    )
    print_proof(path, proof, options.to, options.json)
