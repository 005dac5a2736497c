"""A whole run through the command line: base, rollouts, view, and text from what it wrote."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM
from typer.testing import CliRunner

from orthrus.cli.app import app
from orthrus.model.checkpoint import load_model
from orthrus.model.tensors import fingerprint
from orthrus.training import stages, trainer
from orthrus.training.recipe import load_recipe
from orthrus.training.shards import save_tokenizer, train_tokenizer, write_shards

RECIPE = """
name: toy
shape: {vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4,
  num_key_value_heads: 2, head_dim: 8, max_position_embeddings: 256, block_size: 4}
base: {row_tokens: 32, rows_per_step: 4, rows_per_pass: 2, num_steps: 8, warmup_steps: 1}
unlikelihood: {num_rounds: 2, steps_per_round: 2, rows_per_step: 8, own_rows_per_pass: 2, corpus_rows_per_pass: 2,
  rollouts: {prompt_tokens: [8], row_tokens: 80, rows_per_batch: 8, num_batches: 1, sampled_share: 0.5}}
sharpen: {num_rounds: 1, steps_per_round: 2, rows_per_step: 4, own_rows_per_pass: 3, corpus_rows_per_pass: 1,
  rollouts: {prompt_tokens: [8], row_tokens: 80, rows_per_batch: 6, num_batches: 1, temperature: 0.3}}
counting: {num_rounds: 3, steps_per_round: 1, rows_per_step: 4, own_rows_per_pass: 3, corpus_rows_per_pass: 1,
  digits_alike: true,
  rollouts: {prompt_tokens: [8], row_tokens: 80, rows_per_batch: 4, num_batches: 1, temperature: 0.3}}
rollouts: {prompt_tokens: [4, 8], row_tokens: 80, rows_per_batch: 8, num_batches: 2, min_tokens: 0, sampled_share: 1.0}
view: {rows_per_step: 4, rows_per_pass: 2, blocks: [[4, 2], [2, 2]], num_steps: 6, warmup_steps: 1}
"""

LEARNING = ("unlikelihood", "sharpen", "counting")


def invoke(run: Path, *arguments: str) -> list[str]:
    """`orthrus train` on a run's folder; the lines it printed."""
    where = [("--config", "recipe.yaml"), ("--corpus", "corpus"), ("--out", "out")]
    paths = [part for option, name in where for part in (option, str(run / name))]
    result = CliRunner().invoke(app, ["train", *paths, "--device", "cpu", *arguments])
    assert result.exit_code == 0, result.output
    return result.output.splitlines()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, a small corpus of this package's own source, and a finished run."""
    folder = tmp_path_factory.mktemp("run")
    texts = [path.read_text() for path in sorted(Path(stages.__file__).parent.glob("*.py"))]
    save_tokenizer(train_tokenizer(texts, vocab_size=500), folder / "corpus" / "tokenizer")
    for name, some in (
        ("train", texts),
        ("val", texts[:4]),
        ("heldout", texts[:4]),
    ):  # losses take time where bf16 is slow
        write_shards(
            some, folder=folder / "corpus", name=name, num_shards=2, tokenizer_folder=folder / "corpus" / "tokenizer"
        )
    (folder / "recipe.yaml").write_text(RECIPE)
    invoke(folder)
    return folder


