"""One expert at a time: how many neurons are redrawn, which, and from what distribution.

Bounds on random quantities are 5 standard errors: about one in two million for each comparison, and
the keys are fixed, so a test that passes once passes always.
"""

import functools
import itertools
import math

import jax
import numpy as np
import pytest

from moe_jax import model
from moe_jax.model import layers
from moe_jax.upcycle import experts, recipes, router_init

NAMES = ("gate", "up", "down")


@functools.partial(jax.jit, static_argnames=("ratio", "index_sharing", "permute_neurons"))
def drop(ffn, keys_E, **parameters):
    """The experts of several keys, stacked, as `transform.make_experts` makes them."""

    def expert(key):
        context = recipes.ExpertContext(0, key, layer_key=key, config=None, granularity=1)
        return recipes.drop(ffn, context, **parameters)

    return jax.lax.map(expert, keys_E)


def keys(number):
    return jax.random.split(jax.random.key(7), number)


def random_ffn(D, F):
    draw = np.random.default_rng(0).normal
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    return {name: draw(size=shape).astype(np.float32) for name, shape in shapes.items()}


def by_neuron(w, name):
    """[..., F, D]: one row for each neuron."""
    return np.moveaxis(np.asarray(w), experts.NEURON_AXIS[name] - 2, -2)


def origin_EFF(made, ffn, name):
    """[E, F, F]: True where neuron i of an expert equals the parent's neuron j bit for bit."""
    new_EFD, old_FD = by_neuron(made[name], name), by_neuron(ffn[name], name)
    return (new_EFD[:, :, None] == old_FD[None, None]).all(axis=-1)


long = pytest.mark.long


@pytest.mark.parametrize("permute_neurons", [False, pytest.param(True, marks=long)])
def test_shared_indices_redraw_floor_of_ratio_whole_neurons(permute_neurons):
    F, ratio = 37, 0.5  # 18.5: rounding up would redraw 19
    ffn = random_ffn(8, F)
    made = drop(ffn, keys(16), ratio=ratio, permute_neurons=permute_neurons)
    origin = {name: origin_EFF(made, ffn, name) for name in NAMES}
    kept_EF = origin["gate"].any(axis=-1)
    np.testing.assert_array_equal(F - kept_EF.sum(axis=1), math.floor(ratio * F))
    for name in NAMES:  # the same neurons of the same parent's neurons in all three matrices
        np.testing.assert_array_equal(origin[name], origin["gate"])
        redrawn = by_neuron(made[name], name)[~kept_EF]
        assert not np.isin(redrawn, ffn[name]).any()
    at_home_EF = np.diagonal(origin["gate"], axis1=1, axis2=2)
    assert (at_home_EF == kept_EF).all() != permute_neurons
    assert len(np.unique(origin["gate"], axis=0)) == 16  # no two experts alike


@pytest.mark.parametrize("permute_neurons", [pytest.param(False, marks=long), True])
def test_per_matrix_indices_are_drawn_for_each_matrix_on_its_own(permute_neurons):
    F, ratio, E = 37, 0.5, 16
    ffn, count = random_ffn(8, F), math.floor(ratio * F)
    made = drop(
        ffn, keys(E), ratio=ratio, index_sharing="per_matrix", permute_neurons=permute_neurons
    )
    origin = {name: origin_EFF(made, ffn, name) for name in NAMES}
    redrawn = {name: ~origin[name].any(axis=-1) for name in NAMES}
    for name in NAMES:
        np.testing.assert_array_equal(redrawn[name].sum(axis=1), count)
    # Two independent sets of `count` among F share a hypergeometric number of neurons.
    mean = count**2 / F
    deviation = math.sqrt(mean * (1 - count / F) * (F - count) / (F - 1))
    for one, other in (("gate", "up"), ("gate", "down"), ("up", "down")):
        shared_E = (redrawn[one] & redrawn[other]).sum(axis=1)
        assert abs(shared_E.mean() - mean) < 5 * deviation / math.sqrt(E)
        # A neuron that is intact in both matrices comes from one neuron of the parent.
        intact_EF = ~redrawn[one] & ~redrawn[other]
        np.testing.assert_array_equal(origin[one][intact_EF], origin[other][intact_EF])


def swiglu(x_MD, ffn):
    x_MD, gate_DF, up_DF, down_FD = (
        np.asarray(a, np.float64) for a in (x_MD, *(ffn[name] for name in NAMES))
    )
    gate_MF = x_MD @ gate_DF
    return (gate_MF / (1 + np.exp(-gate_MF)) * (x_MD @ up_DF)) @ down_FD


