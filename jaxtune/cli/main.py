"""The command line: one parser, one thin module a command, nothing heavy imported until a
command runs.
"""

import argparse
import contextlib
import importlib
import io
import os
import sys
from collections.abc import Sequence
from pathlib import Path

COMMANDS = {
    "quickstart": "the main job, no arguments: real model, real data, report",
    "train": "train; continues a run directory that has checkpoints",
    "plan": "whether a run fits hardware that is not there, and what it costs",
    "data": "what will be trained on: decoded rows, mask, lengths, packing",
    "eval": "loss, perplexity and task metrics of a model on a file",
    "generate": "the model's answers to prompts",
    "chat": "talk with a model",
    "export": "export what a run trained, verified",
    "convert": "write a model in another format, verified",
    "report": "one page of one run or several",
    "sweep": "search over a run's keys, each trial a run directory",
    "config": "the resolved configuration, or its JSON schema",
}
INTERRUPTED = 128
_COMPUTE = ("train", "eval", "generate", "export", "convert")
_OUTPUTS = ("json", "predictions", "out")
_HUGE_PAGES = "glibc.malloc.hugetlb"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        The exit status: 0 on success, 2 on wrong usage or input, 1 on a failure, 128 + n on signal
            n.

    """
    _accept_any_terminal()
    options = _parse(arguments)
    if arguments is None and options.command in (*_COMPUTE, "quickstart", "chat", "sweep"):
        _restart_with_huge_pages()
    from jaxtune.core.errors import RunError, UserError, is_panic

    if os.environ.get("JAXTUNE_DEBUG") == "1":
        return _run(options)
    try:
        return _run(options)
    except UserError as error:
        _print_error(str(error))
        return 2
    except RunError as error:
        _print_error(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED + 2
    except BrokenPipeError:
        return 1
    except Exception as error:
        return _report_unexpected(error)
    except BaseException as error:
        if not is_panic(error):
            raise
        return _report_unexpected(error)


def _accept_any_terminal() -> None:
    """Print as an escape what a terminal or pipe that is not UTF-8 cannot show."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _restart_with_huge_pages() -> None:
    """Restart this program with its memory in huge pages, where the system leaves that to programs.

    On a CPU every step allocates its working memory anew, hundreds of megabytes: in small pages, up
    to a sixth of the time went into page faults. The C library reads the setting once, as a program
    starts. A setting that is already there is kept.
    """
    pages, tunables = (
        Path("/sys/kernel/mm/transparent_hugepage/enabled"),
        os.environ.get("GLIBC_TUNABLES", ""),
    )
    if (
        not sys.executable
        or _HUGE_PAGES in tunables
        or not pages.exists()
        or "[madvise]" not in pages.read_text()
    ):
        return
    settings = ":".join(part for part in (tunables, f"{_HUGE_PAGES}=1") if part)
    with contextlib.suppress(OSError):  # it goes on in small pages
        os.execve(
            sys.executable,
            [sys.executable, *sys.orig_argv[1:]],
            os.environ | {"GLIBC_TUNABLES": settings},
        )


def _run(options: argparse.Namespace) -> int:
    """Run a command; one that computes runs in all processes, and only the main one prints."""
    from jaxtune.core.files import check_writable
    from jaxtune.tracking.logger import log_to_stderr

    for name in _OUTPUTS:
        if (path := getattr(options, name, None)) and path != "-":
            check_writable(Path(path))
    if options.command not in _COMPUTE:
        with log_to_stderr():
            return options.run(options) or 0
    from jaxtune.cli.options import cluster_of
    from jaxtune.core import distributed, runtime

    runtime.start(cluster_of(options))
    with (
        log_to_stderr(),
        distributed.fail_together(),
        open(os.devnull, "w") as nowhere,
        contextlib.ExitStack() as stack,
    ):
        if not distributed.is_main():
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        return options.run(options) or 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    argparse does not accept key=value arguments after an option, so they are collected here.
    """
    parser = _parser()
    for word in sys.argv[1:] if arguments is None else arguments:
        if any(0xD800 <= ord(character) <= 0xDFFF for character in word):
            parser.error(f"{word!r} is not UTF-8. Rename the file, or set LC_ALL=C.UTF-8")
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "arguments") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.arguments = [*options.arguments, *rest]
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxtune",
        description="Fine-tune LLaMA-family models with JAX, and hand them back to Hugging Face.",
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, text in COMMANDS.items():
        module = importlib.import_module(f"jaxtune.cli.{name}")
        command = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=name)
    return parser


def _version() -> str:
    from jaxtune import __version__

    return f"jaxtune {__version__}"


def _print_error(text: str) -> None:
    """Print a message: what it quotes of files and URLs cannot command a terminal, and names no
    credentials.
    """
    from jaxtune.core.text import visible, without_credentials

    print(f"jaxtune: {visible(without_credentials(text))}", file=sys.stderr)


def _report_unexpected(error: BaseException) -> int:
    """Print an error that no command expected, and return the exit status."""
    from jaxtune.core.distributed import is_main
    from jaxtune.core.errors import Interrupted, describe_os_error, status

    if isinstance(error, Interrupted):
        if is_main():
            _print_error(str(error))
        return INTERRUPTED + error.number
    if isinstance(error, OSError) and (text := describe_os_error(error)):
        _print_error(text)
        return status(error)
    _print_error(
        f"{type(error).__name__}: {error}\nThis is a bug in jaxtune. Set JAXTUNE_DEBUG=1 to see "
        "where."
    )
    return 1
