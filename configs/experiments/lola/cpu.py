"""Does sampling languages more evenly, as LOLA does, help the rare ones, and what does it cost?

    python scripts/sweep.py --config=configs/experiments/lola/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    for run in runs/experiments/{uneven,temperature,uniform}_s*; do
        python scripts/analyze.py --checkpoint=$run --output=$run/analysis \\
            --text=tfds:lo_parallel19_sealed
    done
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/lola/cpu.py

LOLA's MoE (Srivastava et al., arXiv 2409.11272) at this size: every second layer has 16 experts,
top-1, from scratch. The 19 languages of the text get uneven shares (that of rank i is i^-1.5),
those shares to the power of 0.3 (sampling by temperature), or equal ones, as in the blend of LOLA's
training script. The routing of 5,263 held-out tokens of each language is compared. Hardware: 2 CPU
cores.

The hours that it took, and its results, are in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms

LANGUAGES = (
    *("en-us", "de", "ru", "es", "fr", "ja", "zh-cn", "it", "pl", "pt-br"),
    *("nl", "vi", "tr", "cs", "id", "el", "ko", "hu", "fi"),
)
EXPONENTS = {"uneven": 1.0, "temperature": 0.3, "uniform": 0.0}
CONCLUSION = """
More even shares help the rare languages and cost the frequent ones. The worst language
ends 0.557 bits per byte lower than with uneven shares, and 0.707 lower with equal ones. English,
the most frequent, pays more than that, 0.718 and 0.989. The loss of all languages together, in
which each has as much text, is 0.253 and 0.262 lower: on average, temperature has nearly all of
the gain of equal shares.

Routing follows the families of languages in every arm, a little: the correlation of the distances
is 0.187 to 0.256, and its interval excludes zero. Temperature is not shown to change how far apart
the languages are routed (by 0.025 bits), nor how evenly the experts are used. The tokens are bytes,
so that the experts see scripts first; this corpus cannot separate a family from its script.
"""


get_config = cpu.config


def get_sweep():
    model = {
        "model.num_experts": 16,
        "model.num_experts_per_tok": 1,
        "model.norm_topk_prob": False,
        "model.layers": ("dense", "moe") * 2,
        "balance.load_balancing_coefficient": 0.01,
        "data.mixture.by_label": True,
    }
    shares = {
        name: {
            "data.mixture.shares": tuple(
                (label, rank ** (-1.5 * exponent)) for rank, label in enumerate(LANGUAGES, start=1)
            )
        }
        for name, exponent in EXPONENTS.items()
    }
    return arms.seeds(arms.product(model, arms.named(shares)), 3)


def get_study():
    others = study.against(["temperature", "uniform"], "uneven")
    return study.Study(
        questions=(
            study.Question("Does it change the loss of the worst language?", others, "worst_label"),
            study.Question(
                f"What does it cost {LANGUAGES[0]}, the most frequent?",
                others,
                f"label/{LANGUAGES[0]}",
            ),
            study.Question("Does it change the loss of all languages together?", others),
            study.Question(
                "Does it change how evenly experts are used?", others, "effective_experts"
            ),
            study.Question(
                "Does it change how far apart languages are routed?", others, "divergence"
            ),
            study.Question(
                "Does routing follow language families?", study.alone(EXPONENTS), "family"
            ),
        ),
        conclusion=CONCLUSION,
    )
