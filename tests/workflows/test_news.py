"""The quickstart's data never replaces what lies in its place."""

import pytest

from jaxtune.core.errors import UserError
from jaxtune.workflows.news import TEST, TRAIN, write_news


def test_files_of_the_users_are_kept(tmp_path):
    files = write_news(tmp_path)
    counts = [len(path.read_text().splitlines()) for path in files]
    assert counts == [TRAIN, TEST]
    before = [path.stat().st_mtime_ns for path in files]
    assert write_news(tmp_path) == files
    assert [path.stat().st_mtime_ns for path in files] == before
    files[0].write_text('{"prompt": "mine"}\n')
    with pytest.raises(UserError, match=r"train\.jsonl holds other rows"):
        write_news(tmp_path)
    assert files[0].read_text() == '{"prompt": "mine"}\n'
