"""train() is the table of contents, step() the arithmetic of one update, evaluate() the held-out loss."""

import math
import time
from dataclasses import dataclass

from data.dataset import Batch, PackedTable, PreparedDataset, share
from train.checkpoint import RunDirectory
from train.config import BatchArithmetic, OptimConfig, TrainConfig
from train.engine import Engine, Update
from train.learning import FirstGradients
from train.metrics import Metrics, StepRecord


@dataclass(frozen=True, slots=True)
class StepResult:
    """The losses of a step over all processes, and what became of the update."""

    loss: float
    """Cross-entropy in nats per supervised token."""
    balance: float
    """Load-balancing loss of the routers, averaged over tokens."""
    tokens: int
    supervised_tokens: int
    update: Update


def train(
    engine: Engine,
    dataset: PreparedDataset,
    config: TrainConfig,
    *,
    batch: BatchArithmetic,
    run: RunDirectory,
    metrics: Metrics,
) -> None:
    """Trains, evaluates and saves as the configuration says; every process calls it."""
    schedule = dataset.schedule(epochs=config.epochs, rows_per_step=batch.rows, seed=config.seed)
    steps = min(schedule.steps, config.max_steps or schedule.steps)
    engine.train()
    with metrics.progress(steps):
        metrics.evaluated(0, evaluate(engine, dataset.eval, batch))
        for number in range(1, steps + 1):
            started = time.perf_counter()
            rows = schedule.rows_of(number - 1)
            micro_batches = list(
                share(dataset.train, rows, batch.micro_batch, engine.processes.rank, engine.processes.count)
            )
            lr = learning_rate(number, steps, config.optim)
            result = watched_step(engine, micro_batches, number, lr, config, metrics)
            metrics.stepped(_record(number, result, lr, time.perf_counter() - started))
            if number == steps or (config.eval_every and number % config.eval_every == 0):
                metrics.evaluated(number, evaluate(engine, dataset.eval, batch))
            if config.save_every and number % config.save_every == 0:
                run.save_checkpoint(engine, metrics, number)
    run.save_result(engine, metrics)


def watched_step(
    engine: Engine, micro_batches: list[Batch], number: int, lr: float, config: TrainConfig, metrics: Metrics
) -> StepResult:
    """`step`, noting what the routers do in every `logging.routing_every`-th and in the first; collective.

    Raises:
        ExpertNotLearningError: in the first step a targeted expert got tokens and no gradient.
    """
    routers = bool(config.logging.routing_every and number % config.logging.routing_every == 0)
    if not routers and number > 1:
        return step(engine, micro_batches, lr, config.router_aux_loss)
    gradients = FirstGradients(engine.module.causal_lm) if number == 1 else None
    with engine.watching(True):
        result = step(engine, micro_batches, lr, config.router_aux_loss)
    routing = engine.take_routing()
    metrics.routed(number, routing)
    if gradients is not None:
        found = engine.sum(*gradients.found())
        if result.update.applied:
            gradients.check(found, routing.reaching_LE)
    return result


def step(engine: Engine, micro_batches: list[Batch], lr: float, router_aux_loss: float) -> StepResult:
    """One optimizer step over this process's micro-batches; collective.

    The loss of the step is a sum over all tokens of all micro-batches and processes,

        Σ cross-entropy / (supervised tokens)  +  c · Σ tokens_m · balance_m / (tokens),

    so it does not depend on how the rows are divided into micro-batches' owners: each m contributes what its tokens
    weigh, also where a micro-batch holds few of them or none.
    """
    own = [float(sum(batch.tokens for batch in micro_batches)), float(sum(b.supervised_tokens for b in micro_batches))]
    tokens, supervised = engine.sum(*own)
    cross_entropies, balances = 0.0, 0.0
    update = Update(math.nan, False)
    for place, batch in enumerate(micro_batches):
        cross_entropy, balance = engine.forward(batch)
        loss = cross_entropy / max(supervised, 1.0) + router_aux_loss * balance * (batch.tokens / max(tokens, 1.0))
        cross_entropies += cross_entropy.item()
        balances += balance.item() * batch.tokens
        if place < len(micro_batches) - 1:
            engine.backward(loss)
            engine.micro_step_done()
            continue
        cross_entropies, balances = engine.sum(cross_entropies, balances)
        if not math.isfinite(cross_entropies + balances):
            loss = loss * math.nan  # some process has a bad loss: make the refusal of the update certain, everywhere
        engine.backward(loss)
        update = engine.step(lr)
    return StepResult(
        loss=cross_entropies / max(supervised, 1.0),
        balance=balances / max(tokens, 1.0),
        tokens=int(tokens),
        supervised_tokens=int(supervised),
        update=update,
    )


def evaluate(engine: Engine, table: PackedTable, batch: BatchArithmetic) -> float | None:
    """Cross-entropy on the held-out split in nats per supervised token, None where the split is empty; collective."""
    at_once = batch.micro_batch * batch.processes
    rows: list[int | None] = list(range(len(table)))
    rows += [None] * (-len(rows) % at_once)  # blank rows, so that every process makes the same number of forwards
    loss, supervised = 0.0, 0.0
    with engine.evaluating():
        for micro_batch in share(table, rows, batch.micro_batch, engine.processes.rank, engine.processes.count):
            cross_entropy, _ = engine.forward(micro_batch)
            loss += cross_entropy.item()
            supervised += micro_batch.supervised_tokens
    loss, supervised = engine.sum(loss, supervised)
    return loss / supervised if supervised else None


def learning_rate(step: int, steps: int, config: OptimConfig) -> float:
    """The rate of a step (from 1 to `steps`): linear to the peak, then a cosine to `final_fraction` of it."""
    warmup = math.ceil(config.warmup_fraction * steps)
    if step <= warmup:
        return config.lr * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.final_fraction + (1 - config.final_fraction) * cosine)


def _record(number: int, result: StepResult, lr: float, seconds: float) -> StepRecord:
    return StepRecord(
        step=number,
        loss=result.loss,
        learning_rate=lr,
        gradient_norm=result.update.gradient_norm,
        applied=result.update.applied,
        router_balance=result.balance,
        tokens=result.tokens,
        supervised_tokens=result.supervised_tokens,
        seconds=seconds,
    )
