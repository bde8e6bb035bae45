"""Every key has an explanation and a check, and no section can be made with a value it refuses."""

import dataclasses
import math

import pytest

from moe_jax.config import checks, monitoring, objectives, section, sections
from moe_jax.config.checks import ConfigError
from moe_jax.config.run import Run
from moe_jax.model.presets import PRESETS

NOT_FINITE = (math.nan, math.inf, -math.inf)
# Check -> values that it refuses.
WRONG = {
    checks.POSITIVE: (0, -1, *NOT_FINITE),
    checks.NOT_NEGATIVE: (-1, -1e-9, *NOT_FINITE),
    checks.SHARE: (-0.01, 1.01, *NOT_FINITE),
    checks.DECAY_RATE: (-0.01, 1.0, 1.01, *NOT_FINITE),
    checks.AXIS_SIZE: (0, -2, *NOT_FINITE),
    checks.seed: (-1, 2**31),
    checks.texts: ((2024,), ("a", None), (1.5,)),
    checks.pattern: ("(", "*a"),
    checks.rules: (
        *((("a", "b"),), (("(", 1.0),), (("a", -1),), (("a", math.inf),), (("a", math.nan),)),
        *(("a",), (("a", 1, 2),)),
    ),
    checks.ranges: ((3,), ((9, 3),), ((-1, 2),), ((1.5, 2),), ("ab",), ((1, 2, 3),)),
    checks.steps: ((3,), (5, 4), (0, 2), (1.5, 2), (True, 2), "ab", (1, 2, 3)),
    checks.intervals: (
        *((("a",),), (("a", -1),), ((1, 2),), (("a", 1.5),), (("a", True),), (("a", 1, 2),)),
        ("a",),
    ),
}
OF_NAMES = ("ab", ("a",), (("", "x"),), ((1, "x"),), (("a", "x", "y"),))
WRONG |= {
    checks.named_texts: (*OF_NAMES, (("a", 1),), (("a", "x"), ("a", "y"))),
    checks.named_numbers: (
        *(*OF_NAMES, (("a", "x"),), (("a", -1),), (("a", True),), (("a", 1), ("a", 2))),
        *((("a", number),) for number in NOT_FINITE),
    ),
    checks.stages: (
        *((9,), ((0, (("a", 1),)),), ((9, ()),), ((9, (("a", -1),)),), ((9.5, (("a", 1),)),)),
        ((9, (("a", 1),)), (9, (("a", 2),))),
    ),
}
SECTIONS = (*section.Section.__subclasses__(),)
KEYS = [
    pytest.param(section, field, id=f"{section.path}.{field.name}")
    for section in SECTIONS
    for field in dataclasses.fields(section)
    if "check" in field.metadata
]


def made(section, **values):
    if section is Run:
        values["model"] = PRESETS["quickstart"]
    return section(**values)


@pytest.mark.parametrize("section", SECTIONS)
def test_the_defaults_of_a_section_are_right_and_cannot_be_changed(section):
    one = made(section)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(one, dataclasses.fields(section)[0].name, 1)


@pytest.mark.parametrize(("section", "field"), KEYS)
def test_a_key_is_explained_in_one_line_and_every_number_is_checked(section, field):
    assert field.metadata["explanation"] and "\n" not in field.metadata["explanation"]
    number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
    assert field.metadata["check"] is not None or not number
    # And what a field's annotation says is the type of its default.
    assert isinstance(field.default, field.type)


@pytest.mark.parametrize(("section", "field"), KEYS)
def test_a_value_that_a_key_refuses_is_named_in_one_line(section, field):
    check = field.metadata["check"]
    wrong = ("no-such",) if isinstance(check, checks.OneOf) else WRONG[check] if check else ()
    name = ".".join(filter(None, ("config", section.path, field.name)))
    for value in wrong:
        with pytest.raises(ConfigError) as error:
            made(section, **{field.name: value})
        text = str(error.value)
        assert text.startswith((f"{name}=", f"{name} has ")) and "\n" not in text


@pytest.mark.parametrize(
    ("check", "value", "complaint"),
    [
        (checks.POSITIVE, 0, "config.a.b=0 must be more than 0"),
        (checks.NOT_NEGATIVE, -1, "config.a.b=-1 must not be negative"),
        (checks.SHARE, 2, "config.a.b=2 must be from 0 to 1"),
        (checks.SHARE, math.nan, "config.a.b=nan is not a finite number; it must be from 0 to 1"),
        (checks.seed, 2**31, "config.a.b=2147483648 must be less than 2**31"),
        (checks.one_of("x", "y"), "z", "config.a.b='z' is unknown; use one of x, y"),
    ],
)
def test_a_refusal_says_the_value_and_the_limit(check, value, complaint):
    with pytest.raises(ConfigError) as error:
        check("config.a.b", value)
    assert str(error.value) == complaint


def test_an_expression_a_rule_and_an_interval_are_accepted():
    sections.Optimizer(frozen=r"moe/(experts|router)", gradient_factors=(("moe", 0), ("a|b", 0.5)))
    intervals = (("routing", 0), ("similarity", 10))
    assert monitoring.Evaluation(intervals=intervals).intervals == intervals


COPY = sections.Upcycle(recipe="bam", optimizer_state="copy")


@pytest.mark.parametrize(
    ("section", "values", "complaint"),
    [
        (
            sections.Training,
            {"batch_size": 6, "accumulation_steps": 4},
            "batch_size=6 is not divisible by accumulation_steps=4",
        ),
        (
            sections.Balance,
            {"load_balancing_schedule": "adaptive", "load_balancing_scope": "all_layers"},
            "set balance.load_balancing_scope='layer'",
        ),
        (objectives.Distillation, {"source": "a"}, "set objective.distillation.coefficient"),
        (objectives.Distillation, {"coefficient": 0.5}, "set objective.distillation.source"),
        (sections.Upcycle, {"recipe": "no-such"}, "recipe='no-such' is unknown; use one of"),
        (
            sections.Upcycle,
            {"recipe": "drop", "parameters": {"std": 0.1}},
            "recipe 'drop' has no parameter 'std'; it takes ratio",
        ),
        (
            sections.Upcycle,
            {"router": "zero", "optimizer_state": "copy", "parameters": {"ratio": 0.5}},
            "sets ratio, router, optimizer_state without a recipe",
        ),
        (sections.Init, {"upcycle": sections.Upcycle(recipe="drop")}, "needs a parent; set"),
        (sections.Init, {"source": "a,b"}, "names several models; set config.init.upcycle.recipe"),
        (sections.Init, {"source": "a,b", "upcycle": COPY}, "is for one parent"),
        (
            sections.Init,
            {"source": "a", "upcycle": dataclasses.replace(COPY, recipe="llama_moe")},
            "is for one parent, and not for recipe 'llama_moe' here",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(section, values, complaint):
    with pytest.raises(ConfigError) as error:
        section(**values)
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_the_parents_are_the_sources_one_by_one():
    assert sections.Init().parents == ()
    assert sections.Init(source="a").parents == ("a",)
    upcycle = sections.Upcycle(recipe="branch_train_mix")
    assert sections.Init(source="a,b", upcycle=upcycle).parents == ("a", "b")
