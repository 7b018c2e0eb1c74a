"""The same training in PyTorch with transformers and PEFT: the outside reference of a run."""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model


def lora(model, rank=4, alpha=8.0, seed=1, b_std=0.0, **options):
    """`model` with a PEFT adapter; with `b_std` what starts at zero or as in the base is
    changed, so that all of it counts.
    """
    torch.manual_seed(seed)
    config = LoraConfig(
        **(
            {
                "r": rank,
                "lora_alpha": alpha,
                "target_modules": "all-linear",
                "task_type": "CAUSAL_LM",
            }
            | options
        )
    )
    model = get_peft_model(model, config)
    if b_std:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name or "embedding_A" in name:
                    parameter.normal_(std=b_std)
                elif parameter.requires_grad and ("magnitude" in name or "lora_" not in name):
                    parameter.add_(torch.randn_like(parameter) * b_std)
    return model


def token_loss(model, rows):
    """`(sum of losses, tokens)` over rows of (ids, supervised)."""
    total, count = torch.zeros(()), 0
    for ids, supervised in rows:
        logits = model(torch.as_tensor(ids)[None].long()).logits[0, :-1].float()
        targets, chosen = (
            torch.as_tensor(ids[1:]).long(),
            torch.as_tensor(np.asarray(supervised[1:])),
        )
        losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
        total, count = total + losses[chosen].sum(), count + int(chosen.sum())
    return total, count


def train(model, batches, rates, clip=1.0):
    """AdamW over batches of rows; `(loss, gradient norm)` of every step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )
    found = []
    for rows, rate in zip(batches, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        total, count = token_loss(model, rows)
        (total / count).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        optimizer.zero_grad()
        found.append((float(total.detach()) / count, float(norm)))
    return found


def factors(model):
    """The adapter's tensors under the names of its file."""
    return {
        name.replace(".default", ""): value.detach().numpy().copy()
        for name, value in model.named_parameters()
        if "lora_" in name
    }


def name_in_file(key):
    """Return the name of a parameter of PEFT's model in the adapter's file."""
    key = (
        key.replace(".default", "")
        .replace(".modules_to_save", "")
        .replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
    )
    return key if key.startswith("base_model.model.") else f"base_model.model.{key}"


def assert_close(ours, theirs, tolerance, scale=None):
    """Assert that each tensor differs by a share of its norm, or of its distance from `scale`."""
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        reference = np.linalg.norm(value if scale is None else value - scale[key])
        assert np.linalg.norm(ours[key] - value) <= tolerance * reference + 1e-7, key
