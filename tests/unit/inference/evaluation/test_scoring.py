"""Packed sequences give each continuation the log-likelihood that it has alone."""

import itertools
import random
from array import array

import pytest
import torch
from transformers import MixtralForCausalLM

from data.template import BOS, ChatTokenizer
from inference.evaluation.leaderboard.questions import questions_of
from inference.evaluation.scoring import LogLikelihood, log_likelihoods
from inference.evaluation.sequences import PackedSequences, Scored, sequences_of, shared, units_of
from tests.support.adapters import make_base
from tests.support.leaderboard import needs_eval, rows_of


def make_groups(seed: int) -> list[list[Scored]]:
    """Documents with a few choices each; some share the beginnings of their contexts, some a whole context."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, 64) for _ in range(length)]

    heads = [ids(draw.randrange(1, 12)) for _ in range(3)]
    groups = []
    for _ in range(draw.randrange(1, 9)):
        context = draw.choice(heads) + ids(draw.randrange(5))
        choices = [ids(draw.randrange(1, 5)) for _ in range(draw.randrange(1, 5))]
        groups.append([Scored(array("H", context + choice), len(choice)) for choice in choices])
    return groups


def alone(model: MixtralForCausalLM, sequence: Scored) -> LogLikelihood:
    """By a plain forward of one sequence, and the definition."""
    ids = torch.tensor([sequence.ids.tolist()])
    with torch.no_grad():
        logits = model(ids).logits[0, :-1].float().log_softmax(-1)
    total, greedy = 0.0, True
    for position in range(ids.shape[1] - sequence.continuation, ids.shape[1]):
        target = int(ids[0, position])
        total += float(logits[position - 1, target])
        greedy &= int(logits[position - 1].argmax()) == target
    return LogLikelihood(total, greedy)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("seed", range(3))
def test_a_continuation_has_the_log_likelihood_that_it_has_alone(seed: int, window: int | None) -> None:
    model = make_base(torch.float64, vocab_size=64, sliding_window=window, initializer_range=0.3)
    groups = make_groups(seed)
    expected = [[alone(model, sequence) for sequence in group] for group in groups]
    for max_tokens in (24, 10_000):
        found: dict[int, list[LogLikelihood]] = {}
        for unit in units_of(groups, max_tokens):
            results = iter(log_likelihoods(model, unit.packed))
            found |= {number: list(itertools.islice(results, len(groups[number]))) for number in unit.numbers}
        assert sorted(found) == list(range(len(groups)))
        for number, of_group in enumerate(expected):
            for result, wanted in zip(found[number], of_group, strict=True):
                assert result.total == pytest.approx(wanted.total, abs=1e-5)
                assert result.is_greedy == wanted.is_greedy


def test_what_is_shared_is_read_once_and_units_keep_to_their_size() -> None:
    context = list(range(3, 33))
    choices = [[40], [41], [42, 43], [42, 44]]
    group = [Scored(array("H", context + choice), len(choice)) for choice in choices]
    (unit,) = units_of([group], 1)
    # The context, and the 42 that is read once for both: of the last ids nothing is read.
    assert len(unit.packed.ids) == len(context) + 1
    groups = [group, *([Scored(array("H", [index, *range(3, 13), 5]), 1)] for index in range(40, 60))]
    units = list(units_of(groups, 35))
    assert sorted(number for unit in units for number in unit.numbers) == list(range(len(groups)))
    assert all(len(unit.packed.ids) <= 35 for unit in units)
    assert len({unit.key for unit in units}) == len(units)
    assert [unit.key for unit in units_of(groups, 35)] == [unit.key for unit in units]


def test_no_id_attends_to_another_branch() -> None:
    packed = PackedSequences()
    packed.add([Scored(array("H", ids), 1) for ids in ([1, 2, 3, 9], [1, 2, 4, 9], [1, 5, 9])])
    assert packed.ids == [1, 2, 3, 4, 5]
    assert packed.positions == [0, 1, 2, 2, 1]
    wanted = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert packed.mask().int().tolist() == wanted


def test_shared_beginnings() -> None:
    draw = random.Random(0)
    for _ in range(200):
        first, second = (array("H", (draw.randrange(2) for _ in range(draw.randrange(9)))) for _ in range(2))
        length = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        assert shared(first, second) == (min(len(first), len(second)) if length is None else length)


@needs_eval
def test_ids_are_those_of_the_joined_text() -> None:
    """Context and choice are encoded apart; a second implementation encodes both together."""
    tokenizer = ChatTokenizer.load()
    for name in ("arc", "hellaswag", "truthfulqa", "winogrande", "mmlu"):
        for question in rows_of(name).questions[:60]:
            sequences = sequences_of(question, tokenizer, bos=False, chat=False, longest=10**6)
            for context, choice, sequence in zip(question.contexts, question.choices, sequences, strict=True):
                assert sequence.ids.tolist() == tokenizer._text.encode(context + choice, add_special_tokens=False).ids
                assert sequence.continuation < len(sequence.ids)


def test_the_context_stands_in_the_format_that_is_asked_for() -> None:
    tokenizer = ChatTokenizer.load()
    row = {"id": "1", "question": "Sky?", "choices": {"text": ["blue", "red"], "label": ["A", "B"]}, "answerKey": "A"}
    (question,) = questions_of("arc", [row], [], 0)

    def text(**how: bool) -> tuple[str, int]:
        sequence = sequences_of(question, tokenizer, **{"bos": False, "chat": False, "longest": 99, **how})[0]
        return tokenizer.spell(sequence.ids.tolist()), sequence.ids[0]

    assert text() == (" Question: Sky?\nAnswer: blue", tokenizer.encode_text("Question")[0])
    assert text(bos=True) == ("<s>Question: Sky?\nAnswer: blue", BOS)
    assert text(chat=True) == ("<s>[INST] Question: Sky?\nAnswer: [/INST] blue", BOS)


def test_of_a_sequence_beyond_the_context_the_end_is_kept() -> None:
    tokenizer = ChatTokenizer.load()
    row = {"id": "1", "question": "x " * 50, "choices": {"text": ["y", "z"], "label": ["A", "B"]}, "answerKey": "A"}
    (question,) = questions_of("arc", [row], [], 0)
    whole, cut = (
        sequences_of(question, tokenizer, bos=False, chat=False, longest=longest)[0] for longest in (1000, 20)
    )
    assert cut.ids == whole.ids[-21:]
    assert len(cut.inputs) == 20
    assert cut.continuation == whole.continuation
