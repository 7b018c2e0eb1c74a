"""Talk with a model; /base lets you hear what it said before training, /help lists the rest.

jaxtune chat MODEL [--adapter DIR] [--system TEXT]
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_model, add_sampling

    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=1024,
        metavar="N",
        help="of an answer at most (default: 1024)",
    )
    add_sampling(parser)


def run(options: argparse.Namespace) -> None:
    """Talk."""
    import sys

    from rich.console import Console

    from jaxtune.cli.options import sampling_of
    from jaxtune.core import distributed, runtime
    from jaxtune.inference.chat import Chat, ChatModel
    from jaxtune.tracking.progress import Reporter
    from jaxtune.tracking.run_directory import is_run
    from jaxtune.workflows.load import base_and_adapter, open_both, open_model

    runtime.start()
    distributed.require_single_process("jaxtune chat")
    sampling, reporter = sampling_of(options), Reporter()
    reporter.say(f"Loading {options.model}")
    if base_and_adapter(options.model, options.adapter)[1] or is_run(options.model):
        loaded, before = open_both(options.model, options.adapter)
    else:
        loaded, before = open_model(options.model), None
    model = ChatModel(loaded, sampling, options.max_new_tokens)
    base = (lambda: ChatModel(before(), sampling, options.max_new_tokens)) if before else None
    if sys.stdin.isatty():
        import readline  # noqa: F401 (gives `input` its editing and history)

        reporter.say(
            "Write, and press Enter. Ctrl-C begins a new conversation, Ctrl-D leaves, /help lists "
            "what else there is."
        )
    Chat(model, base, options.system, Console(highlight=False, soft_wrap=True)).run()
