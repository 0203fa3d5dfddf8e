"""`python -m fastdiff`, and so `torchrun -m fastdiff`: the command."""

from fastdiff.cli import main

main()
