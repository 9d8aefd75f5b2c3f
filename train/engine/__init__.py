"""The processes of a run, and one optimizer over all of them. The only room that imports deepspeed.

    processes.py  joins the processes; seeds, collectives, and what all must have been given alike
    cpu.py        what CPU processes need: DeepSpeed's compiled operator, shared memory, malloc
    zero.py       DeepSpeed's configuration, and whole parameters
    shards.py     allocates what each process holds of a base that is read from its files
    optimizer.py  AdamW over what trains
    state.py      float32 masters and Adam's moments of what trains, whole and by name, whatever the ZeRO stage
    engine.py     forward, backward, step, and sums over the processes

May import train.model, train.lora, train.failures.guard, train.config, data.prepared.dataset, data.disk and
configs.program.
"""
