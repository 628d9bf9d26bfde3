"""``python -m replicator`` is the command ``replicator``. Owns nothing else."""

from replicator.cli import main

main()