def test_a_run_writes_a_view_that_generates_over_its_base(run: Path) -> None:
    arguments = ["generate", "import os", "--model", str(run / "out" / "view"), "--max-new-tokens", "12", "--json"]
    result = CliRunner().invoke(app, [*arguments, "--dtype", "float32"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.output.splitlines()[-1])
    assert report["num_tokens"] <= 12 and report["stats"]["num_spec_steps"] > 0


def test_end_and_mask_tokens_are_the_tokenizers(run: Path) -> None:
    config = load_model(run / "out" / "view").config
    assert (config.eos_token_id, config.mask_token_id) == (499, 500), "the ids must follow the corpus's tokenizer"


def test_training_the_view_leaves_the_base_and_moves_the_view(run: Path) -> None:
    trained = load_model(run / "out" / "view").view_parameters()
    started = load_model(run / "out" / "base", start_view=True, block_size=4, mask_token_id=500).view_parameters()
    assert any(not torch.equal(trained[name], started[name]) for name in started)
    # A view file names its base by the hash of its bytes, so loading it proves that they did not change.
    assert (run / "out" / "view" / "provenance.json").is_file()


def test_a_run_that_is_cut_off_leaves_its_last_save(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load_model(run / "out" / "view").view_parameters()
    rows_of = stages.training_rows

    def cut_off(*arguments: object, **settings: object):  # noqa: ANN202
        rows = rows_of(*arguments, **settings)  # type: ignore[arg-type]
        for _ in range(6):
            yield next(rows)
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "training_rows", cut_off)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    result = CliRunner().invoke(
        app,
        ["train", "--config", str(run / "recipe.yaml"), "--corpus", str(run / "corpus"), "--out", str(run / "out"),
         "--device", "cpu", "--stages", "view"],
    )  # fmt: skip
    assert result.exit_code != 0
    saved = load_model(run / "out" / "view").view_parameters()
    assert any(not torch.equal(saved[name], kept[name]) for name in kept), "three steps were taken, none was saved"


def test_the_base_is_a_stock_checkpoint(run: Path) -> None:
    stock, info = AutoModelForCausalLM.from_pretrained(run / "out" / "base", output_loading_info=True)
    assert type(stock) is Qwen3ForCausalLM and not any(info.values()), info
    assert len(AutoTokenizer.from_pretrained(run / "out" / "base")) == 500
    assert fingerprint(stock) == fingerprint(run / "out" / "base")


def test_rollouts_of_another_base_are_refused(run: Path) -> None:
    device = torch.device("cpu")
    recipe, corpus, out = load_recipe(run / "recipe.yaml", ["seed=1"]), run / "corpus", run / "other"
    shutil.copytree(run / "out" / "rollouts", out / "rollouts")
    with pytest.raises(ValueError, match="holds no train_"):
        stages.run_base(recipe, run / "nowhere", out, device)
    stages.run_base(recipe, corpus, out, device)
    with pytest.raises(ValueError, match="written by another base"):
        stages.run_view(recipe, corpus, out, device)


def test_rollouts_written_again_replace_all_that_were_there(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "out", tmp_path / "out")
    stale = tmp_path / "out" / "rollouts" / "07.safetensors"  # as a run of more ranks leaves it
    shutil.copy(tmp_path / "out" / "rollouts" / "00.safetensors", stale)
    stages.run_rollouts(load_recipe(run / "recipe.yaml"), run / "corpus", tmp_path / "out", torch.device("cpu"))
    assert not stale.exists(), "the view would be trained on rows of an earlier run"


@pytest.mark.parametrize("name", LEARNING)
def test_the_base_learns_from_itself_once(run: Path, name: str) -> None:
    recipe = load_recipe(run / "recipe.yaml")
    with pytest.raises(ValueError, match=f"has been through the {name} stage"):
        stages.STAGES[name](recipe, run / "corpus", run / "out", torch.device("cpu"))
    facts = json.loads((run / "out" / "base" / "provenance.json").read_text())
    assert facts["num_steps"] == 8
    assert [len(facts[name]["looping_share_of_greedy_rows"]) for name in LEARNING] == [2, 1, 3]


def test_kept_tokens_follow_the_corpus(run: Path, tmp_path: Path) -> None:
    before = stages.load_tokens(run / "corpus", "train", tmp_path)
    shutil.copytree(run / "corpus", tmp_path / "corpus")
    write_shards(
        ["x = 1\n"], folder=tmp_path / "corpus", name="train", num_shards=2,
        tokenizer_folder=tmp_path / "corpus" / "tokenizer",
    )  # fmt: skip
    after = stages.load_tokens(tmp_path / "corpus", "train", tmp_path)
    assert len(after) != len(before), "the corpus was made anew, its old tokens were taken"
