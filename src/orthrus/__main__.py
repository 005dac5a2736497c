"""`python -m orthrus` is `orthrus`: what torchrun starts."""

from orthrus.cli.app import main

main()
