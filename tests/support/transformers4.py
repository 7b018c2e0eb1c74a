"""transformers 4 in a process of its own: what it computes with directories that are exported
here.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from jaxtune.core.locks import locked

PACKAGES = ("transformers==4.57.3", "tokenizers>=0.22,<0.23", "huggingface-hub<1")
FOLDER = Path(tempfile.gettempdir()) / "jaxtune-tests-transformers-4.57.3"
_CHILD = """
import json, sys
import numpy as np, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

assert transformers.__version__.startswith("4."), transformers.__version__
request = json.loads(sys.stdin.read())
ids, found = torch.tensor(request["ids"]), {}
for number, directory in enumerate(request["directories"]):
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        found[str(number)] = model(ids).logits.numpy()
tokens = []
for directory in request["tokenizers"]:
    words = AutoTokenizer.from_pretrained(directory)
    templates = words.chat_template
    tokens.append({"ids": words(request["text"])["input_ids"], "templates": templates,
                   "special": words.additional_special_tokens})
np.savez(request["out"], **found)
print(json.dumps(tokens))
"""


def install():
    """Install it once a machine; skip the test where there is no registry."""
    with locked(FOLDER.with_suffix(".lock")):
        if (FOLDER / "transformers").is_dir():
            return
        with tempfile.TemporaryDirectory(dir=FOLDER.parent) as scratch:
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
            done = subprocess.run(
                [*command, scratch, *PACKAGES], capture_output=True, text=True, check=False
            )
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
                pytest.skip(f"transformers 4.57.3 cannot be installed: {reason}")
            os.rename(scratch, FOLDER)
            os.mkdir(scratch)


def read(directories, ids, out, *, tokenizers=(), text=""):
    """Return the logits of each directory's model, and of each tokenizer its ids of the text, its
    templates and its further special tokens.
    """
    install()
    request = {
        "directories": list(map(str, directories)), "ids": np.asarray(ids).tolist(),
        "tokenizers": list(map(str, tokenizers)), "text": text, "out": str(out),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(FOLDER)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as logits:
        return [logits[str(number)] for number in range(len(directories))], json.loads(done.stdout)
