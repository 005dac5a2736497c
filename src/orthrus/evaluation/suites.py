"""Prompts to measure on: beginnings of functions of held-out standard library modules, or lines of a JSON Lines file.

The bundled model has seen none of the held-out modules (`training.corpus.HELD_OUT_MODULES`), so what it writes after
these prompts is not recited. The choice is deterministic, but the texts are the running interpreter's own: compare
numbers only between runs on one Python version, or save the prompts.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orthrus.training.corpus import HELD_OUT_MODULES

MIN_PROMPT_CHARS = 250
"""Shorter prompts say too little of what follows."""

MAX_PROMPT_CHARS = 900
"""Context before the cut; the model's training sequences hold several times as much."""

MAX_OPENING_CHARS = 600
"""Longest signature plus docstring, so that some context before it fits."""

MIN_BODY_LINES = 4
"""Lines that the source has after the cut: otherwise there is nothing to write."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Text to continue and where it is from."""

    module: str
    """Dotted module name, or the stem of the JSON Lines file."""
    line: int
    """Line of the source that the prompt ends with, or the line of the file, from 1."""
    text: str
    """Ends without a newline: the tokenizer takes a line break and the next line's indentation as one piece."""


def heldout_python_prompts(n: int = 64, *, modules: Sequence[str] = HELD_OUT_MODULES) -> list[Prompt]:
    """n prompts spread evenly over the modules: the first of each module, then the second, and so on."""
    rounds = itertools.zip_longest(*(module_prompts(module) for module in modules))
    prompts = [prompt for prompts in rounds for prompt in prompts if prompt is not None]
    if len(prompts) < n:
        raise ValueError(f"n must be at most {len(prompts)}, the number of prompts in {len(modules)} modules, got {n}")
    return prompts[:n]


def prompts_from_jsonl(path: Path | str, *, field: str = "prompt") -> list[Prompt]:
    """One prompt for each non-empty line of the file: the string under `field`."""
    prompts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        record = json.loads(line)
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise ValueError(f"{path}, line {number}: needs an object with a string under {field!r}")
        prompts.append(Prompt(Path(path).stem, number, record[field]))
    return prompts


def read_prompts(path: Path | None, *, field: str, num_prompts: int | None, num_heldout: int) -> list[Prompt]:
    """The first prompts of a JSON Lines file, all of them for None; without a file so many held-out ones, `num_heldout`
    for None."""
    if num_prompts is not None and num_prompts < 1:
        raise ValueError(f"num_prompts must be at least 1, got {num_prompts}")
    if path is None:
        return heldout_python_prompts(num_heldout if num_prompts is None else num_prompts)
    found = prompts_from_jsonl(path, field=field)
    if len(found) < (num_prompts or 1):
        raise ValueError(f"{path} has {len(found)} prompts, {num_prompts or 1} are wanted")
    return found[:num_prompts]


def module_path(module: str) -> Path:
    """Source file of a standard library module, found without importing it."""
    stem = Path(sysconfig.get_paths()["stdlib"], *module.split("."))
    return stem / "__init__.py" if stem.is_dir() else stem.with_suffix(".py")


def module_prompts(module: str) -> list[Prompt]:
    """All prompts of one module, in the order of a hash, so that any first few are spread over the file."""
    text = module_path(module).read_text(encoding="utf-8").expandtabs(4)
    lines = [line.rstrip() for line in text.split("\n")]
    prompts = [Prompt(module, end, context_before(lines, end=end)) for end in opening_ends(ast.parse(text), lines)]
    long_enough = [prompt for prompt in prompts if len(prompt.text) >= MIN_PROMPT_CHARS]
    return sorted(long_enough, key=lambda prompt: hashlib.sha256(prompt.text.encode()).digest())


def opening_ends(tree: ast.Module, lines: Sequence[str]) -> Iterator[int]:
    """Numbers (from 1) of the lines that end a header with its docstring, with a body left to write."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        end = opening_end(node, lines)
        has_body = last_line(node) - end >= MIN_BODY_LINES
        if has_body and end >= node.lineno and len("\n".join(lines[node.lineno - 1 : end])) <= MAX_OPENING_CHARS:
            yield end


def opening_end(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, lines: Sequence[str]) -> int:
    """Number (from 1) of the last line of the docstring, or of the header if there is none."""
    first = node.body[0]
    if ast.get_docstring(node, clean=False) is not None:
        return last_line(first)
    end = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", []))]) - 1
    while end > node.lineno and (not lines[end - 1] or lines[end - 1].lstrip().startswith("#")):
        end -= 1
    return end


def last_line(node: ast.stmt) -> int:
    """Number (from 1) of the line that a parsed statement ends on."""
    assert node.end_lineno is not None, "ast.parse always sets it"
    return node.end_lineno


def context_before(lines: Sequence[str], *, end: int) -> str:
    """Lines up to number `end`, from the earliest line within MAX_PROMPT_CHARS that follows a blank one."""
    start, num_chars = end, -1
    while start > 0 and num_chars + len(lines[start - 1]) + 1 <= MAX_PROMPT_CHARS:
        start -= 1
        num_chars += len(lines[start]) + 1
    paragraphs = [i for i in range(start, end) if lines[i] and (i == 0 or not lines[i - 1])]
    return "\n".join(lines[paragraphs[0] if paragraphs else start : end]).lstrip("\n")
