"""What trackers have of a run that goes on."""

import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from tensorboard.summary import Writer

from jaxtune.config.load import load_config
from jaxtune.tracking.trackers import Trackers


@pytest.mark.parametrize("by_earlier_version", [False, True])
def test_tensorboard_has_each_step_once_after_a_kill(by_earlier_version, tmp_path):
    config = load_config(
        overrides=[
            "model.source=none", "data.train=none", f"run.dir={tmp_path}",
            "run.trackers=[tensorboard]",
        ]
    )  # fmt: skip

    def train(begin, end, loss):
        """Log steps; a process that is killed does not close its file, but it has been written."""
        trackers = Trackers(config, print, begin)
        for step in range(begin + 1, end + 1):
            trackers.write({"split": "train", "step": step, "loss": loss})
        trackers.close()

    if by_earlier_version:  # whose files do not say where they begin
        writer = Writer(str(tmp_path / "tensorboard"))
        for step in range(1, 6):
            writer.add_scalar("train/loss", 2.0, step)
        writer.close()
    else:
        train(0, 5, 2.0)
    train(3, 7, 1.0)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    events = board.Tensors("train/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5, 6, 7]
    assert [event.tensor_proto.float_val[0] for event in events] == [2.0] * 3 + [1.0] * 4
