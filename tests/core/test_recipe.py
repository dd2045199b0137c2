"""Recipes from Python and TOML: which rule wins, and what is refused in which words."""

from __future__ import annotations

import pytest

from edgemat import FormatError, Recipe
from edgemat.recipe import WeightSpec

TOML = """
input = "fixed<8,1>"
weights = "fixed<6>"
every_layer = true
khot = 2

[types.Conv2d]
weights = "fixed<5>"

[first]
weights = "fixed<8>"

[last]
outputs = "fixed<16,8,TRN,SAT_SYM>"

[rules."stage1.*"]
weights = "fixed<4>"
weight_groups = "weight"

[rules.stem]
weights = "fixed<3>"
"""


class Conv2d:
    """Stands for a layer type without importing torch."""


class Special(Conv2d):
    """A type of which `Conv2d` is a base."""


def test_toml_means_what_the_constructor_means():
    recipe = Recipe.from_toml(TOML)
    built = Recipe(
        input="fixed<8,1>",
        weights="fixed<6>",
        every_layer=True,
        khot=2,
        types={"Conv2d": {"weights": "fixed<5>"}},
        first={"weights": "fixed<8>"},
        last={"outputs": "fixed<16,8,TRN,SAT_SYM>"},
        rules={"stage1.*": {"weights": "fixed<4>", "weight_groups": "weight"}, "stem": {"weights": "fixed<3>"}},
    )
    assert recipe == built
    assert recipe != Recipe.from_toml(TOML.replace("khot = 2", "khot = 1"))
    assert Recipe.from_toml(recipe.to_toml()) == recipe


def test_inputs_by_name_survive_toml():
    recipe = Recipe(input={"left": "fixed<8,1>", "right x": "ufixed<4,4>"}, weight_groups=16)
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_toml(Recipe().to_toml() or "\n") == Recipe()


def test_toml_file(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(TOML, encoding="utf-8")
    assert Recipe.from_toml(path) == Recipe.from_toml(TOML) == Recipe.from_toml(str(path))
    with pytest.raises(FormatError, match=r"missing\.toml.*cannot be read"):
        Recipe.from_toml(tmp_path / "missing.toml")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="cannot be read"):
        Recipe.from_toml(path)


def test_settings_taken_back_survive_toml():
    """None in a rule is a statement: without it the recipe's own setting would hold for the layer."""
    recipe = Recipe(
        khot=2,
        outputs="fixed<8>",
        weight_groups=4,
        rules={"a": {"khot": None, "outputs": None}, "\U0001f600\x7f": {"weight_groups": None}},
        last={"accumulator": None},
    )
    again = Recipe.from_toml(recipe.to_toml())
    assert again == recipe
    assert again.layer([("a", None)]).khot is None and again.layer([("b", None)]).khot == 2
    assert again.layer([("\U0001f600\x7f", None)]).weight_groups is None
    with pytest.raises(FormatError, match="no Unicode"):
        Recipe(rules={"\ud800": {"khot": 1}}).to_toml()
    with pytest.raises(FormatError, match="weights: format 'none' cannot be read"):
        Recipe(rules={"a": {"weights": "none"}})


@pytest.mark.parametrize("source", [None, 3, b"khot = 1", "a\0b", "khot = " + "[" * 5000 + "]" * 5000])
def test_what_is_no_recipe_at_all_is_refused(source):
    with pytest.raises(FormatError, match="Recipe: "):
        Recipe.from_toml(source)


def test_a_rule_by_type_object_cannot_be_written():
    with pytest.raises(FormatError, match="use types="):
        Recipe(rules={Special: {"weights": "fixed<3>"}}).to_toml()


@pytest.mark.parametrize(
    ("name", "kind", "positions", "width"),
    [
        ("other", None, (), 6),
        ("other", Special, (), 5),
        ("stage1.conv", Special, (), 4),
        ("stage1.conv", Special, ("first",), 8),
        ("stem", Special, ("first",), 3),
        ("other", None, ("last",), 6),
    ],
)
def test_which_rule_wins(name, kind, positions, width):
    layer = Recipe.from_toml(TOML).layer([(name, kind)], positions)
    assert layer.weights.width == width
    assert (layer.outputs is not None) == ("last" in positions)
    assert layer.khot == 2


def test_specs_follow_the_layer():
    layer = Recipe(weights="fixed<5>", learn_widths="weights", weight_groups=4, accumulator=12).layer([("a", None)])
    assert layer.weight_spec() == WeightSpec(layer.weights, 4, True, None, 12, "auto", "learned")
    assert not layer.activation_spec(layer.activations).learn_width
    assert Recipe(per_channel_weights=False).layer([("a", None)]).weight_spec().groups == "tensor"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("weigths = 'fixed<8>'", "unknown key 'weigths'; did you mean 'weights'"),
        ("weights = 'fixd<8>'", "'fixd<8>' cannot be read"),
        ("khot = 4", "khot is 4, expected None or a whole number from 1 to 3"),
        ("khot = true", "khot is True, expected None"),
        ("weight_groups = 'channels'", "did you mean 'channel'"),
        ("weight_groups = 0", "weight_groups is 0"),
        ("learn_widths = 'al'", "did you mean 'all'"),
        ("accumulator = 1", "accumulator is 1"),
        (
            "accumulator = 'fixed<12,4,RND,SAT>'",
            "accumulator is 'fixed<12,4,RND,SAT>', expected a width alone",
        ),
        ("accumulator = 'fixed<12,4,TRN,WRAP>'", "and an accumulator that saturates or drops low bits is refused"),
        ("[rules.a]\naccumulator = 'non'", "accumulator is 'non', expected None or a whole number from 2 to 64"),
        ("accumulator_bound = 'a2q++'", "did you mean 'a2q"),
        ("points = 'statistic'", "did you mean 'statistics'"),
        ("every_layer = 1", "every_layer is 1, expected True or False"),
        ("[rules.a]\nkhott = 2", "Recipe rule 'a' has the unknown key 'khott'; did you mean 'khot'"),
        ("[types.Conv2d]\nweights = 3", "Recipe rule 'Conv2d'"),
        ("[first]\nwieghts = 'fixed<8>'", "Recipe first has the unknown key 'wieghts'; did you mean 'weights'"),
        ("rules = 3", "rules is int"),
        ("weights = ", "is no TOML"),
    ],
)
def test_what_is_wrong_is_named(text, words):
    with pytest.raises(FormatError) as error:
        Recipe.from_toml(text + "\n")
    assert words in str(error.value)


def test_unmatched_types_are_named_with_the_nearest():
    recipe = Recipe(types={"Conv2": {"weights": "fixed<4>"}})
    assert recipe.unmatched([("a", Conv2d)]) == [
        "Recipe: the type 'Conv2' matches no layer of the network; did you mean 'Conv2d'?"
    ]
    assert not Recipe(types={"Conv2d": {"weights": "fixed<4>"}}).unmatched([("a", Special)])
