"""`orthrus env` and the options of the program itself."""

from typer.testing import CliRunner

from orthrus import __version__
from orthrus.cli.app import app
from tests.cli.commands import last_json, run


def test_env_json_says_what_a_bug_report_needs():
    facts = last_json(run("env", "--json").stdout)
    assert facts["orthrus"] == __version__
    assert {"torch", "transformers", "python", "cpu", "cpu_flags", "torch_threads", "cuda", "devices"} <= set(facts)
    assert facts["cpus"] >= 1 and isinstance(facts["devices"], list)


def test_env_is_one_fact_a_line():
    lines = run("env").stdout.splitlines()
    assert any(line.split() == ["orthrus", __version__] for line in lines)
    assert all(len(line.split()) >= 2 for line in lines)


def test_version():
    assert run("--version").stdout == f"{__version__}\n"


def test_unknown_command_and_option_exit_2():
    for arguments in (["nonsense"], ["generate", "x", "--nonsense"], ["generate", "x", "--max-new-tokens", "many"]):
        assert CliRunner().invoke(app, arguments).exit_code == 2
