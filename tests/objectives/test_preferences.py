"""Preference objectives and distillation: losses and gradients against TRL's formulas in
PyTorch, on transformers' model with PEFT.
"""

import jax
import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn.functional import logsigmoid

from jaxtune.data.batch import CHOSEN, MISMATCHED, REJECTED
from jaxtune.weights.peft import write_adapter
from tests.support import peft_side, tools
from tests.support.peft_side import assert_close, name_in_file
from tests.support.preferences import PAIRS, answers, labels_of, side_by_side
from tests.support.steps import Steps, batch_of, random_rows, tensors_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`(directory of the base, of an adapter that is not zero, PEFT's model)`: what training
    starts from differs from the base.
    """
    folder, config = tmp_path_factory.mktemp("preferences"), tools.tiny_config()
    tools.save_model(folder / "base", config)
    model = peft_side.lora(tools.random_model(config), b_std=0.1)
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", config


def log_probs(model, rows):
    """`(sum, tokens)` of each answer's log-probabilities, by PyTorch."""
    sums, counts = [], []
    for ids, supervised in rows:
        total, count = peft_side.token_loss(model, [(ids, supervised)])
        sums.append(-total), counts.append(count)
    return torch.stack(sums), torch.tensor(counts)


def trl(name, keys, ours, theirs, counts, labels):
    """The mean loss by TRL's DPOTrainer, CPOTrainer (SimPO), ORPOTrainer and KTOTrainer, written
    down again.
    """
    beta = keys.get("beta", 2.0 if name == "simpo" else 0.1)
    if name == "kto":
        ratio, labels = ours - theirs, torch.tensor(labels)
        distance = ratio[labels == MISMATCHED].mean().clamp(min=0).detach()
        good = 1 - torch.sigmoid(beta * (ratio[labels == CHOSEN] - distance))
        bad = 1 - torch.sigmoid(beta * (distance - ratio[labels == REJECTED]))
        return torch.cat(
            [keys.get("desirable", 1.0) * good, keys.get("undesirable", 1.0) * bad]
        ).mean()
    smoothing = keys.get("smoothing", 0.0)
    if name in ("orpo", "simpo"):
        ours = ours / counts
    chosen, rejected = ours[::2], ours[1::2]
    if name == "simpo":
        logits = chosen - rejected - 1.0 / beta
        return (
            -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
        ).mean()
    if name == "orpo":
        odds = (chosen - rejected) - (
            torch.log1p(-torch.exp(chosen)) - torch.log1p(-torch.exp(rejected))
        )
        return -chosen.mean() - (beta * logsigmoid(odds)).mean()
    if keys.get("ipo"):
        ours, theirs = ours / counts, theirs / counts
    logits = (ours[::2] - ours[1::2]) - (theirs[::2] - theirs[1::2])
    if keys.get("ipo"):
        return ((logits - 1 / (2 * beta)) ** 2).mean()
    return (
        -logsigmoid(beta * logits) * (1 - smoothing) - logsigmoid(-beta * logits) * smoothing
    ).mean()