def test_permuting_neurons_keeps_the_function_and_differs_between_experts():
    ffn, x_MD = random_ffn(8, 37), np.random.default_rng(1).normal(size=(5, 8))
    made = jax.tree.map(np.asarray, drop(ffn, keys(4), ratio=0.0, permute_neurons=True))
    for e in range(4):
        expert = {name: w[e] for name, w in made.items()}
        np.testing.assert_allclose(swiglu(x_MD, expert), swiglu(x_MD, ffn), rtol=1e-10, atol=1e-10)
    orders_EF = origin_EFF(made, ffn, "up").argmax(axis=-1)
    assert len(np.unique(orders_EF, axis=0)) == 4
    # Moving one matrix alone is another function, so the comparison above can fail.
    torn = {**ffn, "up": made["up"][0]}
    assert np.abs(swiglu(x_MD, torn) - swiglu(x_MD, ffn)).max() > 0.1


def assert_drawn_like(new, old):
    """`new` are independent normals with the mean and unbiased deviation of `old`."""
    mean, deviation = old.mean(dtype=np.float64), old.std(ddof=1, dtype=np.float64)
    assert abs(new.mean() - mean) < 5 * deviation / math.sqrt(new.size)
    assert abs(new.std(ddof=1) - deviation) < 5 * deviation / math.sqrt(2 * new.size)


@pytest.mark.parametrize("index_sharing", ["neuron", pytest.param("per_matrix", marks=long)])
def test_ratio_one_keeps_nothing_but_two_scalars_of_each_matrix(index_sharing):
    """Each matrix has another mean and spread, and ramps along both axes that must be gone."""
    side = 64
    ramp = np.linspace(-math.sqrt(3), math.sqrt(3), side)  # of deviation 1
    noise = random_ffn(side, side)
    ffn = {
        name: (mean + scale * (ramp[:, None] + ramp + noise[name] / 2)).astype(np.float32)
        for name, mean, scale in (("gate", 1.0, 0.1), ("up", -2.0, 0.3), ("down", 0.5, 0.05))
    }
    made, drawn = drop(ffn, keys(3), ratio=1.0, index_sharing=index_sharing), []
    for name in NAMES:
        old, deviation = ffn[name], ffn[name].std(ddof=1)
        assert np.ptp(old.mean(axis=0)) > 2 * deviation  # the bound below is a quarter of this
        for new in np.asarray(made[name]):
            assert not (new == old).any()
            assert_drawn_like(new, old)
            for axis in (0, 1):
                off = np.abs(new.mean(axis=axis) - old.mean())
                assert off.max() < 5 * deviation / math.sqrt(side)
            drawn.append(np.sort((new - old.mean()) / deviation, axis=None))
    for one, other in itertools.combinations(drawn, 2):  # no two from the same random numbers
        assert np.abs(one - other).max() > 1e-2


def test_mean_and_unbiased_deviation_are_those_of_the_redrawn_entries_alone():
    """One of three far apart neurons of two entries each is redrawn, 1024 times.

    Of two entries the unbiased deviation is sqrt(2) times the biased one, 3 times the bound.
    """
    ffn = {
        "gate": np.array([[0.0, 100.0, -50.0], [1.0, 104.0, -52.0]], np.float32),
        "up": np.array([[5.0, 0.0, 30.0], [9.0, 1.0, 36.0]], np.float32),
        "down": np.array([[-3.0, -1.0], [20.0, 21.0], [70.0, 75.0]], np.float32),
    }
    made = drop(ffn, keys(1024), ratio=0.5)
    for name in NAMES:
        new_EFD, old_FD = by_neuron(made[name], name), by_neuron(ffn[name], name)
        redrawn_EF = ~origin_EFF(made, ffn, name).any(axis=-1)
        for f in range(3):
            new = new_EFD[redrawn_EF[:, f], f]
            assert 265 < len(new) < 418  # each neuron as often as the others
            assert_drawn_like(new.astype(np.float64), old_FD[f])


@pytest.mark.parametrize("name", ["normal", "centred_uniform", "grouped"])
def test_router_kernels_have_mean_zero_and_deviation_0_02(name):
    D, E = 256, 16
    context = router_init.RouterContext(jax.random.key(0), D, E)
    kernel_DE = np.asarray(router_init.ROUTER_INITIALISERS[name](context))
    assert kernel_DE.shape == (D, E)
    assert abs(kernel_DE.mean()) < 5 * 0.02 / math.sqrt(D * E)
    assert abs(kernel_DE.std() - 0.02) < 5 * 0.02 / math.sqrt(2 * D * E)
    width = 0.02 * math.sqrt(12)  # of a uniform of deviation 0.02
    if name == "centred_uniform":
        assert abs(kernel_DE.mean(dtype=np.float64)) < 1e-8  # its own mean, not the expected one
        assert 0.99 * width < np.ptp(kernel_DE) <= width
    else:
        assert np.ptp(kernel_DE) > 1.5 * width


