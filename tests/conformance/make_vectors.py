"""Makes moe_jax/conformance/vectors.json: balance rules in float64 numpy, from their formulas.

    python tests/conformance/make_vectors.py moe_jax/conformance/vectors.json

Nothing of moe_jax is used here. A loss is a loop over layers, devices or rows. Its gradient with
respect to the logits comes from complex steps, f'(x) = Im f(x + ih) / h, which are exact to float64
because every formula is analytic once the experts are chosen.
"""

import json
import pathlib
import sys

import numpy as np

L, B, T, E, K = 2, 4, 6, 4, 2
LENGTHS = (6, 3, 4, 5)  # of the rows; the first two have as many tokens as the last two
STEP = 1e-30


def softmax(z_E):
    e_E = np.exp(z_E - z_E.real.max())
    return e_E / e_E.sum()


def sigmoid_share(z_E):
    s_E = 1 / (1 + np.exp(-z_E))
    return s_E / s_E.sum()


def f_and_P(tokens, k, probabilities=softmax):
    """Assignments and mean probability per token of each expert, for tokens [M][E] of logits."""
    f_E, P_E = np.zeros(E), np.zeros(E, complex)
    for z_E in tokens:
        f_E[np.argsort(-z_E.real)[:k]] += 1 / len(tokens)
        P_E += probabilities(z_E) / len(tokens)
    return f_E, P_E


def tokens_of(z_BTE, mask_BT, rows=range(B)):
    return [z_BTE[b, t] for b in rows for t in range(T) if mask_BT[b, t]]


def switch(z_LBTE, mask):
    """alpha E sum f P for top-1, added over layers (arXiv 2101.03961, eq. 4-6; alpha 0.01)."""
    total = 0
    for z_BTE in z_LBTE:
        f_E, P_E = f_and_P(tokens_of(z_BTE, mask), 1)
        total += 0.01 * E * np.sum(f_E * P_E)
    return total


def hugging_face(z_LBTE, mask):
    """0.02 E sum over slots and experts of f P; tokens of all layers are one set."""
    tokens = [z_E for z_BTE in z_LBTE for z_E in tokens_of(z_BTE, mask)]
    f_E, P_E = f_and_P(tokens, K)
    return 0.02 * E * np.sum(f_E * P_E)


def megatron(z_LBTE, mask, groups, probabilities=softmax, alpha=0.01):
    """alpha E/k sum f P, the mean over groups of rows, added over layers."""
    total = 0
    for z_BTE in z_LBTE:
        for rows in groups:
            f_E, P_E = f_and_P(tokens_of(z_BTE, mask, rows), K, probabilities)
            total += alpha * E / K * np.sum(f_E * P_E) / len(groups)
    return total


def megablocks(z_LBTE, mask):
    """0.01 E / (L M k) sum over layers of counts . mean score, plus 0.001 times the mean z-loss."""
    total = 0
    for z_BTE in z_LBTE:
        tokens = tokens_of(z_BTE, mask)
        f_E, P_E = f_and_P(tokens, K)
        total += 0.01 * E / (L * len(tokens) * K) * np.sum(len(tokens) * f_E * P_E)
    return total + 0.001 * z_loss(z_LBTE, mask) / L


def z_loss(z_LBTE, mask):
    """The sum over layers of the mean over tokens of logsumexp^2."""
    total = 0
    for z_BTE in z_LBTE:
        tokens = tokens_of(z_BTE, mask)
        total += sum(np.log(np.exp(z_E).sum()) ** 2 for z_E in tokens) / len(tokens)
    return total


ALPHAS = (0.01, 0.004)


def skywork(z_LBTE, mask):
    """sum_l alpha_l sum_e (1/E - P_e)^2 of logits normalised to deviation 1 (arXiv 2406.06563)."""

    def normalised(z_E):
        centred_E = z_E - z_E.mean()
        return softmax(centred_E / np.sqrt(np.sum(centred_E**2) / (E - 1)))

    total = 0
    for alpha, z_BTE in zip(ALPHAS, z_LBTE, strict=True):
        _, P_E = f_and_P(tokens_of(z_BTE, mask), K, normalised)
        total += alpha * np.sum((1 / E - P_E) ** 2)
    return total


ONE_BY_ONE, ALL, TWO = [[b] for b in range(B)], [range(B)], [[0, 1], [2, 3]]
SOFTMAX = {"router": "softmax_topk", "num_experts_per_tok": K}
UNNORMALISED = {**SOFTMAX, "norm_topk_prob": False}
SUM = {"load_balancing_coefficient": 0.01, "over_layers": "sum"}

