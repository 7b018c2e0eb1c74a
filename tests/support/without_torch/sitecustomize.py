"""Hides PyTorch and PEFT from a child process, as on a machine that has neither."""

import importlib.util
import sys

_find_spec = importlib.util.find_spec


def _hidden(name):
    return name.partition(".")[0] in ("torch", "peft")


class _Hide:
    def find_spec(self, name, path=None, target=None):
        if _hidden(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return


importlib.util.find_spec = lambda name, package=None: (
    None if _hidden(name) else _find_spec(name, package)
)
sys.meta_path.insert(0, _Hide())
