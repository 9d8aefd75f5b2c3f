"""`python -m data`."""

from configs.program.explanations.environment import needed

with needed("data"):
    from data.run import main

main()
