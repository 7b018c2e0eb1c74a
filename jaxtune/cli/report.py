"""One page of one run or several: curves, metrics before and after, samples, data, configuration.

jaxtune report RUN [RUN ...] [--out FILE.html]
jaxtune report SWEEP                                   the trials of a search
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories")
    parser.add_argument(
        "--out", metavar="FILE.html", help="the page (default: report.html in the first run)"
    )


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from jaxtune.report.page import write_report
    from jaxtune.report.sweep import NAME, read_study, write_sweep_report

    runs = [Path(run) for run in options.runs]
    if (runs[0] / NAME).exists():
        study, plan = read_study(runs[0])
        print(write_sweep_report(study, plan, runs[0]))
        return
    print(write_report(runs, Path(options.out) if options.out else runs[0] / "report.html"))
