"""Recipes: what they refuse and what they say."""

import dataclasses
from pathlib import Path

import pytest

from orthrus.config import OrthrusConfig
from orthrus.training.budget import budget
from orthrus.training.recipe import Recipe, load_recipe
from orthrus.training.view_recipe import ViewRecipe, flat, load_any_recipe, passes_per_step, settings_of_run

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_loads(path: Path) -> None:
    recipe = load_any_recipe(path)
    assert isinstance(recipe, Recipe if path.stem.startswith("tiny") else ViewRecipe)


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
        ("name: x\nview: {learning_rate: .nan}", "recipe.view.learning_rate: expected float, got nan"),
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


VIEW = """
kind: view
name: x
model: {base: somewhere}
data: {source: text.jsonl}
train: {num_steps: 4}
"""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.attn=sdpa", "recipe.model: unknown key 'attn'"),
        ("kind=base", "recipe.kind: must be one of view"),
        ("model.dtype=float16", "recipe.model.dtype: must be one of bfloat16, float32"),
        ("model.base=null", "recipe.model.base: expected str"),
        ("model.base=", "model.base"),
        ("model.block_size=1", "model.block_size must be at least 2"),
        ("model.block_size=16", "view.blocks: width 32 is above model.block_size 16"),
        ("data.row_tokens=32", "data.row_tokens 32 must be above model.block_size 32"),
        ("view.blocks=[]", "view.blocks is empty"),
        ("view.blocks=[[1, 4]]", r"view.blocks: \[1, 4\] is no"),
        ("view.blocks=[[8]]", r"view.blocks: \[8\] is no"),
        ("view.blocks=[[8, 2], [4, 1], [8, 1]]", "view.blocks names width 8 twice"),
        ("view.objective.kind=mse", "recipe.view.objective.kind: must be one of"),
        ("train.num_epochs=1", "either num_steps or num_epochs"),
        ("train.num_steps=null", "either num_steps or num_epochs"),
        ("train.num_steps=1.5", "recipe.train.num_steps: expected int"),
        ("train.rows_per_pass=3", "train.rows_per_step 128 must be a multiple of train.rows_per_pass 3"),
        ("train.learning_rate=.nan", "recipe.train.learning_rate: expected float, got nan"),
        ("train.max_grad_norm=.inf", "recipe.train.max_grad_norm: expected float, got inf"),
        ("train.learning_rate=0", "train.learning_rate must be above 0"),
        ("train.warmup_share=5", "train.warmup_share is a share"),
        ("train.betas=[0.9]", "train.betas must be two numbers"),
        ("train.betas=[0.9, 1.0]", "train.betas must be two numbers"),
        ("train.schedule=step", "recipe.train.schedule: must be one of cosine"),
        ("train.sharding=fsdp", "recipe.train.sharding: must be one of ddp, fsdp2"),
        ("train.report_to=[mlflow]", r"recipe.train.report_to\[0\]: must be one of trackio"),
        ("train.report_to=wandb", "recipe.train.report_to: expected a list, got 'wandb'"),
        ("1=x", "recipe: unknown key '1'"),
        ("train.push_to_hub=true", "train.push_to_hub and train.hub_model_id go together"),
        ("train.keep_checkpoints=0", "train.keep_checkpoints must be at least 1"),
        ("evaluation.held_out_documents=0", "evaluation.every needs prompts"),
        ("evaluation.warn_below=0.5", "evaluation.warn_below must be at least 1"),
        ("name.x=1", "name is no section of the recipe"),
        ("seed", "must be section.key=value"),
        ("seed=[", "the value cannot be read as YAML"),
    ],
)
def test_impossible_view_recipes_are_refused_by_name(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_any_recipe(write(tmp_path, VIEW), [override])


def test_a_key_that_is_no_text_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="recipe: unknown key 1;"):
        load_any_recipe(write(tmp_path, VIEW + "1: x\nfoo: y\n"))


def test_a_view_recipe_without_its_kind_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the line `kind: view` is missing"):
        load_any_recipe(write(tmp_path, VIEW.replace("kind: view\n", "")))


