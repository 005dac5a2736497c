import ast

import pytest

from orthrus.evaluation import suites
from orthrus.evaluation.suites import Prompt, heldout_python_prompts, prompts_from_jsonl
from orthrus.training.corpus import HELD_OUT_MODULES


def test_prompts_are_the_same_in_every_call():
    assert heldout_python_prompts(64) == heldout_python_prompts(64)


def test_prompts_are_spread_evenly_over_the_held_out_modules():
    counts = {module: 0 for module in HELD_OUT_MODULES}
    for prompt in heldout_python_prompts(64):
        counts[prompt.module] += 1
    assert max(counts.values()) - min(counts.values()) <= 1, counts


def test_prompts_are_distinct_and_of_ordinary_length():
    texts = [prompt.text for prompt in heldout_python_prompts(64)]
    assert len(set(texts)) == 64
    assert all(suites.MIN_PROMPT_CHARS <= len(text) <= suites.MAX_PROMPT_CHARS for text in texts)


def test_prompt_is_the_text_that_ends_with_its_line():
    for prompt in heldout_python_prompts(64):
        source = [line.rstrip() for line in suites.module_path(prompt.module).read_text().split("\n")]
        assert "\n".join(source[: prompt.line]).endswith(prompt.text)


def test_prompt_ends_after_a_header_or_its_docstring_without_a_newline():
    for prompt in heldout_python_prompts(64):
        assert prompt.text.endswith((":", '"""', "'", '"')) or "#" in prompt.text.split("\n")[-1], prompt


def test_a_body_is_left_to_write():
    for prompt in heldout_python_prompts(64):
        tree = ast.parse(suites.module_path(prompt.module).read_text())
        definitions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        left = [suites.last_line(n) - prompt.line for n in definitions if n.lineno <= prompt.line < suites.last_line(n)]
        assert max(left) >= suites.MIN_BODY_LINES


def test_asking_for_too_many_prompts_says_how_many_there_are():
    available = sum(len(suites.module_prompts(module)) for module in ("heapq", "sched"))
    with pytest.raises(ValueError, match=f"at most {available}"):
        heldout_python_prompts(available + 1, modules=("heapq", "sched"))


def test_jsonl_prompts_keep_text_and_line(tmp_path):
    path = tmp_path / "suite.jsonl"
    path.write_text('{"question": "one"}\n\n{"question": "two", "answer": 2}\n')
    assert prompts_from_jsonl(path, field="question") == [Prompt("suite", 1, "one"), Prompt("suite", 3, "two")]


@pytest.mark.parametrize("line", ['{"other": "x"}', '["x"]', '{"prompt": 3}'])
def test_jsonl_without_the_field_is_refused_with_its_line(tmp_path, line):
    path = tmp_path / "suite.jsonl"
    path.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match="line 2"):
        prompts_from_jsonl(path)
