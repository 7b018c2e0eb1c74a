"""A plan is made anew when the code of the step changes, and not for other edits."""

import shutil
from pathlib import Path

import pytest

import jaxtune
from jaxtune.planning.fingerprint import code_digest, step_files

PACKAGE = Path(jaxtune.__file__).parent
MAKES_THE_STEP = [
    "models/decoder.py", "models/rope.py", "models/families/table.py", "models/kernels/splash.py",
    "adapters/lora.py", "objectives/sft.py", "objectives/dpo.py", "training/step.py",
    "training/state.py", "training/optimizer.py", "training/setup.py", "training/remat_auto.py",
    "data/loader.py", "core/mesh.py", "core/sharding.py", "core/hardware.py", "config/schema.py",
    "weights/load.py", "weights/quantize.py", "weights/mapping.py", "weights/abstract.py",
    "planning/worker.py", "planning/lower.py", "planning/collectives.py", "planning/roofline.py",
]  # fmt: skip
ELSEWHERE = [
    "cli/main.py", "cli/plan.py", "report/page.py", "api.py", "workflows/train.py",
    "inference/engine.py", "evaluation/evaluate.py", "training/loop.py", "planning/show.py",
]  # fmt: skip


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy") / "jaxtune"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def digest_after_an_edit(copy, name):
    path = copy / name
    text = path.read_text()
    path.write_text(f"{text}\n# edited\n")
    try:
        return code_digest(copy)
    finally:
        path.write_text(text)


@pytest.mark.parametrize("name", MAKES_THE_STEP)
def test_an_edit_of_what_makes_the_step_is_seen(name, copy):
    assert PACKAGE / name in step_files()
    assert digest_after_an_edit(copy, name) != code_digest(copy)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_edit_elsewhere_makes_no_plan_anew(name, copy):
    assert digest_after_an_edit(copy, name) == code_digest(copy)


def test_files_that_a_registry_imports_by_name_are_among_them():
    names = {path.name for path in step_files() if path.parent.name == "objectives"}
    assert names >= {path.name for path in (PACKAGE / "objectives").glob("*.py")}
