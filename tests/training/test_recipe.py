"""Recipes: what they refuse and what they say."""

from pathlib import Path

import pytest

from orthrus.training.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    assert load_recipe(path).name


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nbsae: {}", "unknown key 'bsae'"),
        ("name: x\nview: {num_step: 3}", "recipe.view: unknown key 'num_step'"),
        ("name: x\nview: {num_steps: lots}", "recipe.view.num_steps: expected int, got 'lots'"),
        ("name: x\nview: 3", "recipe.view must be a mapping"),
        ("name: x\nview: {objective: {kind: lk}}", "recipe.view.objective.kind: must be one of kl, ce, tv, got 'lk'"),
        ("name: x\nview: {objective: {focus: 2}}", "objective.focus must be 0 .. 1"),
        ("seed: 1", "the key 'name' is missing"),
        ("name: [", "cannot be read"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text))


def test_overrides_reach_their_section_and_change_the_digest(tmp_path: Path) -> None:
    path = write(tmp_path, "name: x\nview: {num_steps: 3}")
    plain, changed = load_recipe(path), load_recipe(path, ["view.num_steps=4", "base.learning_rate=1e-3"])
    assert changed.view.num_steps == 4 and plain.view.num_steps == 3
    assert plain.digest() != changed.digest()