def test_centroid_kernels_send_the_clusters_apart():
    centroids_ED = np.random.default_rng(0).normal(size=(4, 32)) + 5
    context = router_init.RouterContext(None, 32, 4, centroids_ED=centroids_ED)
    kernel_DE = router_init.centroids(context)
    assert (np.argmax(centroids_ED @ kernel_DE, axis=1) == np.arange(4)).all()
    np.testing.assert_allclose(np.linalg.norm(kernel_DE, axis=0), 0.02 * math.sqrt(32), rtol=1e-5)


def test_noise_is_added_to_half_of_each_matrix_and_has_its_deviation():
    D, F, std = 64, 40, 0.02
    ffn = random_ffn(D, F)
    context = recipes.ExpertContext(
        0, jax.random.key(0), jax.random.key(0), config=None, granularity=1
    )
    made = jax.jit(lambda ffn: recipes.noise(ffn, context, permute_neurons=False))(ffn)
    for name in NAMES:
        added_FD = by_neuron(made[name], name) - by_neuron(ffn[name], name)
        changed_F = (added_FD != 0).any(axis=1)
        assert changed_F.sum() == F // 2
        assert_drawn_like(added_FD[changed_F], std * np.array([-1.0, 0.0, 1.0]))
    assert (np.asarray(made["gate"]) != ffn["gate"]).any(axis=0).tolist() != (
        (np.asarray(made["up"]) != ffn["up"]).any(axis=0).tolist()
    )


@pytest.mark.parametrize(
    ("E", "G", "T", "factor"), [(8, 8, 8, 4), (8, 1, 2, 4 ** (1 / 3)), (8, 1, 1, 2)]
)
def test_weight_scaling_is_the_published_one(E, G, T, factor):
    """He et al., arXiv 2410.07524: E8G8T8 -> 4, E8G1T2 -> 1.587, E8G1T1 -> 2, on both matrices."""
    config = model.ModelConfig(
        *(8, 8, 8 * G, 1, 1),
        num_experts=E * G,
        num_experts_per_tok=T,
        moe_intermediate_size=8,
        norm_topk_prob=False,
    )
    context = recipes.ExpertContext(0, None, None, config=config, granularity=G)
    made = recipes.virtual_group({n: np.ones((8 * G, 8 * G), np.float32) for n in NAMES}, context)
    for name in NAMES:
        np.testing.assert_allclose(made[name], factor, rtol=1e-5)
    assert made["up"].shape == (8 * G, 8) and made["down"].shape == (8, 8 * G)


@pytest.mark.parametrize("shape", ["gated", "squared", "plain"])
def test_exact_scaling_multiplies_the_output_and_the_papers_does_not_when_gated(shape):
    act = {"gated": "silu", "squared": "relu2", "plain": "gelu"}[shape]
    config = model.ModelConfig(8, 16, 12, 1, 2, hidden_act=act, gated_mlp=shape == "gated")
    ffn = random_ffn(16, 12)
    ffn |= {"up_bias": np.ones(12, np.float32), "down_bias": np.ones(16, np.float32)}
    if shape != "gated":
        del ffn["gate"]
    else:
        ffn["gate_bias"] = np.full(12, 0.3, np.float32)
    x_MD = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    want = 3 * layers.feed_forward(x_MD, ffn, config)
    for scaling, equal in (("exact", True), ("down", True), ("paper", shape == "squared")):
        scaled = experts.scale(ffn, 3.0, scaling=scaling, hidden_act=act)
        got = layers.feed_forward(x_MD, scaled, config)
        assert np.allclose(got, want, rtol=1e-4, atol=1e-4) == equal, scaling


def test_flipped_residuals_keep_the_leading_directions_and_all_singular_values():
    ffn = random_ffn(24, 16)
    made = experts.reflect_residual(ffn, jax.random.key(0), rank_ratio=0.5)
    for name in NAMES:
        u, s, v = np.linalg.svd(ffn[name].astype(np.float64), full_matrices=False)
        inner = u.T @ np.asarray(made[name]) @ v.T  # diagonal: the new singular values, signed
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
        signs = np.diag(inner) / s
        np.testing.assert_allclose(np.abs(signs), 1, atol=1e-4)
        assert (signs[:8] > 0).all() and 0 < (signs[8:] < 0).sum() < 8
