"""``python -m minipaas``."""

from minipaas.cli import main

main()
