"""The model's answers to one prompt, or to every row of a JSON Lines file (keys prompt or
messages).

jaxtune generate MODEL [--adapter DIR] --prompt TEXT
jaxtune generate MODEL [--adapter DIR] --file prompts.jsonl
"""

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxtune.inference.engine import Speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_json, add_model, add_sampling

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
        help="at most so many tokens (default: 256)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="a text that ends an answer; may be given again",
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


def run(options: argparse.Namespace) -> None:
    """Generate."""
    from jaxtune.api import generated
    from jaxtune.cli.options import sampling_of, write_json
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import read_conversations
    from jaxtune.tracking.progress import Reporter

    rows = (
        list(read_conversations(DataSection(eval=options.file), "eval", answered=False))
        if options.file
        else []
    )
    prompts = [row.prompt[0]["content"] if row.plain else row.prompt for row in rows] or [
        options.prompt
    ]
    reporter, asked = (
        Reporter(options.json == "-"),
        (options.max_new_tokens, sampling_of(options), options.stop, options.batch_size),
    )
    said, speed = generated(options.model, rows or prompts, options.adapter, *asked, reporter)
    answers = [
        {"prompt": prompt, "answer": one.text} for prompt, one in zip(prompts, said, strict=True)
    ]
    if options.json != "-":
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False) if options.file else answer["answer"])
    reporter.say(speed_text(speed))
    details = [
        {
            "tokens": len(one.tokens),
            "end": one.end,
            "log_probs": [round(p, 5) for p in one.log_probs],
        }
        for one in said
    ]
    write_json(
        options.json, [answer | detail for answer, detail in zip(answers, details, strict=True)]
    )


def speed_text(speed: "Speed") -> str:
    """How fast it was."""
    return f"read {speed.prompt_tokens:,} tokens at {speed.prefill:,.0f} tok/s, wrote {speed.new_tokens:,} at {speed.decode:,.0f} tok/s"
