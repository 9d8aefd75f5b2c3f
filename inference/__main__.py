"""`python -m inference`."""

from configs.program.explanations.environment import needed

with needed("inference"):
    from inference.run import main

main()
