"""One launch: configuration → objects, each named once, in order → train()."""

import sys
from functools import partial
from pathlib import Path

from transformers import MixtralForCausalLM

from configs.program.console import console
from configs.program.errors import UserError
from configs.program.explanations.again import command
from configs.program.launch import local_processes
from data.disk import nf4
from data.disk.architecture import read_architecture
from data.disk.weights import local_directory, pinned
from data.prepared.dataset import PreparedDataset
from data.template import ChatTokenizer
from data.vocabulary import has_tokenizer
from train.config.model import ModelConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.cpu import shared_memory
from train.engine.engine import Engine, ForwardEngine
from train.engine.processes import (
    Processes,
    check_device,
    check_launch,
    check_same,
    join_processes,
    leave_processes,
    node_sizes,
)
from train.engine.shards import allocator_for
from train.expert_load import profile
from train.failures.errors import reporting_errors
from train.failures.guard import Guard
from train.failures.meeting import Meeting
from train.failures.signals import EXIT_PREEMPTED, Signals
from train.health import Health
from train.history import History
from train.loop import Preempted, train
from train.lora.attach import ranks_of_experts
from train.model.loss import MixtralWithLoss
from train.model.mixtral import build, check_embeddings
from train.plan import show_plan
from train.planning.check import Expected, check_room
from train.planning.given.rows import of_dataset
from train.planning.task import plan
from train.report.recorded import note_launch
from train.report.report import report
from train.reporting.metrics import Metrics
from train.reporting.peak import peak_flops
from train.saving.identity import Inputs
from train.saving.receipt import record_launch
from train.saving.resume import check_run_there, check_same_run, find_checkpoint, restore
from train.saving.run_directory import RunDirectory
from train.saving.saver import Saver
from train.saving.starting_point import check_is_there, other_form, start_from


def run(config: TrainConfig) -> None:
    """Trains, plans, measures the routers (`task=profile`), reports on a run, or with `dry_run` says what it would be.

    The settings have been checked.
    """
    if config.dry_run:
        show_plan(config)
        return
    if config.task == "plan":
        plan(config)
        return
    if config.task == "report":
        report(config)
        return
    signals = Signals(config.failures.grace)
    rank, count = check_launch()
    bounds = ("peer_timeout", "start_timeout", "stall_timeout", "disk_timeout")
    forgets = str(shared_memory()) if count > 1 else None  # left behind by a process that is killed early
    guard = Guard(rank, count, forgets=forgets, **{name: getattr(config.failures, name) for name in bounds})
    if count > 1:
        signals.tell(guard.leaving)
        meeting = Meeting(rank, seconds=config.failures.start_timeout)  # kept: torch joins by process 0's
        meeting.join(guard)
    else:
        guard.join(None)
    with reporting_errors(guard, config, rank):
        dataset, inputs, expected = prepare(config, guard, rank, count)
        guard.start("joining the others")
        processes = join_processes(config.hardware)
        preempted = run_on(config, dataset, inputs, processes, guard, signals, expected)
        guard.done()
        leave_processes()
    if preempted:
        sys.exit(EXIT_PREEMPTED)


def prepare(config: TrainConfig, guard: Guard, rank: int, count: int) -> tuple[PreparedDataset, Inputs, Expected]:
    """What each process does by itself: it looks for mistakes, downloads, and reads what has to be hashed.

    Raises:
        UserError: something in settings, dataset, base or run directory is wrong.
    """
    guard.start("looking for mistakes")
    check_device(config.hardware)
    config.batch(count)
    with guard.disk(Path(config.dataset)):
        dataset = PreparedDataset(config.dataset)
    inputs = Inputs(config, dataset)
    if config.run_dir is not None and (rank == 0 or count == local_processes()):
        with guard.disk(Path(config.run_dir)):  # on several machines it is process 0's that counts
            check_run_there(config, inputs, dataset.directory)
    check_is_there(config.lora)
    if config.model.weights == nf4.FORM:
        nf4.check_available("model.weights=nf4")
    guard.start("fetching the base")
    fetch_base(config)
    check_vocabulary(config.model, dataset)
    expected = check_room(config, of_dataset(dataset), count)
    guard.start("hashing base and rows")
    with guard.disk(base_or_rows(config)):
        inputs.read()
    with guard.disk(dataset.directory):
        inputs.read_rows()
    return dataset, inputs, expected


