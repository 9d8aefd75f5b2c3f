"""Which setting an unknown name stands for: by its last part, by what other projects call it, or by its letters."""

import difflib

from configs.program.explanations.program import Program

BATCH = "it is global_batch / (micro_batch × processes): give global_batch, and micro_batch by what fits in memory"
COSINE = "the schedule is a warm-up and a cosine, which optim.warmup_fraction and optim.final_fraction shape"
SEQ_LEN = "rows are packed before training; it is seq_len of `python -m data`"
LAUNCHED = "the launch decides it, as in deepspeed --num_gpus 8; hardware.processes says what dry_run plans for"

CALLED: dict[str, dict[str, str]] = {
    "train": {
        "accumulation": BATCH,
        "adam_beta1": "optim.betas",
        "adam_beta2": "optim.betas",
        "adam_epsilon": "optim.eps",
        "attn_implementation": "model.attention",
        "base_model": "model.path",
        "batch_size": "global_batch",
        "beta1": "optim.betas",
        "beta2": "optim.betas",
        "bf16": "model.dtype",
        "cutoff_len": SEQ_LEN,
        "data_path": "dataset",
        "dataset_name": "dataset",
        "dataset_path": "dataset",
        "datasets": "dataset",
        "eval_steps": "eval_every",
        "eval_strategy": "eval_every",
        "evaluation_strategy": "eval_every",
        "files": "it is files of `python -m data`, and dataset names what that has written",
        "flash_attention": "model.attention",
        "fp16": "model.dtype",
        "gradient_accumulation": BATCH,
        "gradient_accumulation_steps": BATCH,
        "gradient_checkpointing": "activation_checkpointing",
        "gradient_clipping": "optim.clip",
        "learning_rate": "optim.lr",
        "logging_steps": "logging.every",
        "lora_alpha": "lora.alpha",
        "lora_dropout": "lora.dropout",
        "lora_r": "lora.rank",
        "lora_target_modules": "lora.attention (and lora.projections for the experts)",
        "lr_scheduler": COSINE,
        "lr_scheduler_type": COSINE,
        "max_grad_norm": "optim.clip",
        "max_length": SEQ_LEN,
        "max_seq_len": SEQ_LEN,
        "max_seq_length": SEQ_LEN,
        "micro_batch_size": "micro_batch",
        "mixed_precision": "model.dtype",
        "model_id": "model.path",
        "model_max_length": SEQ_LEN,
        "model_name": "model.path",
        "model_name_or_path": "model.path",
        "nproc_per_node": LAUNCHED,
        "num_epochs": "epochs",
        "num_gpus": LAUNCHED,
        "num_processes": LAUNCHED,
        "num_train_epochs": "epochs",
        "output": "run_dir",
        "output_dir": "run_dir",
        "overwrite_output_dir": "overwrite",
        "packing": "rows are packed before training; it is packing of `python -m data`",
        "per_device_train_batch_size": "micro_batch",
        "pretrained_model_name_or_path": "model.path",
        "r": "lora.rank",
        "report_to": "logging.wandb",
        "resume_from_checkpoint": "resume",
        "router_aux_loss_coef": "router_aux_loss",
        "run_name": "name",
        "save_steps": "save_every",
        "save_total_limit": "keep_last",
        "seq_len": SEQ_LEN,
        "seq_length": SEQ_LEN,
        "sequence_len": SEQ_LEN,
        "sequence_length": SEQ_LEN,
        "target_modules": "lora.attention (and lora.projections for the experts)",
        "torch_dtype": "model.dtype",
        "train_batch_size": "global_batch",
        "train_file": "dataset",
        "train_micro_batch_size_per_gpu": "micro_batch",
        "use_rslora": "lora.rank_stabilised",
        "wandb_project": "logging.project",
        "warmup_ratio": "optim.warmup_fraction",
        "warmup_steps": "optim.warmup_fraction",
        "zero_stage": "deepspeed.stage",
    },
    "data": {
        "cutoff_len": "seq_len",
        "data_files": "files",
        "data_path": "files",
        "dataset_name": "dataset",
        "dataset_split": "split",
        "max_length": "seq_len",
        "max_samples": "limits",
        "max_seq_len": "seq_len",
        "max_seq_length": "seq_len",
        "model_max_length": "seq_len",
        "model_name_or_path": "tokenizer",
        "num_proc": "workers",
        "num_workers": "workers",
        "output_dir": "output",
        "run_dir": "output",
        "preprocessing_num_workers": "workers",
        "sequence_len": "seq_len",
        "sequence_length": "seq_len",
        "test_size": "eval_fraction",
        "tokenizer_name": "tokenizer",
        "train_file": "files",
        "val_set_size": "eval_fraction",
        "validation_split": "eval_fraction",
    },
    "inference": {
        "adapter_path": "adapter",
        "base_model": "base",
        "dataset": "input",
        "do_sample": "with temperature above 0 an answer is sampled",
        "input_file": "input",
        "lora_path": "adapter",
        "max_length": "max_new_tokens",
        "message": "prompt",
        "model": "base",
        "model_name": "base",
        "model_name_or_path": "base",
        "model.path": "base",
        "output_dir": "output",
        "output_file": "output",
        "peft_model": "adapter",
        "question": "prompt",
        "run_dir": "the run's adapter is in it: adapter=runs/…/adapter",
        "stop_sequences": "stop",
        "stop_strings": "stop",
        "system_prompt": "system",
        "torch_dtype": "dtype",
    },
}
"""For each program, what others call a setting (TRL, transformers, DeepSpeed, vLLM and their like) → our name, or what
to say instead."""


def unknown(name: str, program: Program) -> str:
    """The sentence for a name that is not a setting of the program."""
    meant = _meant(name, CALLED.get(program.name, {}), program.settings())
    return f"{name}: there is no such setting; {meant}`python -m {program.name} --help` lists them all"


def _meant(name: str, called: dict[str, str], known: list[str]) -> str:
    last = name.rpartition(".")[2]
    for given in (name, name.replace("-", "_"), last):
        if given in called:
            target = called[given]
            return f"did you mean {target}? " if target.partition(" ")[0] in known else f"{target}; "
    alike = [setting for setting in known if setting.rpartition(".")[2] == last]
    if not alike:
        alike = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if not alike and len(last) > 2:  # of two letters, half are alike by chance
        by_last = {setting.rpartition(".")[2]: setting for setting in reversed(known)}
        alike = [by_last[close] for close in difflib.get_close_matches(last, by_last, n=1, cutoff=0.7)]
    return f"did you mean {alike[0]}? " if alike else ""
