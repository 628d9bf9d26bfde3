"""``python -m minipaas.cli``."""

from minipaas.cli import main

main()
