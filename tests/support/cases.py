"""Which cases of a long list the normal suite runs."""

import pytest


def thinned(cases, *kept, unpack=False):
    """Return the cases as parameters of which all but `kept` are marked slow.

    Those that are kept stand for the others in the normal suite; `scripts/test --slow` runs the
    rest. `unpack` is for cases that are the values of several arguments.
    """
    cases = list(cases)
    assert kept, "One case at least stands for the others."
    assert all(case in cases for case in kept), f"{kept} are not all among {cases}"
    return [
        case
        if case in kept
        else pytest.param(*(case if unpack else [case]), marks=pytest.mark.slow)
        for case in cases
    ]


class OnDemand(dict):
    """Values by key, each made when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self._make = make

    def __missing__(self, key):
        self[key] = self._make(key)
        return self[key]
