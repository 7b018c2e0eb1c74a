"""What the program for TPUs says between its devices, pinned: as the design predicts, and
nothing of the base as a whole.
"""

import json

import numpy as np
import pytest

from jaxtune.config.load import load_config
from jaxtune.planning.collectives import Collective, collectives
from jaxtune.planning.planner import plan
from tests.support.cases import OnDemand, thinned

HIDDEN, MLP, LAYERS, HEADS, KV, VOCAB = 1024, 2816, 5, 16, 8, 8192
ROWS, LENGTH, WAYS = 8, 1024, 4
BLOCKS = (
    2 * LAYERS * (2 * HIDDEN * HIDDEN + 2 * (HIDDEN // HEADS * KV) * HIDDEN + 3 * MLP * HIDDEN)
)  # bytes
HEAD = 2 * VOCAB * HIDDEN
MESHES = {
    "fsdp": {"fsdp": 4},
    "tensor": {"fsdp": 1, "tensor": 4},
    "both": {"fsdp": 2, "tensor": 2},
    "context": {"fsdp": 1, "context": 4},
}


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """By mesh the plan, each when it is first asked for."""
    folder = tmp_path_factory.mktemp("model")
    raw = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB,
        "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    keys = [
        f"model.source={folder}",
        f"data.max_length={LENGTH}",
        f"train.batch_size={ROWS}",
        "train.remat=full",
        "adapter.rank=8",
    ]

    def planned(name):
        mesh = [f"mesh.{axis}={size}" for axis, size in MESHES[name].items()]
        return plan(load_config(overrides=[*keys, *mesh]), "v5e:2x2")

    return OnDemand(planned)


def sent(result, *axes):
    kinds = result.collectives.get(" x ".join(axes), {})
    return sum(kind["bytes"] for kind in kinds.values())


@pytest.mark.parametrize("name", thinned(MESHES, "fsdp", "tensor"))
def test_nothing_of_the_whole_base_is_gathered_and_no_gradient_of_it_exists(programs, name):
    """No array that is exchanged has all layers, but for adapters' factors; none is as large as
    a matrix and reduced.
    """
    largest = max(MLP * HIDDEN * 2, ROWS * LENGTH * HIDDEN * 2, HEAD)
    for collective in programs[name].largest_collectives:
        shape = [int(size) for size in collective["array"].partition("[")[2].rstrip("]").split(",")]
        assert (
            np.prod(shape, dtype=np.int64) * (2 if collective["array"].startswith("bf16") else 4)
            <= largest
        ), collective
        assert not (shape[0] == LAYERS and min(shape[1:]) > 8), collective
    assert (
        programs[name].output_bytes <= programs[name].state_bytes * 1.05 + 1e5
    )  # what does not change does not come out


def test_fsdp_gathers_each_matrix_of_a_layer_when_it_is_used(programs):
    """Forward and backward, and again for the recomputed layer, but for its last matrix and where
    that can share the backward pass's.

    The head once; gradients are of adapters only.
    """
    result = programs["fsdp"]
    assert set(result.collectives) == {"fsdp"}
    down = 2 * LAYERS * MLP * HIDDEN
    share = (WAYS - 1) / WAYS
    assert (
        share * (2 * BLOCKS + HEAD)
        < sent(result, "fsdp")
        < 1.05 * share * (3 * BLOCKS - down + HEAD)
    )


def test_tensor_exchanges_activations_only(programs):
    """In units of a batch's activations: 2 gathered and 2 reduce-scattered forward, 2 and 1
    again, 2 and 5 backward; no weights.
    """
    result = programs["tensor"]
    assert set(result.collectives) == {"tensor"}
    unit = (WAYS - 1) / WAYS * ROWS * LENGTH * HIDDEN * 2
    assert 10 < sent(result, "tensor") / unit / LAYERS < 16
    assert not any(f"{MLP}" in collective["array"] for collective in result.largest_collectives)


@pytest.mark.slow
def test_both_exchange_what_each_would(programs):
    result = programs["both"]
    assert {"fsdp", "tensor"} <= set(result.collectives)
    down = 2 * LAYERS * MLP * HIDDEN
    assert (
        0.5 * (2 * BLOCKS + HEAD) / 2
        < sent(result, "fsdp")
        < 1.1 * 0.5 * (3 * BLOCKS - down + HEAD) / 2
    )
    unit = 0.5 * ROWS / 2 * LENGTH * HIDDEN * 2
    assert 8 < sent(result, "tensor") / unit / LAYERS < 16
    assert sent(result, "fsdp", "tensor") < 0.1 * sent(result, "fsdp")


@pytest.mark.slow
def test_context_gathers_keys_and_values(programs):
    """Forward and again in the recomputed layer; their gradients are summed back. The rest of a
    layer stays where it is.
    """
    result = programs["context"]
    unit = (WAYS - 1) / WAYS * ROWS * LENGTH * (HIDDEN // HEADS * KV) * 2
    assert set(result.collectives) == {"context"}
    assert 5.5 < sent(result, "context") / unit / LAYERS < 12


TEXT = """HloModule jit_step

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%body (carry: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %gathered = bf16[8,64]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %both = (s32[], bf16[8,16]) tuple(%i, %x)
}

%again (carry: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  ROOT %more = bf16[2,64]{1,0} all-gather(%x), channel_id=8, replica_groups=[2,4]<=[8], dimensions={1}
}

%condition (carry: (s32[], bf16[8,16])) -> pred[] {
  %bound = s32[] constant(3)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

%all-reduce-scatter.1 (input: f32[16,4]) -> f32[8,4] {
  %reduced = f32[16,4]{1,0} all-reduce(%input), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

ENTRY %main (p: bf16[8,16]) -> f32[8,4] {
  %loop = (s32[], bf16[8,16]) while(%start), condition=%condition, body=%body
  %known = (s32[], bf16[8,16]) while(%start), condition=%other, body=%again, backend_config={"known_trip_count":{"n":"7"}}
  %part = f32[8,4] fusion(%q), kind=kCustom, calls=%all-reduce-scatter.1
  %own = f32[4,4]{1,0} reduce-scatter(%w), channel_id=7, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}, to_apply=%add
  %moved = (f32[32]{0}, f32[32]{0}) collective-permute-start(%r), channel_id=3, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %turned = f32[4,2]{1,0} all-to-all(%t), channel_id=4, replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}
  %sent = (f32[8]{0}, u32[], token[]) send(%u, %after), channel_id=5, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  %alone = f32[99]{0} all-reduce(%v), channel_id=6, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %out = f32[8,4] copy(%part)
}
"""


def test_the_programs_text_is_read():
    by_name = {
        collective.kind + " " + collective.shape: collective
        for collective in collectives(
            TEXT, {"slices": 2, "data": 1, "fsdp": 2, "context": 1, "tensor": 2}
        )
    }
    assert by_name == {
        "all-gather bf16[8,64]": Collective(
            "all-gather", ("fsdp", "tensor"), "bf16[8,64]", 1024, 3, 4
        ),
        "all-gather bf16[2,64]": Collective(
            "all-gather", ("fsdp", "tensor"), "bf16[2,64]", 256, 7, 4
        ),
        "reduce-scatter f32[16,4]": Collective(
            "reduce-scatter", ("slices",), "f32[16,4]", 256, 1, 2
        ),
        "reduce-scatter f32[4,4]": Collective(
            "reduce-scatter", ("fsdp", "tensor"), "f32[4,4]", 256, 1, 4
        ),
        "collective-permute f32[32]": Collective(
            "collective-permute", ("fsdp", "tensor"), "f32[32]", 128, 1, 2
        ),
        "all-to-all f32[4,2]": Collective("all-to-all", ("slices",), "f32[4,2]", 32, 1, 2),
        "all-reduce f32[8]": Collective("all-reduce", ("slices",), "f32[8]", 32, 1, 2),
    }
    assert by_name["all-gather bf16[8,64]"].sent == 3 * 768
    assert by_name["all-reduce f32[8]"].sent == 32