# name, source, function, fields of the model, keys of `balance`, devices, coefficients.
LOSSES = [
    (
        *("switch", "arXiv 2101.03961, eq. 4-6", switch),
        *({**UNNORMALISED, "num_experts_per_tok": 1}, SUM, 1, None),
    ),
    (
        *("hugging_face", "Transformers' load_balancing_loss_func", hugging_face, SOFTMAX),
        {
            "load_balancing_coefficient": 0.02,
            "load_balancing_scope": "all_layers",
            "load_balancing_divide_by_k": False,
        },
        *(1, None),
    ),
    (
        *("megatron_aux", "Megatron-LM's aux_loss", lambda z, m: megatron(z, m, TWO)),
        *(SOFTMAX, {**SUM, "load_balancing_over": "device"}, 2, None),
    ),
    (
        *("megatron_sequence", "Megatron-LM's seq_aux_loss"),
        lambda z, m: megatron(z, m, ONE_BY_ONE),
        *(SOFTMAX, {**SUM, "load_balancing_over": "sequence"}, 1, None),
    ),
    (
        *("megatron_global", "Megatron-LM's global_aux_loss", lambda z, m: megatron(z, m, ALL)),
        *(SOFTMAX, SUM, 1, None),
    ),
    (
        *("deepseek_v3", "arXiv 2412.19437, eq. 17-20"),
        lambda z, m: megatron(z, m, ONE_BY_ONE, sigmoid_share, 1e-4),
        {"router": "sigmoid_topk", "num_experts_per_tok": K},
        {**SUM, "load_balancing_coefficient": 1e-4, "load_balancing_over": "sequence"},
        *(1, None),
    ),
    (
        *("olmoe", "megablocks' batched_load_balancing_loss and z-loss", megablocks, UNNORMALISED),
        *({"load_balancing_coefficient": 0.01, "router_z_coefficient": 0.001}, 1, None),
    ),
    (
        *("skywork", "arXiv 2406.06563, §3 and §4.2", skywork, {**SOFTMAX, "gate_norm_std": 1.0}),
        *({"load_balancing_form": "squared", "over_layers": "sum"}, 1, ALPHAS),
    ),
    (
        *("router_z", "arXiv 2202.08906, eq. 5", lambda z, m: 0.001 * z_loss(z, m), SOFTMAX),
        {"load_balancing_coefficient": 0.0, "router_z_coefficient": 0.001, "over_layers": "sum"},
        *(1, None),
    ),
]


def bias_update(load_E, bias_E, rate):
    """b + u sign(mean load - load) (arXiv 2408.15664, algorithm 1), less the mean bias."""
    new = [b + rate * np.sign(np.mean(load_E) - n) for b, n in zip(bias_E, load_E, strict=True)]
    return np.array(new) - np.mean(new)


def quantile_update(tokens, bias_E):
    """The k/E quantile over tokens of alpha - s, less the mean (kexue.fm/archives/11619)."""
    needed_ME = []
    for z_E in tokens:
        score_E = 1 / (1 + np.exp(-z_E))
        alpha = np.sort(score_E + bias_E)[-K - 1]
        needed_ME.append(alpha - score_E)
    new_E = np.quantile(needed_ME, K / E, axis=0, method="inverted_cdf")
    return new_E - new_E.mean()


def adaptive_update(load_E, alpha):
    """beta alpha + (1 - beta) min(d/5, 0.01) with the drop rate d (arXiv 2406.06563, §4.2)."""
    capacity = sum(load_E) / E
    dropped = sum(max(0, n - capacity) for n in load_E) / sum(load_E)
    return 0.99 * alpha + 0.01 * min(dropped / 5, 0.01)


def gradient(loss, z_LBTE, mask):
    slope_LBTE = np.zeros(z_LBTE.shape)
    for index in np.ndindex(*z_LBTE.shape):
        moved = z_LBTE.astype(complex)
        moved[index] += 1j * STEP
        slope_LBTE[index] = np.imag(loss(moved, mask)) / STEP
    return slope_LBTE


def vectors() -> dict:
    rng = np.random.default_rng(27)
    z_LBTE = (rng.normal(size=(L, B, T, E)) + rng.normal(size=(L, 1, 1, E))).round(3)
    mask_BT = np.arange(T) < np.array(LENGTHS)[:, None]
    losses = [
        {
            **{"name": name, "source": source, "model": fields, "balance": balance},
            **{"devices": devices, "coefficients": coefficients},
            "loss": float(np.real(loss(z_LBTE, mask_BT))),
            "gradient": gradient(loss, z_LBTE, mask_BT).round(12).tolist(),
        }
        for name, source, loss, fields, balance, devices, coefficients in LOSSES
    ]
    load_E, bias_E = [9, 4, 12, 7], [0.05, -0.02, 0.0, -0.03]
    score_z_ME = (rng.normal(size=(256, E)) + rng.normal(size=E)).round(2)
    updates = {
        "load": load_E,
        "bias": bias_E,
        "rate": 0.001,
        "bias_after": bias_update(load_E, bias_E, 0.001).tolist(),
        "quantile_logits": score_z_ME.tolist(),
        "quantile_after": quantile_update(score_z_ME, np.array(bias_E)).tolist(),
        "coefficient": 0.01,
        "coefficient_after": adaptive_update(load_E, 0.01),
    }
    return {
        "made_by": "tests/conformance/make_vectors.py, float64 numpy",
        "logits": z_LBTE.tolist(),
        "mask": mask_BT.astype(int).tolist(),
        "losses": losses,
        "updates": updates,
    }


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(json.dumps(vectors()) + "\n")
