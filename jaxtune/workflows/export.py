"""What a run hands back: its adapter or its weights, verified, with a card that says how they
came to be.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import yaml

from jaxtune.adapters.inject import exportable
from jaxtune.config.schema import Config
from jaxtune.core import distributed, runtime
from jaxtune.core.errors import UserError
from jaxtune.core.files import Replacement, read_json, refuse_existing
from jaxtune.core.mesh import make_mesh
from jaxtune.core.text import without_credentials
from jaxtune.data.prepare import Which
from jaxtune.data.sources.opening import file_name
from jaxtune.models.decoder import CausalLM
from jaxtune.models.families.from_hf import from_hf
from jaxtune.tracking.metrics_log import AFTER, BEFORE, phase_of, read_metrics
from jaxtune.tracking.ownership import ADAPTER, DATA_SUMMARY, MODEL
from jaxtune.tracking.progress import Reporter
from jaxtune.tracking.record import checkpoint_directory, first_day, is_run, read_config
from jaxtune.training.checkpoint import Checkpoints
from jaxtune.training.setup import Setup, build_setup
from jaxtune.weights.card import code, code_block
from jaxtune.weights.consumers import Consumer, consumers
from jaxtune.weights.convert import convert_model
from jaxtune.weights.export import export_adapter, export_weights
from jaxtune.weights.formats.registry import get_format
from jaxtune.weights.load import load_model
from jaxtune.weights.peft import attach, open_adapter, write_adapter
from jaxtune.weights.source import resolve
from jaxtune.weights.verify import TEXT, Comparison, pad_texts, sample_texts
from jaxtune.weights.vocabulary import resize_for_adapter, tokenizer_for
from jaxtune.workflows.export_result import ExportResult, upload_export
from jaxtune.workflows.load import stop_ids_of

_VERIFY_ROWS, _VERIFY_TOKENS = 4, 128


def output_name(config: Config) -> str:
    """Return the folder of a run's directory that holds what was trained."""
    return MODEL if config.adapter.method == "none" else ADAPTER


