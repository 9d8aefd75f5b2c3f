"""What a run tells while it trains; nothing here can end the run.

    metrics.py    the progress bar and metrics.jsonl
    wandb_run.py  the same metrics for wandb, by a thread of its own

May import train.model.routing, train.history, train.config, data.disk and configs.program.
"""
