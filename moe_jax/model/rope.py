"""Rotary positions, and a table of the methods that stretch their wavelengths for longer texts."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from moe_jax.model.config import ModelConfig


def rotate(x_BTNH: jax.Array, positions_BT: jax.Array, config: "ModelConfig") -> jax.Array:
    """Applies rotary positions, pairing dimension i with i + R/2 (Su et al., arXiv 2104.09864).

    R is `config.rotary_size`; dimensions from R on are left unchanged.
    """
    x, y, rest = jnp.split(x_BTNH, (config.rotary_size // 2, config.rotary_size), axis=-1)
    angle = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies(config)
    length = ROPES[config.rope_type].length(config)
    sin, cos = ((length * f(angle)).astype(x_BTNH.dtype) for f in (jnp.sin, jnp.cos))
    return jnp.concatenate([x * cos - y * sin, y * cos + x * sin, rest], axis=-1)


def frequencies(config: "ModelConfig") -> jax.Array:
    """The frequencies [R/2], in radians per position."""
    half = config.rotary_size // 2
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return ROPES[config.rope_type].stretch(frequency, config)


def _linear(frequency: jax.Array, config: "ModelConfig") -> jax.Array:
    """Stretches all wavelengths by the factor (Chen et al., arXiv 2306.15595)."""
    return frequency / config.rope_scaling_factor


def _llama3(frequency: jax.Array, config: "ModelConfig") -> jax.Array:
    """Wavelengths above the original length / `rope_low_freq_factor` are stretched by the factor,
    those below the original length / `rope_high_freq_factor` are kept, and those in between are
    blended (Grattafiori et al., arXiv 2407.21783)."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    waves = config.rope_original_length * frequency / (2 * math.pi)
    kept = jnp.clip((waves - low) / (high - low), 0, 1)
    return frequency * (kept + (1 - kept) / config.rope_scaling_factor)


def _llama3_problems(config: "ModelConfig") -> Iterator[str]:
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    if low >= high:
        yield f"rope_low_freq_factor={low} must be less than rope_high_freq_factor={high}"


def _yarn(frequency: jax.Array, config: "ModelConfig") -> jax.Array:
    """Waves with at least `rope_beta_fast` rotations in the original length are kept, waves with at
    most `rope_beta_slow` rotations are stretched by the factor, and a ramp over the dimensions in
    between blends the two (Peng et al., arXiv 2309.00071, §3.2)."""

    def dimension(turns: float) -> float:
        waves = config.rope_original_length / (2 * math.pi * turns)
        return config.rotary_size * math.log(waves) / (2 * math.log(config.rope_theta))

    first, last = dimension(config.rope_beta_fast), dimension(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotary_size - 1)
    ramp = (jnp.arange(len(frequency), dtype=jnp.float32) - first) / ((last - first) or 0.001)
    stretched = jnp.clip(ramp, 0, 1)
    return frequency * (1 - stretched + stretched / config.rope_scaling_factor)


def _yarn_length(config: "ModelConfig") -> float:
    """The factor on q and on k that keeps attention equally sharp (Peng et al., §3.4)."""
    if config.rope_attention_factor is not None:
        return config.rope_attention_factor
    return yarn_mscale(config.rope_scaling_factor)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's factor on q and k for wavelengths stretched by `factor`."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _yarn_problems(config: "ModelConfig") -> Iterator[str]:
    fast, slow = config.rope_beta_fast, config.rope_beta_slow
    if fast < slow:
        yield f"rope_beta_fast={fast} must be at least rope_beta_slow={slow}"
    if config.rope_theta <= 1:
        yield f"rope_theta={config.rope_theta} must be more than 1 for rope_type='yarn'"


@dataclasses.dataclass(frozen=True)
class Rope:
    """A method that stretches the wavelengths of rotary positions.

    reads: the fields of ModelConfig that it reads.
    stretch: (plain frequencies, config) -> the frequencies to use.
    length: the factor on the rotated part of q and k.
    problems: a line for each combination of values that the fields cannot have.
    """

    reads: tuple[str, ...] = ()
    stretch: Callable[[jax.Array, "ModelConfig"], jax.Array] = lambda frequency, config: frequency
    length: Callable[["ModelConfig"], float] = lambda config: 1.0
    problems: Callable[["ModelConfig"], Iterator[str]] = lambda config: iter(())


ROPES = {
    "default": Rope(),
    "linear": Rope(("rope_scaling_factor",), _linear),
    "llama3": Rope(
        (
            *("rope_scaling_factor", "rope_original_length"),
            *("rope_low_freq_factor", "rope_high_freq_factor"),
        ),
        _llama3,
        problems=_llama3_problems,
    ),
    "yarn": Rope(
        (
            *("rope_scaling_factor", "rope_original_length", "rope_attention_factor"),
            *("rope_beta_fast", "rope_beta_slow", "rope_truncate"),
        ),
        _yarn,
        _yarn_length,
        _yarn_problems,
    ),
}
