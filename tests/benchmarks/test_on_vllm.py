"""What the vLLM benchmark computes of what it measured; nothing of vLLM is needed."""

from typing import Any

import pytest
from benchmarks.on_vllm import block_size_at, show_table, tokens_per_cycle


def test_a_way_says_how_many_positions_a_row_has():
    assert [block_size_at("ar", batch) for batch in (1, 64)] == [1, 1]
    assert [block_size_at("8", batch) for batch in (1, 64)] == [8, 8]
    assert block_size_at("load", 1) == 32 > block_size_at("load", 64) > block_size_at("load", 1000) == 1


@pytest.mark.parametrize("forced", [12.7, 3.7])
def test_a_smaller_block_writes_less(forced: float):
    written = [tokens_per_cycle(forced, size) for size in (1, 2, 8, 32)]
    assert written[0] == 1 and written == sorted(written)
    assert written[-1] == pytest.approx(forced)


def record(name: str, value: float, **params: Any) -> dict[str, Any]:
    own = {"model": "8b", "batch": 4, "backend": "vllm", "runner": "V2"}
    return {"name": name, "value": value, "params": own | params}


def test_table_has_rates_at_the_wanted_n_against_plain_decoding(capsys: pytest.CaptureFixture[str]):
    drafted = {"forced_tokens_per_cycle": 8.5}
    show_table([
        record("ar_step_ms", 5.0, way="ar", forced_tokens_per_cycle=None),
        record("cycle_ms", 10.0, way="32", block_size=32, **drafted),
        record("cycle_ms", 8.0, way="load", block_size=4, **drafted),
        record("tokens_per_second", 9999.0, way="32", block_size=32, **drafted),  # of the draws that came: not compared
        record("tokens_per_second", 3000.0, backend="engine", block_size="auto", drafting=True, **drafted),
    ])  # fmt: skip
    head, _, plain, row = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    )
    assert head == ["model", "batch", "N", "engine V2 auto", "vllm V2 32", "vllm V2 ar", "vllm V2 load"]
    assert plain == ["8b", "4", "plain", "", "", "800", ""]
    rate = 4 * tokens_per_cycle(8.5, 4) / 8.0 * 1e3
    assert 1500 < rate < 1800
    assert row == ["8b", "4", "8.5", "3,000", "3,400 (4.25)", "", f"{rate:,.0f} ({rate / 800:.2f})"]
