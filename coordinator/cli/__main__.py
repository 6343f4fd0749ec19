"""`python -m coordinator.cli` is `fedchord`, where no script of that name can be counted on."""

from coordinator.cli.entry import main

main()
