"""python -m rayward.cli: the `rayward` command."""

from rayward.cli import main

main()
