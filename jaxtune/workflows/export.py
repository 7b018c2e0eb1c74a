"""What a run hands back: its adapter or its weights, verified, with a card that says how they
came to be.
"""

import tempfile
from pathlib import Path
from typing import Any

import jax
import yaml

from jaxtune.adapters.inject import exportable
from jaxtune.config.schema import Config
from jaxtune.core import runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import read_json, refuse_existing
from jaxtune.core.mesh import make_mesh
from jaxtune.models.decoder import CausalLM
from jaxtune.tracking.metrics_log import AFTER, BEFORE, phase_of, read_metrics
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.run_directory import (
    ADAPTER,
    DATA_SUMMARY,
    MODEL,
    checkpoint_directory,
    first_day,
    is_run,
    read_config,
)
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.setup import Setup, build_setup
from jaxtune.weights.convert import convert_model
from jaxtune.weights.export import export_adapter, export_weights
from jaxtune.weights.formats.registry import get_format
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.verify import TEXT, Comparison, pad_texts, sample_texts
from jaxtune.weights.vocabulary import resize_for_adapter, tokenizer_for

_VERIFY_ROWS, _VERIFY_TOKENS = 4, 128


def output(config: Config) -> str:
    """Where in its directory a run puts what was trained."""
    return MODEL if config.adapter.method == "none" else ADAPTER


def export_run(
    directory: Path, out: Path, reporter: Reporter, to: str = "peft", dtype: str | None = None
) -> tuple[Path, Comparison]:
    """A verified export of a run: its adapter, or its base with the adapter merged, or the weights
    that trained.

    A finished run needs its data no more; of an unfinished one the newest checkpoint counts.

    Args:
        directory: the run.
        out: what to make.
        reporter: progress.
        to: the name of a format of `weights.formats`.
        dtype: of merged weights; the base's by default.

    Raises:
        UserError: not a run, no checkpoint yet, or a format that has no place for the model.
        RunError: the export is not what was trained.

    """
    runtime.start()
    if not is_run(directory):
        raise UserError(f"{directory} is not a run directory: it has no config.yaml.")
    config, export_format = read_config(directory), get_format(to)
    if export_format.keeps_adapter and config.adapter.method == "none":
        raise UserError(
            f"{directory} has no adapter: its weights were trained. Export them with --to hf."
        )
    if (directory / MODEL).is_dir():
        about = about_run(config, directory)
        return out, convert_model(
            out, resolve(str(directory / MODEL)), to, make_mesh(), dtype=dtype, about=about
        )
    if (directory / ADAPTER).is_dir():
        return out, _export_finished(config, directory, out, to, dtype)
    parts = build_setup(config, reporter, first_day(directory))
    checkpoints = Checkpoints(checkpoint_directory(config), config.checkpoint.keep, reporter.say)
    try:
        if checkpoints.latest is None:
            raise UserError(
                f"{directory} has no checkpoint yet. Train first: jaxtune train "
                f"{directory}/config.yaml"
            )
        model = parts.model(checkpoints.restore(parts.state_layout))
    finally:
        checkpoints.close()
    with jax.set_mesh(parts.mesh):
        if export_format.keeps_adapter or config.adapter.method == "none":
            return out, export_trained(parts, model, out, replace=False, to=to, dtype=dtype)
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(scratch), exportable(model), parts.source.name)
            adapter, about = open_adapter(scratch), about_run(config, directory)
            tokenizer = parts.tokenizer
            return out, convert_model(
                out,
                parts.source,
                to,
                parts.mesh,
                dtype=dtype,
                adapter=adapter,
                tokenizer=tokenizer,
                about=about,
            )


def _export_finished(
    config: Config, directory: Path, out: Path, to: str, dtype: str | None
) -> Comparison:
    adapter, mesh = open_adapter(directory / ADAPTER), make_mesh()
    source, about, kind = (
        resize_for_adapter(resolve(config.model.source), adapter),
        about_run(config, directory),
        config.model,
    )
    tokenizer = tokenizer_for(source, adapter)
    if not get_format(to).keeps_adapter:
        return convert_model(
            out, source, to, mesh, dtype=dtype, adapter=adapter, tokenizer=tokenizer, about=about
        )
    refuse_existing(out)
    model = load_model(source, mesh, dtype=kind.dtype, compute=kind.compute_dtype)
    attach(model, adapter, mesh)
    texts = sample_texts(tokenizer, model.config.vocab_size)
    return export_adapter(
        out,
        model,
        source,
        tokenizer,
        texts,
        mesh,
        dtype=kind.dtype,
        compute=kind.compute_dtype,
        about=about,
    )


def export_trained(
    parts: Setup,
    model: CausalLM,
    out: Path,
    *,
    replace: bool,
    to: str = "hf",
    dtype: str | None = None,
) -> Comparison:
    """The adapter of a run in PEFT's format, or its weights in the format `to`."""
    about, kind = about_run(parts.config, Path(parts.config.run.dir)), parts.config.model
    if parts.config.adapter.method == "none":
        return export_weights(
            out,
            model,
            parts.source,
            parts.tokenizer,
            parts.mesh,
            to=to,
            dtype=dtype,
            about=about,
            replace=replace,
        )
    texts = [
        item.ids[:_VERIFY_TOKENS].tolist() for item in parts.schedule.examples.items[:_VERIFY_ROWS]
    ]
    texts += [parts.tokenizer(text)["input_ids"] for text in TEXT]
    return export_adapter(
        out,
        model,
        parts.source,
        parts.tokenizer,
        pad_texts(texts),
        parts.mesh,
        dtype=kind.dtype,
        compute=kind.compute_dtype,
        about=about,
        replace=replace,
    )


def about_run(config: Config, directory: Path) -> str:
    """Data, hyperparameters and metrics for a model card, as Markdown."""
    data = read_json(directory / DATA_SUMMARY)
    rows, names = (
        data["train"]["rows"],
        {part: _source_names(config, part) for part in ("train", "eval")},
    )
    lines = ["## Data", "", f"- trained on {names['train']}: {rows} rows"]
    lines += (
        [f"- evaluated on {names['eval'] or config.data.split}: {data['eval']['rows']} rows"]
        if "eval" in data
        else []
    )
    kept = config.model_dump(
        mode="json",
        include={"adapter", "optimizer", "train", "data"},
        exclude={"data": {"train", "eval"}},
    )
    lines += [
        "",
        "## Hyperparameters",
        "",
        "```yaml",
        yaml.safe_dump(kept, sort_keys=False).rstrip(),
        "```",
    ]
    rows = [row for row in read_metrics(directory) if phase_of(row) in (BEFORE, AFTER)]
    if rows:
        names = [
            name for name, value in rows[-1].items() if isinstance(value, float) and name != "epoch"
        ]
        lines += [
            "",
            "## Metrics on the evaluation data",
            "",
            "| step | " + " | ".join(names) + " |",
            "|---" * (len(names) + 1) + "|",
        ]
        lines += [
            f"| {row['step']} | " + " | ".join(f"{row[name]:.4f}" for name in names) + " |"
            for row in rows
        ]
    return "\n" + "\n".join(lines) + "\n"


def _source_names(config: Config, part: Any) -> str:
    """The sources' names without their folders."""
    return ", ".join(f"`{Path(entry.source).name}`" for entry in config.data.entries(part))
