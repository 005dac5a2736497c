"""The package's shape: imports go one way, names say something, and `--help` costs nothing."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "orthrus"
FILES = sorted(path for path in SOURCE.rglob("*.py") if "assets" not in path.parts)

# cli -> {serving, training, evaluation, datagen} -> engine -> decoding -> model -> config
RANK = {
    "cli": 5, "__main__": 5,
    "serving": 4, "training": 4, "evaluation": 4, "datagen": 4,
    "engine": 3, "decoding": 2, "model": 1, "config": 0, "environment": 0,
}  # fmt: skip
FREE = "integrations"
FORBIDDEN = {"utils", "util", "common", "helpers", "helper", "base", "misc"}
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "datasets",
    "pyarrow",
    "httpx2",
}


def part(module: str) -> str:
    """The layer of a dotted module name: `orthrus.model.masks` is of `model`."""
    return module.split(".")[1]


def imports(path: Path) -> list[tuple[str, list[str], int]]:
    """Every import statement of a file, wherever it stands: module, names, level."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, [], 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", [alias.name for alias in node.names], node.level))
    return found


def layer_imports(path: Path) -> list[str]:
    """The layers of this package that a file imports; `from orthrus import model` counts as `model`."""
    layers = []
    for module, names, _ in imports(path):
        if module == "orthrus":
            layers += [name for name in names if name != "__version__"]
        elif module.startswith("orthrus."):
            layers.append(part(module))
    return layers


def own_layer(path: Path) -> str:
    """The layer that a file of the package belongs to."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_one_way(path: Path):
    own = own_layer(path)
    if own in ("__init__", FREE):
        return
    assert own in RANK, f"{path.name}: {own} is no layer of the design"
    for layer in layer_imports(path):
        assert layer in RANK, f"{path.name} imports orthrus.{layer}: only orthrus.{FREE} itself may"
        assert RANK[layer] <= RANK[own], f"{path.name}: {own} must not import {layer}, which lies above it"


def test_no_two_layers_import_each_other():
    graph: dict[str, set[str]] = {}
    for path in FILES:
        own = own_layer(path)
        if own in RANK:
            graph.setdefault(own, set()).update(layer for layer in layer_imports(path) if layer != own)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_are_absolute(path: Path):
    relative = [module for module, _, level in imports(path) if level]
    assert not relative, "the exporter rewrites `from orthrus.x import y` and nothing else"


def test_file_is_a_noun_of_the_domain():
    named = [path for path in FILES if FORBIDDEN & set(path.relative_to(SOURCE).with_suffix("").parts)]
    assert not named, f"names that say nothing: {named}"


@pytest.mark.parametrize("command", ["", "generate", "chat", "train", "datagen", "bench decode"])
def test_help_imports_nothing_heavy(command: str):
    arguments = [*command.split(), "--help"]
    program = (
        "import sys; from orthrus.cli.app import main\n"
        f"sys.argv = ['orthrus', *{arguments}]\n"
        "try: main()\n"
        "except SystemExit as done: assert not done.code\n"
        "print(*{name.split('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "Usage" in done.stdout
    assert not HEAVY & set(done.stderr.split()), "--help must answer in 0.3 s; importing torch alone takes seconds"


def test_import_orthrus_imports_nothing_heavy_and_lists_its_names():
    program = (
        "import sys, orthrus; assert 'Decoder' in dir(orthrus)\nprint(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_public_names_are_importable():
    import orthrus

    for name in orthrus.__all__:
        assert getattr(orthrus, name) is not None
    with pytest.raises(AttributeError, match="Nonsense"):
        orthrus.Nonsense  # noqa: B018
