"""What a run reads before any weight loads: its teacher."""

import pytest

from jaxtune.config.load import load_config
from jaxtune.core.errors import UserError
from jaxtune.tracking.progress import Reporter
from jaxtune.training.inputs import read_inputs
from jaxtune.weights.load import check_source
from tests.support import tools

TOKENS = 263  # of the byte tokenizer


def model(directory, rows, words=None, **changes):
    config = tools.tiny_config(vocab_size=rows, **changes)
    return tools.save_model(directory, config, words or tools.byte_tokenizer())


def inputs(directory, student, teacher):
    rows = tools.write_rows(directory / "rows.jsonl", tools.sums(4))
    keys = [
        f"model.source={student}", f"distill.teacher={teacher}", "train.objective=distill",
        f"data.train={rows}", "train.batch_size=2", "data.max_length=64",
    ]  # fmt: skip
    return read_inputs(load_config(overrides=keys), Reporter(quiet=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [(288, 304), (304, 288), (288, 288)])
def test_a_teacher_keeps_the_rows_that_name_tokens(rows, tied, tmp_path):
    """Qwen2.5 has 152,064 rows in its large models and 151,936 in its small ones."""
    student = model(tmp_path / "student", rows[0])
    teacher = inputs(
        tmp_path, student, model(tmp_path / "teacher", rows[1], tie_word_embeddings=tied)
    ).teacher
    kept = rows[1] if rows[0] == rows[1] else TOKENS
    config, tensors = check_source(teacher)
    assert config.vocab_size == kept
    whole = tools.load_tensors(tmp_path / "teacher")
    for name in ("model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])):
        assert (tensors[name].all() == whole[name][:kept].numpy()).all()


def test_a_teacher_with_other_tokens_is_refused(tmp_path):
    other = tools.byte_tokenizer(merges=[("h", "e")])
    student, teacher = (
        model(tmp_path / name, 288, words) for name, words in (("a", None), ("b", other))
    )
    with pytest.raises(UserError, match="has other tokens than"):
        inputs(tmp_path, student, teacher)
