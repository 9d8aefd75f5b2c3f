"""What a run reports while it trains. Nothing here can end the run or hold it up.

    metrics.py     the progress bar, and what metrics.jsonl says
    lines.py       the thread that writes its lines
    peak.py        what GPUs can do at most
    trace.py       what torch's profiler sees in a few steps
    wandb_run.py   the same metrics for wandb, in a thread of their own

May import train.history, train.model.routing, train.report, train.config, data.disk and configs.program.
"""
