"""Print the resolved configuration as YAML, or the JSON schema for editors.

jaxtune config [CONFIG.yaml] [key=value ...]
jaxtune config --schema
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtune.config.schema import Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "arguments",
        nargs="*",
        metavar="CONFIG.yaml | key=value",
        help="a configuration file, and keys that override it",
    )
    parser.add_argument("--schema", action="store_true", help="print the JSON schema instead")


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from jaxtune.config.load import dump, schema

    print(schema() if options.schema else dump(load_arguments(options.arguments)).rstrip())


def load_arguments(arguments: list[str]) -> "Config":
    """Return the configuration that `[CONFIG.yaml] [key=value ...]` describes.

    Raises:
        UserError: two files, or anything that is wrong with the configuration.

    """
    from jaxtune.core.errors import UserError, listed
    from jaxtune.tracking.record import load_run

    paths = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(paths) > 1:
        raise UserError(
            f"one configuration file at most, not {listed(paths)}. Overrides have the form "
            "section.key=value."
        )
    return load_run(Path(paths[0]) if paths else None, overrides)
