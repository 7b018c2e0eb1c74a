"""The model's answers to one prompt, or to every row of a JSON Lines file (keys prompt or messages).

jaxtune generate MODEL [--adapter DIR] --prompt TEXT
jaxtune generate MODEL [--adapter DIR] --file prompts.jsonl
"""

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    from jaxtune.cli.options import add_json, add_model

    add_model(parser)
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer is printed as it is")
    prompts.add_argument("--file", metavar="FILE", help="JSON Lines with prompt or messages; answers are printed as JSON Lines")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="at most so many tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K most likely tokens; 0 is all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest tokens that reach P together")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws")
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Generate."""
    from jaxtune.api import generate
    from jaxtune.cli.options import write_json
    from jaxtune.config.schema import DataSection
    from jaxtune.data.prepare import conversations

    rows = list(conversations(DataSection(eval=options.file), "eval", answered=False)) if options.file else []
    prompts = [row.prompt[0]["content"] if row.plain else row.prompt for row in rows] or [options.prompt]
    texts = generate(
        options.model,
        rows or prompts,
        options.adapter,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
    )
    answers = [{"prompt": prompt, "answer": text} for prompt, text in zip(prompts, texts, strict=True)]
    if options.json != "-":
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False) if options.file else answer["answer"])
    write_json(options.json, answers)
