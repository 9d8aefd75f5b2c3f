"""A prepared dataset and a base → an adapter, or a whole model, trained through DeepSpeed.

    program.py      the entry point: mistakes in settings are reported before torch is imported
    run.py          one launch: settings → objects, each named once, in order → `train()`
    loop.py         `train()`, `step()` and `evaluate()`
    plan.py         dry_run: what a run would be, found out without weights
    sweep.py        --multirun: jobs in processes of their own, and a table of them
    expert_load.py  task=profile: which experts the rows use, as JSON and as a heatmap
    history.py      what a run found in its steps and evaluations; part of each checkpoint
    health.py       whether its numbers are good: skipped updates, spikes
    run_files.py    the files of a run directory: their names, and a reader of their lines

    config/         every setting of `python -m train`
    lora/           expert-aware LoRA: what trains
    model/          Mixtral from ids to losses
    engine/         processes, ZeRO, optimizer; the only room that imports deepspeed
    failures/       how a run ends badly, and how every process learns of it
    planning/       task=plan: what fits, how long it takes and what it costs, and which settings are best
    report/         what a run was and what became of it, on one page
    reporting/      what a run reports: progress bar, metrics.jsonl, wandb
    saving/         what a run leaves, and how it is resumed

May import data and configs.program; never inference. No code may stand in this file: the guardian's start imports it.
"""
