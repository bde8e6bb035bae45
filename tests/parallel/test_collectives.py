"""A train step sends between devices exactly what its mesh and its mode of exchange need.

The state is cut by fsdp, tensor (or edp) and expert; the batch by data, fsdp and expert.
"""

import pytest

from moe_jax import config as configs
from moe_jax.dryrun import hlo, lowering
from moe_jax.parallel import mesh as meshes

E, D, F = 8, 16, 24
MODEL = {
    "vocab_size": 64,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": E,
    "num_experts_per_tok": 2,
}


def step_text(mesh, mode):
    config = configs.default()
    config.model.update(MODEL, expert_parallel=mode)
    config.training.batch_size = 8
    config.data.sequence_length = 16
    return lowering.lower(configs.resolve(config), mesh).compile().as_text()


def sent(text, mesh):
    """Axes to operations; over an axis of size 1 nothing is sent."""
    found = {}
    for c in hlo.collectives(text, mesh.shape):
        if c.axes:
            found.setdefault(" ".join(c.axes), set()).add(c.operation)
    return found


SUMS = {"all-reduce"}
# Weights come whole to where they are used and their gradients go back in parts, or tokens come and
# go; what is whole on every device (norms, routers) gives sums.
PARTS = {"all-gather", "reduce-scatter", "all-reduce"}
# Along data nothing is cut. Along tensor and edp the vocabulary is: the head's part comes and its
# gradient goes, and the sums are of the embedding, heads and neurons.
EXPECTED = {
    "data=8": {"data": SUMS},
    "fsdp=8": {"fsdp": PARTS},
    "data=2 expert=4": {"data": SUMS, "expert": PARTS, "data expert": SUMS},
    "expert=8": {"expert": PARTS},
    "fsdp=2 expert=2 tensor=2": {
        **dict.fromkeys(("fsdp", "expert", "tensor"), PARTS),
        **dict.fromkeys(("fsdp expert", "fsdp expert tensor"), SUMS),
    },
    # Each expert is on one device of edp: the gradient of the router is a sum over these too.
    "fsdp=2 expert=2 edp=2": {
        **dict.fromkeys(("fsdp", "expert", "edp"), PARTS),
        **dict.fromkeys(("fsdp expert", "expert edp", "fsdp expert edp"), SUMS),
    },
}
CASES = [
    (name, mode)
    for name in EXPECTED
    for mode in ("fsdp", "ring", "all_to_all")
    if mode == "fsdp" or "expert" in name
]
DEFAULT = ("fsdp=2 expert=2 tensor=2", "all_to_all")


@pytest.mark.parametrize(
    ("name", "mode"),
    [pytest.param(*case, marks=() if case == DEFAULT else pytest.mark.long) for case in CASES],
)
def test_a_step_sends_what_its_mesh_and_mode_make_due_and_nothing_else(name, mode):
    mesh = meshes.make({axis: int(size) for axis, size in (x.split("=") for x in name.split())})
    text = step_text(mesh, mode)
    assert sent(text, mesh) == EXPECTED[name]
    # One matrix of all experts that are not another's along edp, whole but for tensor's cut.
    stack = E // mesh.shape["edp"], D, F // mesh.shape["tensor"]
    assert (stack in hlo.buffer_shapes(text)) == (mode == "fsdp")
