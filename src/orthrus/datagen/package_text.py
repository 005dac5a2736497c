"""Text to train on that is always there: this package's own modules as JSON Lines, one `text` a module.

python -m orthrus.datagen.package_text text.jsonl
"""

import json
import sys
from pathlib import Path

import orthrus


def main(path: str) -> None:
    """Write the file."""
    modules = sorted(Path(orthrus.__file__).parent.rglob("*.py"))
    texts = [module.read_text(encoding="utf-8") for module in modules]
    with open(path, "w", encoding="utf-8") as file:
        for text in texts:
            if text.strip():
                file.write(json.dumps({"text": text}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