def run_on(
    config: TrainConfig,
    dataset: PreparedDataset,
    inputs: Inputs,
    processes: Processes,
    guard: Guard,
    signals: Signals,
    expected: Expected,
) -> bool:
    """Does the task on the processes of the launch; returns whether it was pre-empted."""
    check_same(inputs.same_everywhere() | node_sizes(config))
    batch = config.batch(processes.count)
    if processes.is_main and len(dataset.train) < batch.rows:
        tell_few_rows(dataset, batch)
    directory = RunDirectory(config, dataset.directory, processes, guard.disk)
    rows = len(dataset.train)
    record = record_launch(directory, config, batch, inputs, processes, training_rows=rows, expected=expected)
    check_same_run(directory, record, inputs)
    if directory.finished:
        if processes.is_main:
            finished = f"{directory.path}: the run is finished; give overwrite=true to do it again"
            console.print(finished, soft_wrap=True)
        return False
    model = load(config, batch, processes, guard)
    module = MixtralWithLoss(model, with_router_loss=config.router_aux_loss > 0)
    if config.task == "profile":
        forward_engine = ForwardEngine(module, config, batch, processes, guard)
        directory.create(record.config_yaml)
        profile(forward_engine, dataset, config, batch=batch, run=directory)
        return False
    start_from(model, config.lora)
    if processes.is_main and (sentence := other_form(config)):
        console.print(sentence, soft_wrap=True)
    engine = Engine(module, config, batch, processes, guard)
    guard.start("finding the checkpoint")
    checkpoint = find_checkpoint(directory, record, engine.shapes, partial(engine.disk, directory.path))
    directory.create(record.config_yaml)
    health = Health(config.failures)
    resumed = restore(directory, checkpoint, engine, health, dataset.train.batch([None] * batch.micro_batch))
    history = History(resumed)
    if processes.is_main:
        with engine.disk(directory.path):
            note_launch(directory.path, record.launch["started"], processes.count, history.resumed_after)
    metrics = Metrics(
        directory.path,
        config.logging,
        record.settings,
        is_main=processes.is_main,
        resumed=resumed,
        watched=partial(engine.disk, directory.path),
        peak=peak_flops(processes.device, config.model.dtype, processes.count),
    )
    saver = Saver(directory, record, engine, history, metrics, health)
    signals.begin_training()
    preempted = False
    try:
        train(
            engine,
            dataset,
            config,
            batch=batch,
            history=history,
            metrics=metrics,
            health=health,
            saver=saver,
            signals=signals,
            done=history.resumed_after,
        )
    except Preempted as stop:
        if processes.is_main:
            without = ", without overwrite," if config.overwrite else ""
            same = f"give the same command{without} with run_dir={directory.path}"
            again = command("train", directory.path) or same
            console.print(f"Stopped and saved {stop}; to go on: {again}", soft_wrap=True)
        preempted = True
    except Exception:
        metrics.close(within=2.0)  # the other processes are waiting to be told
        raise
    metrics.close()
    return preempted


def load(config: TrainConfig, batch: BatchArithmetic, processes: Processes, guard: Guard) -> MixtralForCausalLM:
    """The base with what trains; each process reads its part, at its own pace."""
    guard.start("loading the base")
    allocate = allocator_for(config, batch, processes.device)  # collective, so not within `guard.disk`
    with guard.disk(base_or_rows(config)):
        return build(config, allocate, device=processes.device, is_main=processes.is_main)


def base_or_rows(config: TrainConfig) -> Path:
    """What the start reads most of, to be named if its disk hangs; once a hub's base has been fetched."""
    base = config.model
    if base.path is None:
        return Path(config.dataset)
    return local_directory(base.path, base.revision, f"model.path={base.path}")


def tell_few_rows(dataset: PreparedDataset, batch: BatchArithmetic) -> None:
    """Says that a step takes more rows than there are."""
    there = "1 row" if len(dataset.train) == 1 else f"{len(dataset.train)} rows"
    few = f"{there}, and a step takes {batch.rows}: it has some of them more than once, or blanks"
    console.print(f"dataset={dataset.directory}: {few}; a smaller global_batch makes more steps", soft_wrap=True)


def fetch_base(config: TrainConfig) -> None:
    """Downloads a hub's base, and pins its revision to the commit; before processes wait for each other.

    Raises:
        UserError: the hub doesn't give it, or its config.json says that it can't be trained here with these settings.
    """
    base = config.model
    if base.path is not None:
        named = f"model.path={base.path}"
        base.revision = pinned(base.path, base.revision, named)
        architecture = read_architecture(base.path, base.revision, named)
        check_embeddings(architecture, named)  # before any weight is downloaded
        if config.lora.method == "lora":
            ranks_of_experts(config.lora, architecture)
        local_directory(base.path, base.revision, named)


def check_vocabulary(base: ModelConfig, dataset: PreparedDataset) -> None:
    """Raises `UserError` if the base brings a tokenizer that is not the one which made the dataset's ids."""
    if base.path is None or (Path(base.path).is_dir() and not has_tokenizer(Path(base.path))):
        return
    tokenizer = ChatTokenizer.load(base.path, revision=base.revision, setting="model.path")
    if tokenizer.fingerprint != dataset.manifest["tokenizer"]["fingerprint"]:
        raise UserError(f"dataset={dataset.directory}: it was prepared with another vocabulary; prepare it again")
