"""`python -m kvcluster`: the command line, where its script is not installed."""

from kvcluster.cli.main import main

main()
