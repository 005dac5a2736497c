"""`orthrus serve` and `orthrus export --for vllm`: the line they print, which vLLM's own tests run."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

from orthrus.cli.serve import find_program
from orthrus.integrations.vllm import serve_command, speculative_config
from orthrus.integrations.vllm.block_sizes import BY_ROWS, at_most
from tests.cli.commands import refused, run, run_process


def line_of(output: str) -> list[str]:
    """The words of the printed line."""
    return shlex.split(output.splitlines()[-1])


def test_line_names_the_checkpoint_twice_and_no_block_above_its_trained_one(model: Path):
    words = line_of(
        run("serve", model, "--backend", "vllm", "--dry-run", "--tensor-parallel-size", 2, "--port=9").stdout
    )
    assert words[:4] == ["vllm", "serve", str(model), "--speculative-config"]
    assert json.loads(words[4]) == speculative_config(model, block_size=at_most(BY_ROWS, 8))
    assert json.loads(words[4])["num_speculative_tokens"] == 7
    assert words[-3:] == ["--tensor-parallel-size", "2", "--port=9"]


def test_block_size_is_a_number_or_a_table_by_rows(model: Path):
    for option, block_size in (("4", 4), ("1:8,5:2,9:1", {1: 8, 5: 2, 9: 1})):
        words = line_of(run("serve", model, "--backend", "vllm", "--dry-run", "--block-size", option).stdout)
        assert json.loads(words[4]) == speculative_config(model, block_size=block_size)
    for wrong, sentence in (("wide", "give a number of positions, auto, or a table"), ("1:9,4:2", "at most that")):
        assert sentence in refused("serve", model, "--backend", "vllm", "--dry-run", "--block-size", wrong)


def test_words_behind_two_dashes_are_vllms(model: Path):
    words = line_of(
        run(
            "serve", model, "--backend", "vllm", "--dry-run", "--block-size", 4, "--", "--block-size", 64, "-dph"
        ).stdout
    )
    assert json.loads(words[4])["num_speculative_tokens"] == 3
    assert words[-3:] == ["--block-size", "64", "-dph"]


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (("--pipeline-parallel-size", 2), "pipeline_parallel_size=2"),
        (("--pipeline_parallel_size=4",), "pipeline_parallel_size=4"),
        (("-pp", 2), "pipeline_parallel_size=2"),
        (("-dcp=2",), "decode_context_parallel_size=2"),
        (("--kv-cache-dtype=fp8",), "kv_cache_dtype=fp8"),
        (("--port", 9, "--enable-lora"), "LoRA adapters"),
    ],
)
def test_options_of_vllm_that_cannot_work_are_refused_before_it_runs(model: Path, option: tuple, sentence: str):
    assert f"{sentence} " in refused("serve", model, "--backend", "vllm", "--dry-run", *option)


def test_harmless_values_of_these_options_pass(model: Path):
    options = ("-pp", 1, "--kv-cache-dtype", "auto", "--no-enable-lora", "-dp", 2)
    words = line_of(run("serve", model, "--backend", "vllm", "--dry-run", *options).stdout)
    assert words[-len(options) :] == [*map(str, options)]


def test_several_engines_get_one_block_size_since_vllm_drops_the_table(model: Path):
    for options, size in (
        (("-dp", 2), 8),
        (("--data_parallel_size=2",), 8),
        (("-dp", 1), None),
        (("-dp=1", "-dp", 2), 8),
    ):
        done = run("serve", model, "--backend", "vllm", "--dry-run", *options)
        words = line_of(done.stdout)
        speculation = json.loads(words[words.index("--speculative-config") + 1])
        assert ("num_speculative_tokens_per_batch_size" in speculation) == (size is None)
        assert ("--block-size 8, not auto" in done.stderr) == (size is not None)
        if size is not None:
            assert speculation["num_speculative_tokens"] == size - 1
    table = ("--block-size", "1:8,8:4", "-dp", 2)
    assert "give one size" in refused("serve", model, "--backend", "vllm", "--dry-run", *table)


def test_how_drafts_are_sampled_goes_into_the_speculative_configuration(model: Path):
    for options, method in (((), None), (("--draft-sample-method", "probabilistic"), "probabilistic")):
        words = line_of(run("serve", model, "--backend", "vllm", "--dry-run", *options).stdout)
        assert json.loads(words[words.index("--speculative-config") + 1]).get("draft_sample_method") == method
    assert "choose greedy or probabilistic" in refused(
        "serve", model, "--backend", "vllm", "--dry-run", "--draft-sample-method", "beam"
    )


def test_line_of_a_view_file_serves_its_base(view: Path, base: Path):
    for arguments in ((), ("--base", base)):
        words = line_of(run("serve", view, "--backend", "vllm", "--dry-run", *arguments).stdout)
        assert words[:3] == ["vllm", "serve", str(base)]
        assert json.loads(words[words.index("--hf-overrides") + 1]) == {"architectures": ["OrthrusLM"]}
        assert json.loads(words[words.index("--speculative-config") + 1])["model"] == str(view)


def positions(batched: int, scheduled: int) -> list[str]:
    return ["--max-num-batched-tokens", str(batched), "--max-num-scheduled-tokens", str(scheduled)]


@pytest.mark.parametrize(
    ("arguments", "room"),
    [
        ([], ["--max-num-seqs", "256", *positions(16128, 8192)]),
        (["--port", "9", "--max-num-seqs", "64"], positions(10176, 8192)),
        (["--max_num_seqs=64"], positions(10176, 8192)),
        (["--max-num-seqs", "512"], positions(512 * 63, 512 * 32)),
        (["--max-num-batched-tokens=9000"], ["--max-num-seqs", "256"]),
        (["--max-num-scheduled-tokens", "9000"], ["--max-num-seqs", "256"]),
        (["--max-num-seqs", "8", "--max-num-batched-tokens", "900"], []),
        (["--config", "own.yaml"], []),
    ],
)
def test_line_leaves_room_for_the_drafts_of_all_rows_unless_it_says_itself(arguments: list[str], room: list[str]):
    words = serve_command("MODEL", *arguments, block_size=32)
    assert words[5:] == [*room, *arguments]


def test_what_vllm_would_refuse_is_one_line(model: Path, view: Path, base: Path):
    assert "at most that" in refused("serve", model, "--backend", "vllm", "--dry-run", "--block-size", 9)
    assert "block_size must be at least 2" in refused("serve", model, "--backend", "vllm", "--block-size", 1)
    assert "has no diffusion view" in refused("serve", base, "--backend", "vllm", "--dry-run")
    assert "--backend sglang: choose vllm" in refused("serve", model, "--backend", "sglang")
    for own in (
        "--speculative-config={}",
        "--hf-overrides={}",
        "-sc={}",
        "--speculative_config.method=eagle",
        "--spec-tokens=3",
    ):
        assert "is what this command writes" in refused("serve", model, "--backend", "vllm", "--dry-run", own)


def test_block_sizes_by_default_are_the_views_at_most(tmp_path: Path):
    assert speculative_config("HUB/ID")["num_speculative_tokens"] == 31
    (tmp_path / "config.json").write_text(json.dumps({"block_size": 8}))
    speculation = speculative_config(tmp_path)
    assert speculation["num_speculative_tokens"] == 7
    assert max(drafts for *_, drafts in speculation["num_speculative_tokens_per_batch_size"]) == 7


def test_revisions_go_to_whom_they_belong():
    words = serve_command("VIEW", base="BASE", revision="v1", base_revision="b2")
    assert words[words.index("--revision") + 1] == "b2"
    assert json.loads(words[words.index("--speculative-config") + 1])["revision"] == "v1"
    words = serve_command("MODEL", revision="v1")
    assert words[words.index("--revision") + 1] == "v1"
    assert json.loads(words[words.index("--speculative-config") + 1])["revision"] == "v1"


@pytest.mark.skipif((Path(sys.executable).parent / "vllm").is_file(), reason="this environment's own vllm comes first")
def test_line_is_run_in_place_of_the_command(model: Path, tmp_path: Path):
    program = tmp_path / "vllm"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint('ran', *sys.argv[1:3])\nsys.exit(3)\n")
    program.chmod(0o755)
    done = run_process("serve", model, "--backend", "vllm", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 3, done.stderr
    assert done.stdout.splitlines()[-1] == f"ran serve {model}"


def test_absent_program_is_named():
    with pytest.raises(ValueError, match="no-such-program is not installed here: pip install"):
        find_program("no-such-program")


def test_export_for_vllm_has_no_code_and_prints_its_line(view: Path, base: Path, tmp_path: Path):
    words = line_of(run("export", view, tmp_path / "out", "--for", "vllm").stdout)
    assert words[:3] == ["vllm", "serve", str(tmp_path / "out")]
    assert not list((tmp_path / "out").glob("*.py"))
    assert "is not what --for vllm writes" in refused("export", view, tmp_path / "v", "--for", "vllm", "--form", "view")
