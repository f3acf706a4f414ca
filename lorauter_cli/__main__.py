"""`python -m lorauter_cli` is the command `lorauter`."""

from lorauter_cli.main import main

main()
