"""The benchmarks of `scripts/benchmark.py`, a module each: `arguments(parser)`, and `run(options)`, which prints its
tables and returns its figures, fit for JSON.

    data.py, data_memory.py    preparing a dataset: rows per second, and memory
    step.py, experts.py        a training step, and one MoE block of it
    compiled.py                a step with torch.compile
    save.py                    how long a checkpoint holds up training
    load.py                    loading a base under ZeRO-3: memory, bytes read, seconds of each process
    network.py                 what a step moves between two hosts: four bits, and a node's copy
    generate.py, merge.py      answering and merging
    evaluate.py                scoring the card's tasks
    plan.py, plan_recipes.py   task=plan against the run that it planned; the recipes' pages and their picture
    traffic.py, gpu.py         what a layer moves through a GPU's memory; one GPU, found out in minutes

    harness/                   what they measure with: processes that take turns, the machine's peak, a tracer

May import everything, and the peers that it measures against.
"""
