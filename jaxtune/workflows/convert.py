"""Write a model in another format, verified."""

from pathlib import Path

from jaxtune.core import distributed, runtime
from jaxtune.core.mesh import make_mesh
from jaxtune.tracking.progress import Reporter
from jaxtune.weights.convert import convert_model
from jaxtune.weights.formats.registry import get_model_format
from jaxtune.weights.vocabulary import tokenizer_for
from jaxtune.workflows.export_result import ExportResult, upload_export
from jaxtune.workflows.load import locate_model, stop_ids_of


def convert_to(
    model: str,
    out: str | Path,
    to: str = "hf",
    *,
    dtype: str | None = None,
    adapter: str | None = None,
    push: str | None = None,
    reporter: Reporter | None = None,
) -> ExportResult:
    """Write a model in another format; see `api.convert`.

    Args:
        model: see `load.locate_model`; an adapter is merged.
        out: the directory to make; for a format that is a single file also the file.
        to: the name of a format that holds a whole model.
        dtype: of the weights; each tensor's own by default.
        adapter: a PEFT adapter directory to merge.
        push: a repository of the hub to upload it to.
        reporter: where progress is shown.

    Raises:
        UserError: a bad model, `out` exists, or a format that has no place for the model.
        RunError: what was written is not the same model.

    """
    get_model_format(to)
    runtime.start()
    reporter, path = reporter or Reporter(quiet=True), Path(out)
    source, opened = locate_model(str(model), adapter).open()
    tokenizer = tokenizer_for(source, opened)
    reporter.say(f"Writing {out}, reading it again and comparing")
    with distributed.main_only_path(path) as target:
        comparison = convert_model(
            target,
            source,
            to,
            make_mesh(),
            dtype=dtype,
            adapter=opened,
            tokenizer=tokenizer,
            # A base that was never tuned here keeps the stop tokens that it came with.
            stop_ids=stop_ids_of(source, opened, tokenizer) if opened else (),
        )
    upload_export(path, push, reporter)
    return ExportResult(path, comparison)