CASES = {
    "dpo": ("dpo", {}, []),
    "dpo smoothed": (
        "dpo",
        {"smoothing": 0.2, "beta": 0.5},
        ["preference.label_smoothing=0.2", "preference.beta=0.5"],
    ),
    "ipo": ("dpo", {"ipo": True}, ["preference.dpo_loss=ipo"]),
    "orpo": ("orpo", {"beta": 0.3}, ["preference.beta=0.3"]),
    "simpo": ("simpo", {}, []),
    "kto": (
        "kto",
        {"desirable": 1.5, "undesirable": 0.5},
        ["preference.desirable_weight=1.5", "preference.undesirable_weight=0.5"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_trls_with_the_starting_adapter_as_reference(
    case, start, tmp_path, one_device
):
    """The leaves that train have moved on from the start by one step, so base, start and present
    all differ.
    """
    name, numbers, keys = CASES[case]
    base, adapter, config = start
    run = Steps(base, one_device, f"adapter.init={adapter}", f"train.objective={name}", *keys)
    run.train([side_by_side(answers(PAIRS, seed=5), labels_of(name))])
    run.trainable = run.state.trainable
    (tmp_path / "moved").mkdir()
    write_adapter(tmp_path / "moved", run.model(), "base")
    policy = PeftModel.from_pretrained(
        tools.random_model(config), tmp_path / "moved", is_trainable=True
    )
    reference = PeftModel.from_pretrained(tools.random_model(config), adapter)
    rows, labels = answers(PAIRS), labels_of(name)
    ours, counts = log_probs(policy, rows)
    with torch.no_grad():
        theirs, _ = log_probs(reference, rows)
    wanted = trl(name, numbers, ours, theirs, counts, labels)
    wanted.backward()
    gradients = {
        name_in_file(key): value.grad.numpy()
        for key, value in policy.named_parameters()
        if value.requires_grad
    }
    for packed in (False, True):
        loss, gradient = run.gradient(side_by_side(rows, labels, packed))
        assert float(loss) == pytest.approx(float(wanted.detach()), rel=1e-4)
        assert_close(tensors_of(run.model(gradient)), gradients, 1e-3)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_the_reference_is_no_second_copy_of_the_base_and_the_first_loss_is_that_of_no_preference(
    name, start, one_device
):
    base, adapter, _ = start
    run = Steps(base, one_device, f"adapter.init={adapter}", f"train.objective={name}")
    (loss, _, figures) = run.train([side_by_side(answers(PAIRS), labels_of(name))])[0]
    assert loss == pytest.approx(np.log(2) if name == "dpo" else 0.5, rel=1e-6)
    assert figures["margin"] == pytest.approx(0, abs=1e-6)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(run.frozen.reference_params))
    assert size == sum(leaf.nbytes for leaf in jax.tree.leaves(run.trainable))


@pytest.mark.parametrize("padding", [0, 16])
def test_distillation_is_the_divergence_over_the_teachers_likeliest_tokens(
    padding, start, tmp_path, one_device
):
    """Also where the teacher has rows that name no token: they are cut off."""
    base, _, config = start
    rows = config.vocab_size
    wide = tools.tiny_config(**config.to_diff_dict() | {"vocab_size": rows + padding})
    teacher = tools.save_model(tmp_path / "teacher", wide, seed=9)
    keys = [
        "train.objective=distill",
        f"distill.teacher={teacher}",
        "distill.top_k=5",
        "distill.temperature=2",
        "distill.share=0.7",
    ]
    run, examples = Steps(base, one_device, *keys), random_rows(3)
    loss, _ = run.gradient(batch_of(examples))
    total = count = 0
    with torch.no_grad():
        for ids, supervised in examples:
            chosen = torch.tensor(supervised[1:])
            student, guide = (
                torch.log_softmax(
                    model(torch.tensor(ids[:-1])[None].long()).logits[0][:, :rows] / temperature,
                    -1,
                )[chosen]
                for model, temperature in (
                    (tools.random_model(config), 2.0),
                    (tools.random_model(wide, 9), 2.0),
                )
            )
            plain_loss, tokens = peft_side.token_loss(
                tools.random_model(config), [(ids, supervised)]
            )
            top, places = guide.topk(5)
            log_q = student.gather(1, places)
            rest_p, rest_q = 1 - top.exp().sum(1), 1 - log_q.exp().sum(1)
            divergence = (top.exp() * (top - log_q)).sum(1) + rest_p * (rest_p.log() - rest_q.log())
            total += float(0.7 * 4 * divergence.sum() + 0.3 * plain_loss)
            count += tokens
    assert float(loss) == pytest.approx(total / count, rel=1e-4)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_it(start, one_device):
    keys = ["train.objective=distill", f"distill.teacher={start[0]}", "distill.share=1"]
    loss, norm, figures = Steps(start[0], one_device, *keys).train([batch_of(random_rows(3))])[0]
    assert abs(loss) < 1e-5
    assert norm < 1e-4
    assert abs(figures["teacher_kl"]) < 1e-5
