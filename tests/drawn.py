"""Parameters of tiny models, drawn by numpy: compiling their initialisation takes a second each."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax import model


def parameters(config: model.ModelConfig, seed: int = 0, *, std: float = 0.3) -> dict:
    """Scales of norms are 1; all other leaves are normal, with differences that a test can see."""
    shapes = jax.eval_shape(functools.partial(model.init, config), jax.random.key(0))
    draw = np.random.default_rng(seed).normal

    def leaf(path, shape):
        is_scale = path[-1].key == "scale"
        value = np.ones(shape.shape) if is_scale else draw(scale=std, size=shape.shape)
        return jnp.asarray(value, shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)
