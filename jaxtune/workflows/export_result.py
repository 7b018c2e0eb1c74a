"""What an export gives back, and its way to the hub."""

from dataclasses import dataclass
from pathlib import Path

from jaxtune.core import distributed
from jaxtune.core.errors import UserError
from jaxtune.tracking.progress import Reporter
from jaxtune.weights import hub
from jaxtune.weights.consumers import Consumer
from jaxtune.weights.verify import Comparison


@dataclass(frozen=True)
class ExportResult:
    """A verified export.

    Attributes:
        path: the file or directory that was written.
        comparison: what it was compared on, and how far it differs.
        consumers: which programs read an adapter as it was trained; empty for a whole model.

    """

    path: Path
    comparison: Comparison
    consumers: tuple[Consumer, ...] = ()


def upload_export(path: Path, repository: str | None, reporter: Reporter) -> None:
    """Upload an export to a repository of the hub, if one is named.

    Raises:
        UserError: the hub refused, or could not be reached.

    """
    if not repository or not distributed.is_main():
        return
    reporter.say(f"Uploading to {repository}")
    try:
        reporter.say(f"Uploaded: {hub.push(path, repository)}")
    except UserError as error:
        raise UserError(f"{path} is written and verified, but not uploaded. {error}") from None
