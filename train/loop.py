"""train() is the table of contents, step() the arithmetic of one update, evaluate() the held-out loss."""

import math
import time
from dataclasses import dataclass

import torch

from configs.program.errors import UserError
from data.prepared.dataset import Batch, PreparedDataset, evaluation_batches, share
from train.config.engine import OptimConfig
from train.config.train import BatchArithmetic, TrainConfig
from train.engine.engine import Engine, ForwardEngine, Update
from train.engine.processes import seed
from train.failures.signals import Signals
from train.health import Health
from train.history import History, StepRecord
from train.lora.proof import FirstGradients
from train.model.work import of_training
from train.reporting.metrics import Metrics
from train.saving.saver import Saver


@dataclass(frozen=True, slots=True)
class StepResult:
    """The losses of a step over all processes, and what became of the update."""

    loss: float
    """Cross-entropy in nats per supervised token."""
    load_balancing_loss: float
    """Of the routers, averaged over tokens."""
    tokens: int
    supervised_tokens: int
    pairs: int
    """Of a token and one that it attends to."""
    update: Update


class Preempted(Exception):  # noqa: N818 - nothing went wrong
    """The run was asked to stop and has saved what it needs to go on."""


def train(
    engine: Engine,
    dataset: PreparedDataset,
    config: TrainConfig,
    *,
    batch: BatchArithmetic,
    history: History,
    metrics: Metrics,
    health: Health,
    saver: Saver,
    signals: Signals,
    done: int,
) -> None:
    """Trains, evaluates and saves as the configuration says, from after the step `done`; every process calls it.

    Raises:
        Preempted: a signal came to any of the processes; a checkpoint of the last step is on the disk.
        UserError: what was learned can't be written, or too many updates were skipped.
    """
    schedule = dataset.schedule(epochs=config.epochs, rows_per_step=batch.rows, seed=config.seed)
    steps = min(schedule.steps, config.max_steps or schedule.steps)
    work = of_training(engine.module.causal_lm.config.to_dict(), engine.shapes)

    def evaluate_if_due(number: int) -> None:
        due = number in (0, steps) or (config.eval_every and number % config.eval_every == 0)
        if not due or number in history.evaluations:
            return
        loss = evaluate(engine, dataset, batch, signals)
        if loss is not None:
            history.evaluations[number] = loss
            metrics.evaluated(number, loss)

    updated = engine.optimizer_steps > 0
    due = False
    engine.train()
    engine.at("beginning", done)
    with metrics.progress(steps, done=done):
        evaluate_if_due(done)
        if engine.any_process(signals.asked_to_stop):
            raise Preempted(f"after step {done}")
        for number in range(done + 1, steps + 1):
            with metrics.trace.step(number):
                started = time.perf_counter()
                engine.at("reading rows", number)
                rows = schedule.rows_of(number - 1)
                with engine.disk(dataset.directory):
                    micro_batches = list(
                        share(dataset.train, rows, batch.micro_batch, engine.processes.rank, engine.processes.count)
                    )
                lr = learning_rate(number, steps, config.optim)
                result = watched_step(engine, micro_batches, number, lr, config, metrics, first=not updated)
                seconds = time.perf_counter() - started
            updated = updated or result.update.applied
            flops = work.flops(result.tokens, result.pairs, result.supervised_tokens)
            record = _record(number, result, lr, seconds, schedule.epochs_after(number), flops)
            wrong = health.judge(record)
            history.last = record
            metrics.stepped(record, wrong, rows)
            if health.gives_up:
                saver.wait()
                raise UserError(health.gives_up)
            evaluate_if_due(number)
            flags = engine.sum_over_processes(signals.asked_to_stop, saver.failed, saver.behind)
            preempted, unsaved, behind = (count > 0 for count in flags)
            due |= bool(config.save_every and number % config.save_every == 0)
            if preempted or number == steps or (due and not behind):
                saver.checkpoint(number)
                due = False
            if preempted or unsaved:
                saver.wait()
            if preempted:
                raise Preempted(f"after step {number}")
    saver.result()


def watched_step(
    engine: Engine,
    micro_batches: list[Batch],
    number: int,
    lr: float,
    config: TrainConfig,
    metrics: Metrics,
    *,
    first: bool,
) -> StepResult:
    """`step`, with what the routers do noted in every `logging.routing_every`-th; collective.

    Before the `first` update it is watched in any case, for the gradients, and noted unless `logging.routing_every=0`.

    Raises:
        ExpertNotLearningError: before the first update a targeted expert got tokens and no gradient.
    """
    routers = bool(config.logging.routing_every and number % config.logging.routing_every == 0)
    if not routers and not first:
        return step(engine, micro_batches, number, lr, config)
    gradients = FirstGradients(engine.module.causal_lm) if first else None
    with engine.watching_routers():
        result = step(engine, micro_batches, number, lr, config)
    routing = engine.take_routing()
    if config.logging.routing_every:
        metrics.routed(number, routing)
    if gradients is not None:
        found = engine.sum_over_processes(*gradients.found())
        if result.update.applied:
            gradients.check(found, routing.reaching_LE)
    return result


