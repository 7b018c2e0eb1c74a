"""Search over a run's keys: each trial is a run directory, a search that was stopped can be
continued, and one page shows what mattered.

jaxtune sweep CONFIG.yaml SWEEP.yaml

SWEEP.yaml, for example:
  metric: accuracy            # or loss (the default), macro_f1, exact_match, rouge_l, chrf ...
  trials: 20
  dir: runs/sweep
  sampler: tpe                # or random, grid
  pruner: none                # or median, hyperband, successive-halving, by evaluations in training
  parameters:
    optimizer.learning_rate: {low: 1e-5, high: 1e-2, log: true}
    adapter.rank: [4, 16, 64]
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_json

    parser.add_argument("config", metavar="CONFIG.yaml", help="the run whose keys are varied")
    parser.add_argument(
        "sweep", metavar="SWEEP.yaml", help="which keys, their values, and the metric to go by"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from pathlib import Path

    from jaxtune.cli.options import write_json
    from jaxtune.config.load import load_sweep
    from jaxtune.report.sweep import REPORT, trial_directory
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.sweep import sweep

    description = load_sweep(Path(options.sweep))
    study = sweep(Path(options.config), Path(options.sweep), Reporter(options.json == "-"))
    directory, best = Path(description.dir), study.best_trial
    best_run = trial_directory(directory, best.user_attrs.get("same as", best.number))
    if options.json != "-":
        values = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(f"{description.metric} {best.value:.4f} with {values}")
        print(f"Run:     {best_run}\nReport:  {directory / REPORT}")
    trials = [
        {
            "number": trial.number + 1,
            "state": trial.state.name.lower(),
            "value": trial.value,
            "parameters": trial.params,
        }
        for trial in study.trials
    ]
    best_trial = {"value": best.value, "run": str(best_run), "parameters": best.params}
    write_json(options.json, {"metric": description.metric, "best": best_trial, "trials": trials})
