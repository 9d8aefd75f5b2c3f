"""What the benchmarks measure with.

    peak.py       the machine's own matrix product
    trainers.py   a process that trains, ours or TRL's, and takes its steps one at a time
    turns.py      starts such a process and asks it for a step
    gpu_parts.py  the parts of `benchmark.py gpu` that run in processes of their own
    tracing.py    what operations move and compute, counted on the meta device

May import everything but the benchmarks themselves.
"""