def step(engine: Engine, micro_batches: list[Batch], number: int, lr: float, config: TrainConfig) -> StepResult:
    """One optimizer step over this process's micro-batches; collective. `number` is the step's, from 1.

    The loss of the step is a sum over all tokens of all micro-batches and processes,

        Σ cross-entropy / (supervised tokens)  +  c · Σ tokens_m · balance_m / (tokens),

    so it does not depend on how the rows are divided into micro-batches and among processes: each micro-batch m counts
    by its tokens, even if it holds few of them or none.

    Random numbers (dropout) follow from the seed, the step and the micro-batch alone: a resumed run draws the same
    numbers as one that was never interrupted, on any number of processes.
    """
    of_batches = [(batch.tokens, batch.supervised_tokens, batch.pairs) for batch in micro_batches]
    tokens, supervised, pairs = engine.sum_over_processes(*(float(sum(each)) for each in zip(*of_batches, strict=True)))
    losses: list[torch.Tensor] = []
    update = Update(math.nan, False)
    for index, batch in enumerate(micro_batches):
        seed(config.seed, number, index * engine.processes.count + engine.processes.rank)
        cross_entropy, balance = engine.forward(batch)
        share_of_tokens = batch.tokens / max(tokens, 1.0)
        loss = cross_entropy / max(supervised, 1.0) + config.router_aux_loss * balance * share_of_tokens
        losses.append(torch.stack([cross_entropy, balance]).detach())
        if index < len(micro_batches) - 1:
            engine.backward(loss)
            engine.micro_step_done()
            continue
        # Asked for here alone: while the host waits for a GPU's answer it can't give it the next micro-batch.
        found = torch.stack(losses).tolist()
        cross_entropies, balances = engine.sum_over_processes(
            sum(of_batch for of_batch, _ in found),
            sum(of_batch * batch.tokens for (_, of_batch), batch in zip(found, micro_batches, strict=True)),
        )
        if not math.isfinite(cross_entropies + balances):
            loss = loss * math.nan  # some process has a bad loss: the update is skipped for certain, everywhere
        engine.backward(loss)
        update = engine.step(lr)
    return StepResult(
        loss=cross_entropies / max(supervised, 1.0),
        load_balancing_loss=balances / max(tokens, 1.0),
        tokens=int(tokens),
        supervised_tokens=int(supervised),
        pairs=int(pairs),
        update=update,
    )


def evaluate(engine: ForwardEngine, dataset: PreparedDataset, batch: BatchArithmetic, signals: Signals) -> float | None:
    """Cross-entropy on the held-out split in nats per supervised token; collective.

    None if the split is empty, or if the run was asked to stop meanwhile: then there is no time for it.
    """
    engine.at("evaluating")
    table, processes = dataset.eval, engine.processes
    micro_batches = evaluation_batches(table, range(len(table)), batch.micro_batch, processes.rank, processes.count)
    loss, supervised = 0.0, 0.0
    with engine.evaluating():
        while True:
            with engine.disk(dataset.directory):
                micro_batch = next(micro_batches, None)
            if micro_batch is None:
                break
            cross_entropy, _ = engine.forward(micro_batch)
            loss += cross_entropy.item()
            supervised += micro_batch.supervised_tokens
            if engine.any_process(signals.asked_to_stop):
                return None
    loss, supervised = engine.sum_over_processes(loss, supervised)
    return loss / supervised if supervised else None


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of a step (from 1 to `steps`): linear to the peak, then a cosine to `final_fraction` of it."""
    warmup = math.ceil(config.warmup_fraction * steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * cosine)


def _record(number: int, result: StepResult, lr: float, seconds: float, epoch: float, flops: float) -> StepRecord:
    return StepRecord(
        step=number,
        loss=result.loss,
        learning_rate=lr,
        gradient_norm=result.update.gradient_norm,
        applied=result.update.applied,
        load_balancing_loss=result.load_balancing_loss,
        tokens=result.tokens,
        supervised_tokens=result.supervised_tokens,
        seconds=seconds,
        epoch=epoch,
        flops=flops,
    )
