"""A thousand bad rows of every kind among a thousand good ones: each found out, and the good ones none the worse."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

USER = {"from": "human", "value": "Hi"}
REPLY = {"from": "gpt", "value": "Hello."}


def sharegpt(*turns: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"conversations": list(turns), **more}).encode()


def turn(speaker: Any, value: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value}


# Reason → lines that have to be rejected for it, made with a random number so that no two are alike.
BAD: dict[str, list[Callable[[int], bytes]]] = {
    "invalid_json": [
        lambda n: b'{"conversations": [' + str(n).encode(),
        lambda n: b"not json " + str(n).encode(),
        lambda n: sharegpt(USER, turn("gpt", f"cut {n}"))[:-3],
        lambda n: b'{"conversations": ' + b"[" * 100_000,
    ],
    "invalid_utf8": [
        lambda n: sharegpt(USER, turn("gpt", f"byte {n} @")).replace(b"@", b"\xff"),
        lambda n: sharegpt(USER, turn("gpt", f"half {n} @")).replace(b"@", b"\xe2\x82"),
    ],
    "not_an_object": [lambda n: str(n).encode(), lambda n: b'["text"]', lambda _: sharegpt(USER, "Hello.")],  # type: ignore[arg-type]
    "not_a_list": [lambda n: json.dumps({"conversations": f"text {n}"}).encode()],
    "missing_field": [
        lambda n: json.dumps({"id": n}).encode(),
        lambda _: sharegpt(USER, {"from": "gpt"}),
        lambda _: sharegpt({"value": "Hi"}, REPLY),
    ],
    "empty_field": [lambda _: sharegpt(USER, turn("gpt", "")), lambda _: sharegpt(turn("human", " \n"), REPLY)],
    "not_text": [lambda n: sharegpt(USER, turn("gpt", n + 0.5)), lambda n: sharegpt(turn("human", [str(n)]), REPLY)],
    "unknown_role": [
        lambda n: sharegpt(USER, turn("function_call", f"f({n})"), turn("observation", "1"), REPLY),
        lambda n: sharegpt(USER, turn("tool", str(n))),
        lambda n: sharegpt(turn(n, "Hi"), REPLY),
    ],
    "turns_out_of_order": [
        lambda _: sharegpt(REPLY, USER),
        lambda n: sharegpt(USER, turn("human", f"again {n}"), REPLY),
        lambda _: sharegpt(USER, REPLY, turn("system", "late"), USER, REPLY),
        lambda _: sharegpt(),
    ],
    "no_reply": [lambda n: sharegpt(turn("human", f"Hi {n}")), lambda _: sharegpt(USER, REPLY, USER)],
    "nul_character": [lambda n: sharegpt(USER, turn("gpt", f"nul \0 {n}"))],
    "lone_surrogate": [lambda n: sharegpt(USER, turn("gpt", f"half \ud83d {n}"))],
    "template_marker": [
        lambda n: sharegpt(USER, turn("gpt", f"ignore that [/INST] {n}")),
        lambda n: sharegpt(turn("human", f"<<SYS>> {n}"), REPLY),
        lambda n: sharegpt(USER, REPLY, system_prompt=f"<</SYS>> {n}"),
    ],
    "too_long": [lambda n: sharegpt(USER, turn("gpt", f"word {n} " * 200))],
}


def good(number: int, rng: random.Random) -> bytes:
    words = ["red", "</s>", "[INST", "日本", "🧿", "<s>", "x  y", "<0x0A>", "\t", "naïve"]
    turns = []
    for _ in range(rng.randint(1, 3)):
        turns += [turn("human", f"{number} " + " ".join(rng.choices(words, k=5))), turn("gpt", rng.choice(words) + "!")]
    more = {"system_prompt": "Be brief."} if rng.random() < 0.3 else {}
    return sharegpt(*turns, **more)


def rows(directory: Path, split: str) -> list[dict[str, Any]]:
    with pa.memory_map(str(directory / split / "rows.arrow")) as file:
        return pa.ipc.open_file(file).read_all().to_pylist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_thousand_bad_rows_among_a_thousand_good_ones(
    run_program: Callable[..., Any], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    good_lines = [good(number, rng) for number in range(1000)]
    kinds = [(reason, make) for reason, makers in BAD.items() for make in makers]
    bad_lines = [(reason, make(n)) for n in range(1000) for reason, make in [kinds[n % len(kinds)]]]
    mixed: list[tuple[str | None, bytes]] = [(None, line) for line in good_lines[1:]] + bad_lines  # type: ignore[assignment]
    rng.shuffle(mixed)
    # Good rows keep their order among themselves, and the first says that the file is JSON Lines.
    order = iter(good_lines[1:])
    lines = [(None, good_lines[0]), *((reason, line if reason else next(order)) for reason, line in mixed)]
    (tmp_path / "mixed.jsonl").write_bytes(b"\n".join(line for _, line in lines) + b"\n")
    (tmp_path / "good.jsonl").write_bytes(b"\n".join(good_lines) + b"\n")
    for name in ("mixed", "good"):
        settings = ("seq_len=256", "max_reject_fraction=0.6", "eval_fraction=0.05")
        assert run_program("data", f"files=[{name}.jsonl]", f"output={name}", *settings).exit_code == 0

    found = [json.loads(line) for line in (tmp_path / "mixed" / "rejects.jsonl").read_text().splitlines()]
    expected = [(number, reason) for number, (reason, _) in enumerate(lines, start=1) if reason]
    assert [(reject["line"], reject["reason"]) for reject in found] == expected
    counts = json.loads((tmp_path / "mixed" / "manifest.json").read_text())["rows"]
    assert (counts["in"], counts["kept"], counts["rejected"]) == (2000, 1000, 1000)

    place = {number: index for index, number in enumerate(n for n, (reason, _) in enumerate(lines) if not reason)}
    for split in ("train", "eval"):
        mixed_rows = rows(tmp_path / "mixed", split)
        for row in mixed_rows:
            row["rows"] = [place[number] for number in row["rows"]]
        assert mixed_rows == rows(tmp_path / "good", split)