@pytest.mark.parametrize("section", ["model", "data", "train"])
def test_a_section_that_has_no_defaults_is_missed_by_name(tmp_path: Path, section: str) -> None:
    text = "".join(line + "\n" for line in VIEW.splitlines() if not line.startswith(section))
    with pytest.raises(ValueError, match=f"the key '{section}' is missing"):
        load_any_recipe(write(tmp_path, text))


def test_ranks_must_share_a_step_and_one_rank_has_nothing_to_shard(tmp_path: Path) -> None:
    recipe = load_any_recipe(write(tmp_path, VIEW), ["train.rows_per_pass=2"])
    assert isinstance(recipe, ViewRecipe)
    assert passes_per_step(recipe.train, 8) == 8
    with pytest.raises(ValueError, match="must be a multiple of train.rows_per_pass 2 x 3 ranks"):
        passes_per_step(recipe.train, 3)
    with pytest.raises(ValueError, match="train.sharding fsdp2"):
        passes_per_step(dataclasses.replace(recipe.train, sharding="fsdp2"), 1)


def test_settings_of_a_run_leave_out_only_what_reaches_no_weight(tmp_path: Path) -> None:
    recipe = load_any_recipe(write(tmp_path, VIEW))
    assert isinstance(recipe, ViewRecipe)
    left_out = flat(dataclasses.asdict(recipe)).keys() - settings_of_run(recipe).keys()
    assert {"train.learning_rate", "seed", "view.blocks", "evaluation.held_out_documents"}.isdisjoint(left_out)
    assert {"train.save_steps", "train.report_to", "evaluation.every"} <= left_out
    assert {"data.revision", "model.revision", "data.bad_rows"} <= left_out, "fingerprints say what was read"


SHAPES = {  # layers, hidden, heads, key/value heads, MLP, tied; TFLOP a row of 2,048 tokens with 256 blocks of 32
    "1.7b": ((28, 2048, 16, 8, 6144, True), 352_328_704, 69),
    "4b": ((36, 2560, 32, 8, 9728, True), 943_727_616, 164),
    "8b": ((36, 4096, 32, 8, 12288, False), 1_509_958_656, 304),
}


@pytest.mark.parametrize("size", SHAPES)
def test_the_budget_of_the_published_recipes(size: str) -> None:
    (layers, hidden, heads, groups, inner, tied), view, tflop = SHAPES[size]
    config = OrthrusConfig(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=128, tie_word_embeddings=tied,
        block_size=32, mask_token_id=151_669,
    )  # fmt: skip
    path = next(path for path in RECIPES if path.stem == f"qwen3-{size}_8xh200")
    recipe = load_any_recipe(path)
    assert isinstance(recipe, ViewRecipe)
    found = budget(recipe, config, num_ranks=8)
    assert found.num_trained == view
    assert round(found.row_flops / 1e12) == tflop
    stated = f"about {found.total_bytes / 2**30:.0f} GiB on each GPU"
    assert stated in path.read_text(), stated


@pytest.mark.parametrize(
    ("sharding", "num_ranks", "each"),
    [
        ("ddp", 1, "4 + 4 + 8 = 16 bytes: fp32 weight, gradient, two averages"),
        ("ddp", 8, "16 + 4 = 20 bytes: a copy of the gradient in buckets"),
        ("fsdp2", 8, "16 / 8 = 2 bytes: and one layer's gradient whole, 2 bytes and 4"),
    ],
)
def test_the_budget_of_the_optimiser_by_hand(sharding: str, num_ranks: int, each: str) -> None:
    (layers, hidden, heads, groups, inner, tied), view, _ = SHAPES["1.7b"]
    config = OrthrusConfig(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=groups, head_dim=128, tie_word_embeddings=tied,
        block_size=32, mask_token_id=151_669,
    )  # fmt: skip
    path = next(path for path in RECIPES if path.stem == "qwen3-1.7b_8xh200")
    recipe = load_any_recipe(path, [f"train.sharding={sharding}"])
    assert isinstance(recipe, ViewRecipe)
    layer = 2048 * 128 * (16 + 8 + 8 + 16) + 2 * 128  # q, k, v, o and two norms
    assert view == 28 * layer
    per_parameter = int(each.split(" bytes")[0].split(" = ")[1])
    between = layer * (2 + 4) if sharding == "fsdp2" else 0
    assert budget(recipe, config, num_ranks=num_ranks).training_bytes == view * per_parameter + between, each
