"""The vectors against sums worked by hand, our rules against the vectors, and faults that others
had, planted to see that they are found."""

import dataclasses
import importlib.util

import jax
import numpy as np
import pytest

from moe_jax.commands import conformance
from moe_jax.conformance import ours, peers, table, vectors
from moe_jax.model import routing
from tests.conformance import make_vectors

DATA = vectors.load()
RULES = {rule.name: rule for rule in DATA.rules}


def test_the_stored_vectors_are_those_of_the_formulas():
    made = make_vectors.vectors()
    np.testing.assert_array_equal(DATA.logits_LBTE, made["logits"])
    assert DATA.updates.keys() == made["updates"].keys()
    for entry in made["losses"]:
        rule = RULES[entry["name"]]
        np.testing.assert_allclose(rule.loss, entry["loss"], rtol=1e-12)
        np.testing.assert_allclose(rule.gradient_LBTE, entry["gradient"], atol=2e-12)


def test_the_formulas_are_right_where_a_hand_can_work_them_out():
    """Each token is certain of another expert: f = P = 1/4. Equal logits: P = 1/4 whatever f."""
    own_LBTE = np.tile(40.0 * np.eye(4), (2, 4, 1, 1))
    mask_BT = np.ones((4, 4), bool)
    make_vectors_T = make_vectors.T
    try:
        make_vectors.T = 4
        np.testing.assert_allclose(make_vectors.switch(own_LBTE, mask_BT), 2 * 0.01 * 1)
        flat_LBTE = np.zeros((2, 4, 4, 4))
        np.testing.assert_allclose(make_vectors.hugging_face(flat_LBTE, mask_BT), 0.02 * 2)
        rows = make_vectors.megatron(flat_LBTE, mask_BT, make_vectors.ONE_BY_ONE)
        np.testing.assert_allclose(rows, 2 * 0.01 * 1)
        np.testing.assert_allclose(make_vectors.z_loss(flat_LBTE, mask_BT), 2 * np.log(4) ** 2)
        # Megablocks: 0.01 (uniform) and a z-loss of log(4)^2, both means over layers.
        olmoe = make_vectors.megablocks(flat_LBTE, mask_BT)
        np.testing.assert_allclose(olmoe, 0.01 + 0.001 * np.log(4) ** 2)
    finally:
        make_vectors.T = make_vectors_T
    # Capacity 8 of 32 assignments: 9 - 8 and 12 - 8 are dropped, 5/32 / 5 exceeds 0.01.
    assert make_vectors.adaptive_update([9, 4, 12, 7], 0.01) == pytest.approx(0.01)
    assert make_vectors.adaptive_update([9, 8, 8, 7], 0.01) == pytest.approx(0.0099 + 0.01 / 160)


def test_a_gradient_of_the_switch_loss_is_its_formula():
    """dL/dz_e = alpha E / M · p_e (f_e - sum f p) at each of M tokens."""
    rule = RULES["switch"]
    z_ME = DATA.logits_LBTE[0][DATA.mask_BT]
    p_ME = np.exp(z_ME) / np.exp(z_ME).sum(axis=1, keepdims=True)
    f_E = np.bincount(z_ME.argmax(axis=1), minlength=4) / len(z_ME)
    by_hand = 0.01 * 4 / len(z_ME) * p_ME * (f_E - (p_ME @ f_E)[:, None])
    np.testing.assert_allclose(rule.gradient_LBTE[0][DATA.mask_BT], by_hand, atol=1e-11)


LATE = [pytest.param(n, marks=pytest.mark.long) for n in RULES if n != "deepseek_v3"]


@pytest.mark.parametrize("name", ["deepseek_v3", *LATE])
def test_our_rules_conform_on_devices_in_microbatches_with_padding_and_with_remat(name):
    found = ours.differences(RULES[name], DATA)
    checked = {check for check, difference in found.items() if difference is not None}
    assert checked == {*ours.CHECKS} - ({"microbatches"} if name == "megatron_aux" else set())
    assert max(found[check] for check in checked) < ours.LIMIT


def test_our_updates_conform():
    for name, (difference, limit) in ours.updates(DATA).items():
        assert difference <= limit, name


FAULTS = {
    "a softmax of a softmax": lambda p_ME: jax.nn.softmax(p_ME),
    "a gradient that is discarded": jax.lax.stop_gradient,
    "a gradient that shrinks with the devices": lambda p_ME: (
        p_ME / 2 + jax.lax.stop_gradient(p_ME / 2)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_others_had_are_found(fault, monkeypatch):
    real = routing.statistics

    def faulty(chosen, *others):
        probabilities_ME = FAULTS[fault](chosen.probabilities_ME)
        return real(dataclasses.replace(chosen, probabilities_ME=probabilities_ME), *others)

    monkeypatch.setattr(routing, "statistics", faulty)
    expected_LBTE = RULES["hugging_face"].gradient_LBTE
    _, gradient_LBTE = ours.evaluated(RULES["hugging_face"], DATA, ours.Way())
    off = np.abs(gradient_LBTE - expected_LBTE).max() / np.abs(expected_LBTE).max()
    assert off > 100 * ours.LIMIT


def test_a_failure_of_ours_is_in_the_table_and_in_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["moe_jax conformance"])
    ok = dict.fromkeys(ours.CHECKS, 1e-7)
    broken = {**ok, "devices": 0.5, "microbatches": None}
    found = {name: broken if name == "olmoe" else ok for name in RULES}
    monkeypatch.setattr(ours, "differences", lambda rule, data: found[rule.name])
    with pytest.raises(SystemExit) as ended:
        conformance.main()
    assert ended.value.code == 1
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["olmoe", "pass 1e-07", "FAIL 5e-01", "-", "pass 1e-07", "pass 1e-07"]
    found["olmoe"] = ok
    conformance.main()
    assert "FAIL" not in capsys.readouterr().out


def test_a_peer_that_is_not_installed_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package transformers.*pip install"):
        peers.version("transformers")


def test_a_peers_family_that_cannot_run_is_not_taken_for_one_that_passes():
    missing = peers.Found("mixtral", "hugging_face", missing="no such router")
    wrong = peers.Found("olmoe", "hugging_face", 1e-8, 0.5)
    text = table.of_peer("transformers 0", [missing, wrong])
    assert "not run" in text and "FAIL 5e-01" in text and "pass 1e-08" in text


def test_transformers_on_this_machine_is_found_to_conform_or_to_have_the_double_softmax():
    """Releases before 5.6.0 fail; the fault of issue 45120 is in the routers of nine families."""
    pytest.importorskip("torch")
    release = pytest.importorskip("transformers").__version__
    before = tuple(map(int, release.split(".")[:2])) < (5, 6)
    for one in peers.transformers(DATA):
        faulty = before and one.rule == "hugging_face" and one.code != "gpt_oss"
        assert not one.missing, one
        assert (max(one.loss, one.gradient) > ours.LIMIT) == faulty, one
