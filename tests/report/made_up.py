"""Workdirs of made-up runs with plausible curves: a dense parent and arms with several seeds."""

import json
import math

import numpy as np

from moe_jax.analysis import measures

LABELS = ("en", "de", "el", "ja", "ko", "ru", "tr", "zh-cn")
STEPS = range(0, 241, 20)
PARENT_STEPS, TOKENS_PER_STEP, BLOCKS = 700, 1024, 20


def router_rows(load_LE):
    sums = {"tokens_per_expert_E": np.round(10_000 * np.array(load_LE))}
    return measures.rows(measures.Sums(sums, "softmax_topk", 1.0, measures.VALIDATION))


def losses(bits, noise, rng):
    """The entries of a validation: `bits` per byte, in blocks that differ by their text."""
    text = np.random.default_rng(7).normal(0, 0.3, BLOCKS)  # the same text for all runs
    per_block = bits + text - text.mean() + rng.normal(0, noise, BLOCKS)
    nats = (per_block * math.log(2) * 1000).round(3)
    mean = float(nats.sum() / BLOCKS / 1000)
    return {
        "loss": mean,
        "bits_per_byte": mean / math.log(2),
        "held_out_tokens": BLOCKS * 1000,
        "per_language": {
            label: {"loss": mean, "bits_per_byte": bits + place / 8 - 0.5}
            for place, label in enumerate(LABELS)
        },
        "blocks": [[float(n), 1000.0, 1000.0] for n in nats],
    }


def write_run(folder, *, seed, start, end, num_experts=0, source="", recipe="", noise=0.02):
    """Writes the workdir of a finished run whose loss falls from `start` to `end`."""
    rng = np.random.default_rng([seed, int(1000 * end)])
    end += rng.normal(0, 0.01)
    last = STEPS[-1] if source or num_experts else PARENT_STEPS
    flops = (6.5e6 if num_experts else 4.1e6) * TOKENS_PER_STEP * last
    skew = rng.normal(0, 0.4, (4, num_experts))
    rows, found, share_LE = [], {}, None
    for step in STEPS if last == STEPS[-1] else range(0, PARENT_STEPS + 1, 100):
        bits = end + (start - end) * math.exp(-4 * step / last)
        found = losses(bits, noise / 4, rng)
        row = {"step": step, "tokens": step * TOKENS_PER_STEP, "validation": found}
        if num_experts:
            share_LE = np.exp(skew * step / last)
            share_LE /= share_LE.sum(axis=1, keepdims=True)
            row["router"] = router_rows(share_LE)
        if num_experts and source:
            away = 0.3 * step / last
            row |= {"parent_similarity": [1 - away, 1.0], "parent_distance": [away, 0.0]}
        if step:
            training = {"loss": bits * 0.7 + rng.normal(0, 0.02), "tokens_per_second": 5000.0}
            training["learning_rate"] = 1e-3
            rows.append({"step": step, "tokens": step * TOKENS_PER_STEP, **training})
        rows.append(row)
    kept = {} if share_LE is None else router_rows(share_LE)
    result = {
        "steps": last, "tokens": last * TOKENS_PER_STEP, "training_flops": flops, **found,
        "parent_tokens": PARENT_STEPS * TOKENS_PER_STEP if source else 0,
        "parent_training_flops": 2.9e12 if source else 0.0,
        "seconds": 60.0, "device_seconds": 90.0, "goodput": {"compute": 0.75, "evaluation": 0.25},
        "parent_device_seconds": 120.0 if source else 0.0,
        "parameters": 3_400_000 if num_experts else 660_000,
        "active_parameters": 1_050_000 if num_experts else 660_000,
        "router": "softmax_topk" if num_experts else "", "byte_unigram_bits": 5.9985,
        "tokens_per_expert": kept.get("tokens_per_expert"),
        "effective_experts": kept.get("effective_experts"),
        "router_drift": rng.uniform(0.8, 1.3, 4).tolist() if num_experts else [],
        "expert_similarity": rng.uniform(0, 1, 4).tolist() if num_experts else None,
        "samples": [{"prompt": "To insert a table, ", "continuation": "click " * 15}] * 2,
        "sample_metrics": {"seq_rep_4": 0.92, "distinct_2": 0.07, "words": 15.0},
        "versions": {"python": "3.11", "jax": "0.10.2", "moe_jax": "0.1.0"}, "commit": "0123abc",
        "command": f"python scripts/train.py --workdir={folder.name} --config.seed={seed}",
        "device": "cpu x 1", "skipped_steps": 0,
    }  # fmt: skip
    config = {
        "seed": seed,
        "data": {"source": "embedded", "validation_fraction": 0.05, "cache_dir": ""},
        "init": {"source": source, "upcycle": {"recipe": recipe}},
        "model": {"num_experts": num_experts, "router": None},
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_sweep(root, *, arms, seeds, parents=1):
    """Writes a dense parent (or one per seed), its continuation, and arms with several seeds.

    Returns: the workdirs by name: 22 runs with 3 seeds and 5 arms.
    """
    folders = {}
    for n in range(parents):
        name = f"dense_s{n}" if parents > 1 else "dense"
        folders[name] = write_run(root / name, seed=n, start=6.0, end=3.42)
    for seed in range(1, seeds + 1):
        source = f"runs/x/dense_s{seed - 1}" if parents > 1 else "runs/x/dense"
        kept = {"seed": seed, "source": source}
        name = f"dense_continued_s{seed}"
        folders[name] = write_run(root / name, start=3.45, end=3.31, **kept)
        name = f"scratch_s{seed}"
        folders[name] = write_run(root / name, seed=seed, start=6.0, end=3.86, num_experts=8)
        for arm in range(arms):
            name = f"{('naive', 'drop_0.5', 'drop_1.0', 'noise', 'cluster')[arm % 5]}"
            name += f"_{arm // 5}" * (arm >= 5) + f"_s{seed}"
            end, start = 3.29 + 0.02 * arm, 3.44 + 0.3 * (arm % 3)
            shape = {"num_experts": 8, "recipe": f"recipe{arm}"}
            folders[name] = write_run(root / name, start=start, end=end, **shape, **kept)
    return folders
