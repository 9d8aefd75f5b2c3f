"""Questions → ids, once for all models that are asked; a model's answers, unit by unit, and what each is worth."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from configs.program.errors import UserError
from data.template import BOS, ChatTokenizer
from inference.config import InferenceConfig
from inference.evaluation.journal import Journal
from inference.evaluation.leaderboard.questions import Question, final_number
from inference.evaluation.leaderboard.tasks import GSM8K_STOPS, GSM8K_TOKENS, TASKS
from inference.evaluation.scoring import log_likelihoods
from inference.evaluation.sequences import Scored, context_ids, groups_of, key_of, sequences_of, unit_of
from inference.generate import Ending, generate_rows
from inference.load import Loaded


@dataclass(frozen=True, slots=True)
class Answered:
    """A question and what became of it."""

    question: Question
    score: float
    """1 for a right answer and 0 for a wrong one; of TruthfulQA the probability of the true choices."""
    log_likelihoods: tuple[float, ...] = ()
    text: str | None = None
    """What was generated, up to the stop string."""


def before_context(config: InferenceConfig, task: str) -> bool:
    """Whether `<s>` stands before a task's contexts. The leaderboard's own runs show one before GSM8K's alone."""
    return config.bos == "always" or (config.bos == "leaderboard" and task == "gsm8k")


@dataclass(frozen=True, slots=True)
class Plan:
    """Questions as a model reads them: encoded and grouped once, for as many models as are asked."""

    questions: list[Question]
    chosen: list[int]
    """Which questions have choices."""
    sequences: list[list[Scored]]
    """The sequences of each of these, one for each choice."""
    groups: list[tuple[int, ...]]
    """Which of these are answered together."""
    written: list[int]
    """Which questions are answered in words."""
    prompts: list["array[int]"]
    """The ids that the answer to each of these starts from."""


def plan_of(questions: list[Question], tokenizer: ChatTokenizer, config: InferenceConfig, longest: int) -> Plan:
    """Encodes questions, and decides which are answered together.

    Args:
        questions: all that are asked.
        tokenizer: of the model.
        config: the settings.
        longest: ids of the model's context; of a longer question the beginning is left out, as the leaderboard did.

    Raises:
        UserError: the context has no room for an answer.
    """
    chosen = [number for number, question in enumerate(questions) if question.choices]
    written = [number for number, question in enumerate(questions) if not question.choices]
    sequences = [
        sequences_of(
            questions[number],
            tokenizer,
            bos=before_context(config, questions[number].task),
            chat=config.chat,
            longest=longest,
        )
        for number in chosen
    ]
    prompts = _prompts([questions[number] for number in written], tokenizer, config, longest - GSM8K_TOKENS)
    return Plan(questions, chosen, sequences, groups_of(sequences, config.max_tokens), written, prompts)


def _prompts(
    questions: list[Question], tokenizer: ChatTokenizer, config: InferenceConfig, most: int
) -> list["array[int]"]:
    """The ids that each answer starts from, at most `most` of them."""
    if questions and most < 1:
        raise UserError(
            f"tasks=gsm8k: an answer may take {GSM8K_TOKENS} tokens, and the model's context is {most + GSM8K_TOKENS}; "
            f"leave it out"
        )
    prompts = []
    for question in questions:
        bos = before_context(config, question.task)
        ids = context_ids(question.prompt, tokenizer, bos=bos, chat=config.chat)
        has_bos = ids[0] == BOS
        prompts.append(ids if len(ids) <= most else ids[:has_bos] + ids[len(ids) - most + has_bos :])
    return prompts


def answer_all(
    loaded: Loaded, config: InferenceConfig, plan: Plan, journal: Journal, advance: Callable[[int], None]
) -> list[Answered]:
    """The answers to all questions, in their order; those in the journal are not asked again.

    `advance` is called with the number of questions that were answered.
    """
    answers: dict[int, Answered] = {}
    for number, likelihoods in _choices(loaded, plan, journal, advance):
        question = plan.questions[number]
        answers[number] = Answered(question, choice_score(question, likelihoods), tuple(likelihoods))
    for number, text in _texts(loaded, config, plan, journal, advance):
        question = plan.questions[number]
        answers[number] = Answered(question, float(final_number(text) == question.gold), text=text)
    return [answers[number] for number in range(len(plan.questions))]


def _choices(
    loaded: Loaded, plan: Plan, journal: Journal, advance: Callable[[int], None]
) -> list[tuple[int, list[float]]]:
    """The log-likelihoods of each question's choices, by the question's number."""
    found: list[tuple[int, list[float]]] = []
    for numbers in plan.groups:
        unit = unit_of(numbers, plan.sequences)
        if unit.key not in journal:
            journal.append(unit.key, [each.total for each in log_likelihoods(loaded.model, unit.packed)])
        totals = iter(journal.answers(unit.key, float, sum(len(plan.sequences[number]) for number in numbers)))
        found += [(plan.chosen[number], [next(totals) for _ in plan.sequences[number]]) for number in numbers]
        advance(len(numbers))
    return found


def choice_score(question: Question, likelihoods: list[float]) -> float:
    """What the log-likelihoods of a question's choices are worth, by the metric of its task.

    Of equals the first counts as chosen.
    """
    metric = TASKS[question.task].metric
    values = np.array(likelihoods)
    if metric == "mc2":
        # The leaderboard took the choices before the first false one as the true ones: in 2 of 817 documents
        # a true one comes after it.
        assert isinstance(question.gold, tuple)
        true = question.gold.index(0)
        shares = np.exp(values - values.max())
        return float(shares[:true].sum() / shares.sum())
    if metric == "acc_norm":
        values = values / np.array([float(len(choice) - 1) for choice in question.choices])  # without the space
    return float(int(values.argmax()) == question.gold)


def _texts(
    loaded: Loaded, config: InferenceConfig, plan: Plan, journal: Journal, advance: Callable[[int], None]
) -> list[tuple[int, str]]:
    """What is generated for each question, by the question's number; prompts of like length together."""
    asked = replace(
        config,
        stop=list(GSM8K_STOPS),
        markers="keep",
        max_new_tokens=GSM8K_TOKENS,
        temperature=0.0,
        repetition_penalty=1.0,
    )
    ending = Ending(loaded.tokenizer, asked)
    order = sorted(range(len(plan.prompts)), key=lambda index: (-len(plan.prompts[index]), index))
    found: list[tuple[int, str]] = []
    for start in range(0, len(order), config.batch_size):
        indices = order[start : start + config.batch_size]
        of_unit = [plan.prompts[index] for index in indices]
        key = key_of(of_unit)
        if key not in journal:
            answers = generate_rows(loaded, asked, [ids.tolist() for ids in of_unit], ending, seed=0)
            journal.append(key, [answer.text for answer in answers])
        texts = journal.answers(key, str, len(indices))
        found += zip((plan.written[index] for index in indices), texts, strict=True)
        advance(len(indices))
    return found


def record(answered: Answered, prompt_hash: str) -> dict[str, Any]:
    """The line of a question in `questions.jsonl`."""
    question = answered.question
    line: dict[str, Any] = {"task": question.task}
    if question.group != question.task:
        line["subject"] = question.group
    line |= {"row": question.number, "prompt": prompt_hash, "score": answered.score}
    if answered.text is not None:
        return line | {"text": answered.text}
    return line | {"log_likelihoods": list(answered.log_likelihoods)}
