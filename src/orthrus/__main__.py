"""`python -m orthrus` is `orthrus`: what torchrun starts."""

from orthrus.cli.app import main

if __name__ == "__main__":
    main()
