"""Talk with a model; /base shows what it said before training, /help lists the other commands.

jaxtune chat MODEL [--adapter DIR] [--system TEXT]
"""

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtune.weights.loaded import LoadedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_model, add_sampling

    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="the longest answer (default: 1024)",
    )
    add_sampling(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    import sys

    from rich.console import Console

    from jaxtune.cli.options import sampling_of
    from jaxtune.core import distributed, runtime
    from jaxtune.inference.chat import Chat, ChatModel
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.load import has_base, open_model, open_with_base

    runtime.start()
    distributed.require_single_process("jaxtune chat")
    sampling, reporter = sampling_of(options), Reporter()
    reporter.say(f"Loading {options.model}")
    if has_base(options.model, options.adapter):
        loaded, open_base = open_with_base(options.model, options.adapter)
    else:
        loaded, open_base = open_model(options.model), None

    def to_chat(model: "LoadedModel") -> ChatModel:
        return ChatModel(model, sampling, options.max_new_tokens)

    model = to_chat(loaded)
    base = (lambda: to_chat(open_base())) if open_base else None
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` its editing and history)

        reporter.say(
            "Write, and press Enter. Ctrl-C begins a new conversation, Ctrl-D leaves, /help lists "
            "the commands."
        )
    Chat(model, base, options.system, Console(highlight=False, soft_wrap=True)).run()
