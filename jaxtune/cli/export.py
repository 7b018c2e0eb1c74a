"""Export what a run trained, verified: the export appears only if a reload computes the same.

jaxtune export RUN --to peft --out DIR               the adapter
jaxtune export RUN --to peft --exact --out DIR       with scales and ranks as trained
jaxtune export RUN --to hf --out DIR                 the base with the adapter merged
jaxtune export RUN --to gguf --out model.gguf --dtype q8_0
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_processes, add_writing
    from jaxtune.weights.formats.registry import format_names

    parser.add_argument("run_directory", metavar="RUN", help="a run directory, finished or stopped")
    parser.add_argument(
        "--to", required=True, metavar="FORMAT", help=f"one of {', '.join(format_names())}"
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="the directory to make, for gguf also a file"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="with --to peft: keep each module's scale and rank as trained, which PEFT reads but "
        "vLLM and llama.cpp do not (default: one rank and one scale that compute the same)",
    )
    add_writing(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from jaxtune.cli.options import print_export
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.export import export_run

    result = export_run(
        options.run_directory,
        options.out,
        options.to,
        dtype=options.dtype,
        push=options.push,
        exact=options.exact,
        reporter=Reporter(),
    )
    print_export(result, options.to, options.json)
