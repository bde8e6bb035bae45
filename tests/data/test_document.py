"""The choice of the held-out documents."""

from moe_jax.data.document import is_held_out


def test_the_held_out_share_is_about_the_fraction_and_grows_with_it():
    keys = [f"key {i}" for i in range(10_000)]
    small, large = ({key for key in keys if is_held_out(key, fraction)} for fraction in (0.02, 0.1))
    assert small < large  # a tokenizer trained outside `large` has seen nothing of `small`
    assert 800 < len(large) < 1200  # standard deviation 30
    assert not any(is_held_out(key, 0.0) for key in keys)
    assert all(is_held_out(key, 1.0) for key in keys)
