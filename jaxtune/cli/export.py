"""Write a run's adapter in PEFT's format; it takes its name only once its reload computes what was trained.

jaxtune export RUN --to peft --out DIR
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_json

    parser.add_argument("run_directory", metavar="RUN", help="a run directory, finished or stopped")
    parser.add_argument("--to", required=True, choices=("peft",), help="the format")
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to make")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Export."""
    from pathlib import Path

    from jaxtune.cli.options import write_json
    from jaxtune.train.progress import Reporter
    from jaxtune.training import export_run
    from jaxtune.weights.export import as_dict

    path, proof = export_run(Path(options.run_directory), Path(options.out), Reporter())
    peft = f"{proof.peft_difference:.1e}" if proof.peft_note is None else f"not run ({proof.peft_note})"
    if options.json != "-":
        print(f"{path}: verified over {proof.tokens} tokens; reload differs by {proof.reload_difference:.1e}, PEFT {peft}")
    write_json(options.json, {"out": str(path), **as_dict(proof)})
