"""The README's Python runs as it stands there, and what it calls are functions whatever was
imported before.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import tools


def test_python_of_the_readme(chat_model, tmp_path):
    (code,) = re.findall(
        r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL
    )
    shutil.copytree(chat_model, tmp_path / "path" / "of" / "model")
    for name in ("train.jsonl", "test.jsonl"):
        tools.write_rows(tmp_path / name, tools.sums(16))
    code = "import jaxtune.inference.engine, jaxtune.training.loop\n" + code
    environment = tools.child_environment()
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[1]), environment["PYTHONPATH"]]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 3
