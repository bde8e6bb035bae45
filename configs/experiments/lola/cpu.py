"""Does sampling languages by temperature, as in LOLA, help the rare ones, and what does it cost?

    python scripts/sweep.py --config=configs/experiments/lola/cpu.py \\
        --workdir=runs/experiments --max_parallel=2
    python scripts/results.py --collect=runs/experiments --config=configs/experiments/lola/cpu.py

LOLA's MoE (Srivastava et al., arXiv 2409.11272) at this size: every second layer has 16 experts,
top-1, from scratch. The 19 languages of the text get uneven shares (that of rank i is i^-1.5), the
same shares to the power of 0.3, or equal ones. Which experts the languages use is shown by
`scripts/analyze.py --checkpoint=RUN --text=tfds:udhr_languages`. Hardware: 2 CPU cores.

It has not been run yet; its results will be in docs/results.md.
"""

from moe_jax.experiments import cpu, study
from moe_jax.sweep import arms

LANGUAGES = (
    *("en-us", "de", "ru", "es", "fr", "ja", "zh-cn", "it", "pl", "pt-br"),
    *("nl", "vi", "tr", "cs", "id", "el", "ko", "hu", "fi"),
)
EXPONENTS = {"uneven": 1.0, "temperature": 0.3, "uniform": 0.0}


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
            study.Question("Does it change the loss of all languages together?", others),
            study.Question(
                "Does it change how evenly experts are used?", others, "effective_experts"
            ),
        ),
    )
