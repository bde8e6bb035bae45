"""The private modules of jax: the installed release is a known one, and nothing else uses them."""

import dataclasses
import pathlib
import re

import jax
import pytest

from moe_jax.parallel import jax_private

PACKAGE = pathlib.Path(jax_private.__file__).parents[1]


@pytest.mark.parametrize("name", jax_private.TABLE)
def test_the_installed_jax_is_known_and_has_all_that_is_used(name):
    release = ".".join(jax.__version__.split(".")[:2])
    assert release in jax_private.RELEASES
    assert jax_private.load(name) is not None


@pytest.mark.parametrize(
    ("name", "change", "lack"),
    [
        ("state", {"module": "jax._src.no_such"}, "jax._src.no_such.global_state"),
        ("state", {"attribute": "no_state"}, "jax._src.distributed.no_state"),
        ("client", {"uses": ("shout",)}, "jaxlib._jax.DistributedRuntimeClient with shout"),
        ("cudnn_attention", {"uses": ("segments",)}, ".*dot_product_attention with segments"),
    ],
)
def test_what_the_installed_jax_lacks_is_named_in_one_line(name, change, lack, monkeypatch):
    row = dataclasses.replace(jax_private.TABLE[name], **change)
    monkeypatch.setitem(jax_private.TABLE, name, row)
    with pytest.raises(ImportError, match=f"has no {lack} .*; install a jax of 0.10, ") as error:
        jax_private.load(name)
    assert "\n" not in str(error.value)


def test_no_other_file_uses_a_private_module_of_jax():
    private = re.compile(r"\bjax\._src|\bjaxlib\b|\bglobal_state\b")
    users = [p.name for p in PACKAGE.rglob("*.py") if private.search(p.read_text("utf-8"))]
    assert users == ["jax_private.py"]