def export_run(
    run_dir: str | Path,
    out: str | Path | None,
    to: str = "peft",
    *,
    dtype: str | None = None,
    push: str | None = None,
    exact: bool = False,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Export a run, verified: its adapter, its base with the adapter merged, or the weights that
    trained.

    A finished run no longer needs its data; of an unfinished one the newest checkpoint is exported.

    Args:
        run_dir: the run.
        out: the directory to make; for a format that is a single file also the file.
        to: the name of a format of `weights.formats`.
        dtype: of merged weights; the base's by default.
        push: a repository of the hub to upload it to.
        exact: whether an adapter keeps scales and ranks as trained, which not every program reads.
        reporter: where progress is shown.

    Raises:
        UserError: not a run, no checkpoint yet, `out` exists, a format that has no place for the
            model, or `exact` where no adapter is written.
        RunError: the export does not compute what was trained.

    """
    if out is None:
        raise UserError("export: say where to with out=DIR (--out DIR).")
    model_format = get_format(to)
    if exact and not model_format.keeps_adapter:
        raise UserError(f"export: exact is for --to peft; --to {to} merges the adapter.")
    reporter, path = reporter or Reporter(quiet=True), Path(out)
    with distributed.main_only_path(path) as target:
        export = _Export(Path(run_dir), target, to, dtype, exact)
        comparison = _export(export, reporter)
    readers = _consumers(export.directory, path) if model_format.keeps_adapter else ()
    upload_export(path, push, reporter)
    return ExportResult(path, comparison, readers)


def _consumers(directory: Path, adapter: Path) -> tuple[Consumer, ...]:
    if not distributed.is_main():
        return ()
    source = resolve(read_config(directory).model.source)
    base = from_hf(source.config_json(), str(source.config_path))
    return consumers(open_adapter(adapter), tied=base.tie_embeddings)


@dataclass(frozen=True)
class _Export:
    """What `export_run` was asked for; see there."""

    directory: Path
    out: Path
    to: str
    dtype: str | None
    exact: bool


def _export(export: _Export, reporter: Reporter) -> Comparison:
    directory, out, to, dtype = export.directory, export.out, export.to, export.dtype
    runtime.start()
    if not is_run(directory):
        raise UserError(f"{directory} is not a run directory: it has no config.yaml.")
    config = read_config(directory)
    if get_format(to).keeps_adapter and config.adapter.method == "none":
        raise UserError(
            f"{directory} has no adapter: its weights were trained. Export them with --to hf."
        )
    if (directory / MODEL).is_dir():
        source, card = resolve(str(directory / MODEL)), describe_run(config, directory)
        stop_ids = stop_ids_of(source, None, source.tokenizer())
        return convert_model(
            out, source, to, make_mesh(), dtype=dtype, stop_ids=stop_ids, about=card
        )
    if (directory / ADAPTER).is_dir():
        return _export_finished(config, export)
    return _export_checkpoint(config, export, reporter)


def _export_finished(config: Config, export: _Export) -> Comparison:
    """Export the adapter of a run's directory, or merge it."""
    directory, out, to, dtype = export.directory, export.out, export.to, export.dtype
    adapter, mesh = open_adapter(directory / ADAPTER), make_mesh()
    source = resize_for_adapter(resolve(config.model.source), adapter)
    tokenizer, card = tokenizer_for(source, adapter), describe_run(config, directory)
    stop_ids = stop_ids_of(source, adapter, tokenizer)
    if not get_format(to).keeps_adapter:
        return convert_model(
            out,
            source,
            to,
            mesh,
            dtype=dtype,
            adapter=adapter,
            tokenizer=tokenizer,
            stop_ids=stop_ids,
            about=card,
        )
    refuse_existing(out)
    dtype, compute = config.model.dtype, config.model.compute_dtype
    model = load_model(source, mesh, dtype=dtype, compute=compute)
    attach(model, adapter, mesh)
    texts = sample_texts(tokenizer, model.config.vocab_size)
    return export_adapter(
        out,
        model,
        source,
        tokenizer,
        texts,
        mesh,
        dtype=dtype,
        compute=compute,
        exact=export.exact,
        stop_ids=stop_ids,
        about=card,
    )


def _export_checkpoint(config: Config, export: _Export, reporter: Reporter) -> Comparison:
    """Export the newest checkpoint of a run that has not finished.

    Raises:
        UserError: the run has no checkpoint.

    """
    directory, out, to, dtype = export.directory, export.out, export.to, export.dtype
    setup = build_setup(config, reporter, first_day(directory))
    checkpoints = Checkpoints(checkpoint_directory(config), config.checkpoint.keep, reporter.say)
    try:
        if checkpoints.latest is None:
            raise UserError(
                f"{directory} has no checkpoint yet. Train first: jaxtune train "
                f"{directory}/config.yaml"
            )
        model = setup.model(checkpoints.restore(setup.state_layout))
    finally:
        checkpoints.close()
    with jax.set_mesh(setup.mesh):
        if get_format(to).keeps_adapter or config.adapter.method == "none":
            return export_trained(setup, model, out, to=to, dtype=dtype, exact=export.exact)
        with tempfile.TemporaryDirectory() as scratch:
            write_adapter(Path(scratch), exportable(model), setup.source.name)
            return convert_model(
                out,
                setup.source,
                to,
                setup.mesh,
                dtype=dtype,
                adapter=open_adapter(scratch),
                tokenizer=setup.tokenizer,
                stop_ids=setup.stop_ids,
                about=describe_run(config, directory),
            )


def export_trained(
    setup: Setup,
    model: CausalLM,
    out: Path,
    *,
    to: str = "hf",
    dtype: str | None = None,
    exact: bool = True,
    replace: Replacement | None = None,
) -> Comparison:
    """Export a run's model: its adapter in PEFT's format, or its weights in the format `to`.

    Args:
        setup: the run.
        model: the trained model.
        out: the directory to make.
        to: the name of a format that holds a whole model; for weights that trained.
        dtype: of these weights; the base's by default.
        exact: of an adapter; see `weights.export.export_adapter`. The adapter in a run's own
            directory is exact.
        replace: whether and how an existing `out` is replaced.

    Raises:
        RunError: the export does not compute what was trained.

    """
    config, tokenizer = setup.config, setup.tokenizer
    card = describe_run(config, Path(config.run.dir))
    if config.adapter.method == "none":
        return export_weights(
            out,
            model,
            setup.source,
            tokenizer,
            setup.mesh,
            to=to,
            dtype=dtype,
            stop_ids=setup.stop_ids,
            about=card,
            replace=replace,
        )
    rows = setup.schedule.examples.items[:_VERIFY_ROWS]
    texts = [row.ids[:_VERIFY_TOKENS].tolist() for row in rows]
    texts += [tokenizer(text)["input_ids"] for text in TEXT]
    return export_adapter(
        out,
        model,
        setup.source,
        tokenizer,
        pad_texts(texts),
        setup.mesh,
        dtype=config.model.dtype,
        compute=config.model.compute_dtype,
        exact=exact,
        stop_ids=setup.stop_ids,
        about=card,
        replace=replace,
    )


def describe_run(config: Config, directory: Path) -> str:
    """Return data, hyperparameters and metrics for a model card, as Markdown."""
    sections = [_data_section(config, directory), _hyperparameters(config), _metrics(directory)]
    return "".join(f"\n{section}\n" for section in sections if section)


def _data_section(config: Config, directory: Path) -> str:
    summary = read_json(directory / DATA_SUMMARY)
    names = _source_names(config, "train")
    lines = ["## Data", "", f"- trained on {names}: {summary['train']['rows']} rows"]
    if "eval" in summary:
        names = _source_names(config, "eval") or config.data.split
        lines.append(f"- evaluated on {names}: {summary['eval']['rows']} rows")
    return "\n".join(lines)


def _source_names(config: Config, part: Which) -> str:
    """Return the sources' names without their folders."""
    return ", ".join(code(_file_name(entry.source)) for entry in config.data.entries(part))


def _file_name(source: str) -> str:
    return file_name(without_credentials(source)) if "://" in source else Path(source).name


def _hyperparameters(config: Config) -> str:
    keys = config.model_dump(
        mode="json",
        include={"adapter", "optimizer", "train", "data"},
        exclude={"data": {"train", "eval"}},
    )
    text = yaml.safe_dump(keys, sort_keys=False).rstrip()
    return f"## Hyperparameters\n\n{code_block(text, 'yaml')}"


def _metrics(directory: Path) -> str:
    rows = [row for row in read_metrics(directory) if phase_of(row) in (BEFORE, AFTER)]
    if not rows:
        return ""
    names = [
        name for name, value in rows[-1].items() if isinstance(value, float) and name != "epoch"
    ]
    heads = " | ".join(
        name if name.isidentifier() else code(name).replace("|", "\\|") for name in names
    )
    lines = ["## Metrics on the evaluation data", "", f"| step | {heads} |"]
    lines.append("|---" * (len(names) + 1) + "|")
    for row in rows:
        values = " | ".join(f"{row[name]:.4f}" for name in names)
        lines.append(f"| {row['step']} | {values} |")
    return "\n".join(lines)
