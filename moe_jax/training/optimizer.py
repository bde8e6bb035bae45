"""AdamW with the schedules of the papers, by optax."""

import re

import jax
import optax
from ml_collections import ConfigDict

from moe_jax.parallel import naming


def schedule(optimizer: ConfigDict, num_steps: int) -> optax.Schedule:
    """Linear warmup, then "cosine" to the final rate, or "wsd": constant and a linear decay."""
    peak = optimizer.learning_rate
    final = peak * optimizer.final_learning_rate_ratio
    after_warmup = num_steps - optimizer.warmup_steps
    stable = after_warmup - optimizer.decay_steps
    shapes = {
        "cosine": lambda: optax.cosine_decay_schedule(
            peak, max(after_warmup, 1), alpha=optimizer.final_learning_rate_ratio
        ),
        "wsd": lambda: optax.join_schedules(
            [
                optax.constant_schedule(peak),
                optax.linear_schedule(peak, final, max(optimizer.decay_steps, 1)),
            ],
            [stable],
        ),
    }
    # From one step's worth of the peak, so that no step is spent at a rate of zero.
    warmup = optax.linear_schedule(
        peak / max(optimizer.warmup_steps, 1), peak, max(optimizer.warmup_steps - 1, 1)
    )
    return optax.join_schedules([warmup, shapes[optimizer.schedule]()], [optimizer.warmup_steps])


def adamw(optimizer: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; weight decay skips the paths of `no_weight_decay`."""

    def decayed(params):
        pattern = re.compile(optimizer.no_weight_decay or r"(?!)")
        return jax.tree_util.tree_map_with_path(
            lambda path, _: not pattern.search(naming.path_name(path)), params
        )

    return optax.chain(
        optax.clip_by_global_norm(optimizer.gradient_clip_norm),
        optax.adamw(
            schedule(optimizer, num_steps),
            b1=optimizer.beta1,
            b2=optimizer.beta2,
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            mask=decayed,
        ),
    )
