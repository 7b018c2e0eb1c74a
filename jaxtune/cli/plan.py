"""Whether a run fits hardware that is not there, and what it costs: its step is compiled for that
hardware, without weights, data or accelerator.

jaxtune plan CONFIG.yaml --on v5e:4x4 [key=value ...]
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_config, add_json

    add_config(parser)
    parser.add_argument(
        "--on",
        required=True,
        metavar="TARGET",
        help="here, v5e:4x4, v5p:4x4x4, v6e:8x8, 2*v5e:4x4 (two slices), h100:16, h200:8",
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="try meshes, micro-batches, remat and dtypes, and show the best few",
    )
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import dataclasses

    from jaxtune.cli.options import config_of, write_json
    from jaxtune.planning.planner import plan
    from jaxtune.planning.show import plan_text, search_text
    from jaxtune.tracking.progress import Reporter

    config, quiet = config_of(options), options.json == "-"
    if options.search:
        from jaxtune.planning.search import search

        with Reporter(quiet).task("Compiling", 1) as bar:
            fitting = search(config, options.on, bar.update_of)
        if not quiet:
            print(search_text(fitting, options.on))
        entries = [{"set": entry.keys, **dataclasses.asdict(entry.plan)} for entry in fitting]
        write_json(options.json, entries)
        return
    Reporter(quiet).say(f"Compiling the step for {options.on}")
    result = plan(config, options.on)
    if not quiet:
        print(plan_text(result))
    write_json(options.json, dataclasses.asdict(result))
