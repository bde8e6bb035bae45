"""Makes new experts as averages of an MoE's own: duplicates, prunes, merges groups or merges all.

The averages are decided on the host from statistics of the model, as a matrix [E, P] whose row e
has the weights of the P old experts in the new expert e.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.upcycle import pruning

MOST_COPIES = 3  # copies of one expert before the next one is copied


def duplicated(P: int, E: int, utility_P: np.ndarray | None = None) -> np.ndarray:
    """All old experts, then copies: three of the most useful, three of the next, and so on.

    After three copies of each, the order starts again. Without a utility, experts are copied once
    each in turn. The rule is the authors' (github.com/amazon-science/expert-upcycling,
    `max_duplicates_per_expert`).
    """
    if utility_P is None:
        copied = np.arange(P)
    else:
        copied = np.repeat(np.argsort(-np.asarray(utility_P), kind="stable"), MOST_COPIES)
    return np.eye(P)[[*range(P), *np.resize(copied, E - P)]]


def pruned(P: int, E: int, load_P: np.ndarray) -> np.ndarray:
    """The E experts with the highest load, in their old order."""
    return np.eye(P)[pruning.best(np.asarray(load_P), E)]


def grouped(E: int, similarity_PP: np.ndarray, load_P: np.ndarray | None = None) -> np.ndarray:
    """E groups of similar experts, each merged into one as an average weighted by load.

    The clustering is agglomerative with average linkage: the two groups whose members are most
    similar on average are joined, until E groups are left.
    """
    P = len(similarity_PP)
    groups = [[p] for p in range(P)]
    while len(groups) > E:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = max(pairs, key=lambda ij: similarity_PP[np.ix_(groups[ij[0]], groups[ij[1]])].mean())
        groups[j] = sorted(groups[j] + groups.pop(i))
    share_EP = np.zeros((E, P))
    for row, members in zip(share_EP, groups, strict=True):
        row[members] = averaged(len(members), None if load_P is None else load_P[members])[0]
    return share_EP


def averaged(P: int, load_P: np.ndarray | None = None) -> np.ndarray:
    """One expert: the average of all, weighted by their load if it is given."""
    if load_P is None or not np.sum(load_P):
        load_P = np.ones(P)
    return (np.asarray(load_P, np.float64) / np.sum(load_P))[None]


def mix(w_LPX: jax.Array, share_LEP: jax.Array, fetch=lambda w_P, p: w_P[p]) -> jax.Array:
    """Averages [L, E, …] of an array [L, P, …], summed in the order of the old experts.

    Only one old expert is held at a time; `fetch` gets it from wherever it is stored.
    """

    def of_layer(scanned):
        w_P, share_EP = scanned

        def add(total, numbered):
            p, share_E = numbered
            w = fetch(w_P, p).astype(jnp.float32)
            share = share_E.reshape(-1, *(1,) * w.ndim)
            # A share of 1 is a copy; a share of 0 leaves out even infinities and NaNs.
            term = jnp.where(share == 1, w, jnp.where(share == 0, 0, share * w))
            return total + term, None

        P, E = share_EP.shape[1], share_EP.shape[0]
        zeros = jnp.zeros((E, *w_P.shape[1:]), jnp.float32)
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(P), share_EP.T))
        return total.astype(w_P.dtype)

    return jax.lax.map(of_layer, (w_LPX, share_LEP))


def mix_on_mesh(
    w_LPX: jax.Array,
    share_LEP: jax.Array,
    in_spec: jax.P,
    out_spec: jax.P,
    *,
    axis: str | tuple[str, ...],
) -> jax.Array:
    """`mix` for an array whose experts are sharded along a mesh axis, so no device holds them all.

    `axis` is one name or several. Every device gets the old experts one after the other from their
    owners and makes its own new ones; these are all of them if `out_spec` does not shard experts.
    """

    def on_device(w_LPX, share_LEP):
        size, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
        mine = share_LEP.shape[1] // size
        if out_spec[1] is not None:
            share_LEP = jax.lax.dynamic_slice_in_dim(share_LEP, device * mine, mine, axis=1)

        def fetch(w_P, p):
            owner, index = p // len(w_P), p % len(w_P)
            own = jnp.where(owner == device, w_P[index], jnp.zeros_like(w_P[index]))
            return jax.lax.psum(own, axis)

        return mix(w_LPX, share_LEP, fetch)

    return jax.shard_map(
        on_device, in_specs=(in_spec, jax.P()), out_specs=out_spec, check_vma=False
    )(w_LPX, share_LEP)
