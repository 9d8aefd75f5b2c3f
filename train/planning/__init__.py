"""What a run would take before it is started: memory, seconds and money, part by part, and which settings are best.

    given/           what a plan is made from: the model's sizes, the rows, the machine
    gathers.py       what ZeRO-3 makes whole, when, and how much of it at once
    memory.py        the memory of a process
    speed.py         the seconds of a step
    plan.py          both of one configuration on one machine: does it fit, how long, how much
    alternatives.py  other settings for the same training, and their rank
    page.py          a plan on one page
    task.py          task=plan
    check.py         the check before a real run that it will find its memory

The page says which figures are arithmetic, which are assumed and which were measured. May import train.config,
train.lora, train.model, data.disk and configs.program.
"""
