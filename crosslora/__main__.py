"""`python -m crosslora`: the same as the `crosslora` command."""

from crosslora.cli import main

main()
