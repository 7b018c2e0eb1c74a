"""The model's answers to one prompt, or to every row of a JSON Lines file (keys prompt or
messages).

jaxtune generate MODEL [--adapter DIR] --prompt TEXT
jaxtune generate MODEL [--adapter DIR] --file prompts.jsonl
"""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from jaxtune.core.text import visible

if TYPE_CHECKING:
    from jaxtune.inference.speed import Speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    from jaxtune.cli.options import add_json, add_model, add_processes, add_sampling

    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", metavar="TEXT", help="one prompt; the answer is printed as it is"
    )
    prompts.add_argument(
        "--file",
        metavar="FILE",
        help="JSON Lines with prompt or messages; answers are printed as JSON Lines",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=256,
        metavar="N",
        help="the longest answer (default: 256)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that ends an answer; may be repeated",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=8,
        metavar="N",
        help="prompts computed together (default: 8)",
    )
    add_sampling(parser)
    add_json(parser)
    add_processes(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command."""
    from jaxtune.cli.options import sampling_of, write_json
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import read_conversations
    from jaxtune.tracking.progress import Reporter
    from jaxtune.workflows.generate import generate_completions

    prompts: list[Any] = [options.prompt]
    shown = prompts
    if options.file:
        data = DataSection(eval=options.file)
        prompts = list(read_conversations(data, "eval", answered=False))
        shown = [row.prompt[0]["content"] if row.plain else row.prompt for row in prompts]
    reporter = Reporter(options.json == "-")
    result = generate_completions(
        options.model,
        prompts,
        options.adapter,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling_of(options),
        stop=options.stop,
        batch_size=options.batch_size,
        reporter=reporter,
    )
    answers = [
        {"prompt": prompt, "answer": completion.text}
        for prompt, completion in zip(shown, result.completions, strict=True)
    ]
    if options.json != "-":
        for answer in answers:
            line = json.dumps(answer, ensure_ascii=False) if options.file else answer["answer"]
            # In a file or a pipe an answer keeps its bytes.
            print(visible(line) if sys.stdout.isatty() else line)
    reporter.say(speed_text(result.speed))
    details = [
        {
            "tokens": len(completion.tokens),
            "end": completion.end,
            "log_probs": [round(log_prob, 5) for log_prob in completion.log_probs],
        }
        for completion in result.completions
    ]
    write_json(
        options.json, [answer | detail for answer, detail in zip(answers, details, strict=True)]
    )


def speed_text(speed: "Speed") -> str:
    """Return the speed of a generation in a line."""
    return (
        f"read {speed.prompt_tokens:,} tokens at {speed.prefill:,.0f} tok/s, wrote "
        f"{speed.new_tokens:,} at {speed.decode:,.0f} tok/s"
    )
