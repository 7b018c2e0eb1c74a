"""Search over a run's keys: each trial is a run directory, a search that was stopped goes on, and
one page shows what mattered.

jaxtune sweep CONFIG.yaml SWEEP.yaml

SWEEP.yaml, for example:
  metric: accuracy            # or loss (the default), macro_f1, exact_match, token_f1, rouge_l,
  chrf ... trials: 20 dir: runs/sweep sampler: tpe                # or random, grid pruner: none
  # or median, hyperband, successive-halving: by the evaluations on the way parameters:
    optimizer.learning_rate: {low: 1e-5, high: 1e-2, log: true}
    adapter.rank: [4, 16, 64]
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_json

    parser.add_argument("config", metavar="CONFIG.yaml", help="the run whose keys are varied")
    parser.add_argument(
        "sweep", metavar="SWEEP.yaml", help="which keys, over what, by which figure"
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Search."""
    from pathlib import Path

    from jaxtune.cli.options import write_json
    from jaxtune.config.load import load_sweep
    from jaxtune.report.sweep import REPORT, trial_directory
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.sweep import sweep

    plan = load_sweep(Path(options.sweep))
    study = sweep(Path(options.config), Path(options.sweep), Reporter(options.json == "-"))
    directory, best = Path(plan.dir), study.best_trial
    found = trial_directory(directory, best.user_attrs.get("same as", best.number))
    if options.json != "-":
        print(
            f"{plan.metric} {best.value:.4f} with "
            + " ".join(f"{key}={value}" for key, value in best.params.items())
        )
        print(f"Run:     {found}\nReport:  {directory / REPORT}")
    trials = [
        {
            "number": one.number + 1,
            "state": one.state.name.lower(),
            "value": one.value,
            "parameters": one.params,
        }
        for one in study.trials
    ]
    write_json(
        options.json,
        {
            "metric": plan.metric,
            "best": {"value": best.value, "run": str(found), "parameters": best.params},
            "trials": trials,
        },
    )
