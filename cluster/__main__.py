"""``python -m cluster`` is ``llm-cluster``."""

from cluster.cli.main import main

main()
