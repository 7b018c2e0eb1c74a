"""Regular expressions of users mean what they mean in `re`, and take no longer than seconds."""

import re
import time

import pytest

from jaxtune.adapters.config import matches
from jaxtune.adapters.selection import Selection
from jaxtune.core.errors import UserError
from jaxtune.core.patterns import fullmatch

NAME = "model.layers.0.self_attn.q_proj"
SLOW = [r"(?:.|[a-z])*(?:.|\w)*(?:.|\w)*(?=zz).", r"(.|[a-z])+(?<=zz)"]


@pytest.mark.parametrize("pattern", SLOW)
def test_an_expression_that_takes_too_long_is_named(pattern):
    began = time.monotonic()
    with pytest.raises(UserError, match="takes more than 1 second"):
        matches(pattern, NAME * 3)
    with pytest.raises(UserError, match="takes more than 1 second"):
        Selection((pattern,), 2).check([NAME * 3 + ".weight"])
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(q|v)_proj", r"model\.layers\.[01]\..*", r"(?!.*mlp).*proj", r".*layers.\d+.*", "x", ""],
)
@pytest.mark.parametrize("name", [NAME, "model.layers.1.mlp.down_proj", "lm_head", "x\n"])
def test_an_expression_means_what_it_means_in_re(pattern, name):
    assert (fullmatch(pattern, name) is not None) == (re.fullmatch(pattern, name) is not None)


def test_what_is_no_expression_is_said_as_before():
    with pytest.raises(re.error):
        fullmatch("(", "x")
    with pytest.raises(UserError, match="is not a regular expression"):
        Selection(("(",), 2).check([NAME])
