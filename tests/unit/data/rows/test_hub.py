"""What comes from a hub, or a directory laid out as one: rows of the commit that the manifest names, or a sentence."""

import csv
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.program.errors import UserError
from data.disk.files import sha256
from data.disk.hub_refusals import cache_folder
from data.prepared.layout import open_split
from data.rows.repository import CONVERTED, Wanted, choose
from data.stages.contamination import GRAM
from data.template import ChatTokenizer
from tests.support.hub import FIRST, SECOND, Hub

OFFLINE = "huggingface_hub.constants.HF_HUB_OFFLINE"


def lines(word: str, count: int = 20) -> bytes:
    rows = ({"instruction": f"{word} question {n}?", "output": f"{word} answer {n}."} for n in range(count))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(word: str, count: int = 20) -> bytes:
    rows = [json.loads(line) for line in lines(word, count).splitlines()]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def card(**configs: str) -> bytes:
    """The README.md of configs and their files; `config__split` names a split that isn't train."""
    text = "---\nconfigs:\n"
    for name, path in configs.items():
        config, _, split = name.partition("__")
        text += f"- config_name: {config}\n  data_files:\n  - split: {split or 'train'}\n    path: '{path}'\n"
    return f"{text}---\n# Rows\n".encode()


@pytest.fixture
def data(run_program: Callable[..., Any]) -> Callable[..., Any]:
    """Runs `python -m data` to `out`."""
    return lambda *settings: run_program("data", "output=out", "eval_fraction=0", "workers=1", *settings)


@pytest.fixture
def prepared(data: Callable[..., Any], tmp_path: Path) -> Callable[..., tuple[set[str], dict[str, Any]]]:
    """Prepares, and gives the words that the rows are made of, and what the manifest says of the source."""

    def prepare(*settings: str) -> tuple[set[str], dict[str, Any]]:
        outcome = data(*settings)
        assert outcome.exit_code == 0, outcome.stderr
        return words(tmp_path / "out"), json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"][0]

    return prepare


def words(directory: Path) -> set[str]:
    """The first words of the prompts of a prepared dataset."""
    tokenizer = ChatTokenizer.load()
    texts = (tokenizer.spell(list(row["ids"])) for row in open_split(directory, "train").to_pylist())
    return {word for text in texts for word in re.findall(r"\[INST\] (\S+)", text)}


@pytest.fixture
def refused(data: Callable[..., Any]) -> Callable[..., str]:
    """Runs `python -m data`, and gives the one sentence that it says, and says nothing else."""

    def refuse(*settings: str) -> str:
        outcome = data(*settings)
        assert outcome.exit_code == 2, outcome.stderr
        said = [line for line in outcome.stderr.splitlines() if not line.startswith("hub: downloading")]
        assert len(said) == 1, outcome.stderr
        return said[0]

    return refuse


# Which commit


def test_branch_tag_and_commit_give_their_rows(hub: Hub, prepared: Callable[..., Any]) -> None:
    rows = hub.add("datasets/user/rows", {"train.jsonl": lines("old")}, {"train.jsonl": lines("new")})
    rows.refs = {"v1": FIRST}
    for revision, word, commit in (("main", "new", SECOND), ("v1", "old", FIRST), (SECOND, "new", SECOND)):
        found, told = prepared("dataset=user/rows", f"revision={revision}")
        assert (found, told["commit"], told["files"]) == ({word}, commit, [{"file": "train.jsonl"}])


@pytest.mark.parametrize("cached", [FIRST, "main"])
@pytest.mark.parametrize("asked", [SECOND, "nope"])
def test_offline_another_commit_is_never_taken(
    hub: Hub,
    prepared: Callable[..., Any],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    cached: str,
    asked: str,
) -> None:
    rows = hub.add("datasets/user/rows", {"train.jsonl": lines("old")})
    prepared("dataset=user/rows", f"revision={cached}")
    rows.commits[SECOND] = {"train.jsonl": lines("new")}
    monkeypatch.setattr(OFFLINE, True)
    said = refused("dataset=user/rows", f"revision={asked}")
    assert said.startswith("data: dataset=user/rows: ")
    assert "HF_HUB_OFFLINE" in said
    assert asked in said
    assert said.endswith(f"or name a commit that is in the cache: {FIRST}")
    monkeypatch.setattr(OFFLINE, False)
    if asked == SECOND:  # nothing of before is taken for it
        assert prepared("dataset=user/rows", f"revision={asked}")[0] == {"new"}


def test_a_dead_hub_gives_no_other_commit(
    hub: Hub, prepared: Callable[..., Any], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("old")})
    prepared("dataset=user/rows", f"revision={FIRST}")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    said = refused("dataset=user/rows", f"revision={SECOND}")
    assert "http://127.0.0.1:9 can't be reached" in said
    assert FIRST in said


def test_a_branch_that_can_t_be_asked_for_is_what_it_was_last(
    hub: Hub, prepared: Callable[..., Any], data: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = hub.add("datasets/user/rows", {"train.jsonl": lines("old")})
    prepared("dataset=user/rows")
    rows.commits[SECOND] = {"train.jsonl": lines("new")}
    monkeypatch.setattr(OFFLINE, True)
    outcome = data("dataset=user/rows", "seed=1")
    assert outcome.exit_code == 0
    assert (
        f"hub: it gives no answer about user/rows; main stands for {FIRST}, as in its last answer\n" in outcome.stderr
    )
    (told,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert (words(tmp_path / "out"), told["commit"]) == ({"old"}, FIRST)


@pytest.mark.parametrize("content", [b"../../elsewhere", b"\xff\xfe", b"", None])
def test_a_cache_that_is_damaged_names_no_folder(
    hub: Hub,
    prepared: Callable[..., Any],
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    """None stands for a folder in the place of what a branch was last; asked again, the hub mends it."""
    hub.add("datasets/user/rows", {"train.jsonl": lines("old")})
    prepared("dataset=user/rows")
    ref = cache_folder("dataset", "user/rows") / "refs" / "main"
    ref.unlink()
    ref.mkdir() if content is None else ref.write_bytes(content)
    monkeypatch.setattr(OFFLINE, True)
    assert f"or name a commit that is in the cache: {FIRST}" in refused("dataset=user/rows", "seed=1")
    monkeypatch.setattr(OFFLINE, False)
    assert prepared("dataset=user/rows", "seed=1")[0] == {"old"}


def test_files_that_the_hub_fails_to_give_are_not_replaced(
    hub: Hub, prepared: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    rows = hub.add("datasets/user/rows", {"train.jsonl": lines("before")})
    prepared("dataset=user/rows")
    rows.commits[SECOND] = {"train.jsonl": lines("after")}
    rows.downloads = [503] * 100
    assert "the hub answered 503" in refused("dataset=user/rows")
    (told,) = json.loads((tmp_path / "out" / "manifest.json").read_text())["inputs"]
    assert (words(tmp_path / "out"), told["commit"]) == ({"before"}, FIRST)


def test_a_branch_that_moves_is_prepared_again_and_one_that_stays_is_not(
    hub: Hub, prepared: Callable[..., Any], data: Callable[..., Any]
) -> None:
    rows = hub.add("datasets/user/rows", {"train.jsonl": lines("old")})
    prepared("dataset=user/rows")
    hub.requests.clear()
    assert "nothing was done" in data("dataset=user/rows").stderr
    assert hub.requests == [("GET", "/api/datasets/user/rows")]
    assert prepared("dataset=user/rows", "seed=1")[0] == {"old"}
    assert not any("/resolve/" in path for _, path in hub.requests)  # from the cache
    rows.commits[SECOND] = {"train.jsonl": lines("new")}
    found, told = prepared("dataset=user/rows")
    assert (found, told["commit"]) == ({"new"}, SECOND)


def test_a_commit_in_the_cache_needs_no_hub(
    hub: Hub, prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("datasets/user/rows", {"README.md": card(a="*.jsonl"), "train.jsonl": lines("old")})
    prepared("dataset=user/rows", f"revision={FIRST}")
    hub.requests.clear()
    monkeypatch.setattr(OFFLINE, True)
    assert prepared("dataset=user/rows", f"revision={FIRST}", "seed=1")[0] == {"old"}
    assert not hub.requests


# Transfers


def test_a_moment_s_refusals_are_tried_again(hub: Hub, prepared: Callable[..., Any]) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows")}, answers=[503, 429], downloads=[503], retry_after="7")
    assert prepared("dataset=user/rows")[0] == {"rows"}
    assert hub.waits == [7.0, 7.0, 7.0]


@pytest.mark.parametrize(("status", "why"), [(503, "it is not available"), (429, "too many requests")])
def test_lasting_refusals_are_told(hub: Hub, refused: Callable[..., str], status: int, why: str) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows")}, answers=[status] * 100)
    assert f"the hub answered {status} ({why})" in refused("dataset=user/rows")
    assert hub.waits == [1.0, 2.0, 4.0]


def test_a_long_wait_is_told_and_not_taken(hub: Hub, refused: Callable[..., str]) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows")}, answers=[429] * 100, retry_after="3600")
    assert "try again in 3600 seconds" in refused("dataset=user/rows")
    assert hub.waits == []


def test_a_transfer_that_is_cut_off_goes_on(
    hub: Hub, prepared: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows", 200)}, cut={"train.jsonl": 1})
    assert prepared("dataset=user/rows")[0] == {"rows"}
    begun = [path for method, path in hub.requests if method == "GET" and "/resolve/" in path]
    assert len(begun) == 2
    assert int(begun[1].rpartition("=")[2].rstrip("-")) > len(lines("rows", 200)) // 4


def test_a_transfer_that_is_always_cut_off_is_told(hub: Hub, refused: Callable[..., str]) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows")}, cut={"train.jsonl": 1000})
    assert "the transfer was cut off again and again" in refused("dataset=user/rows")
    assert hub.sent["datasets/user/rows/train.jsonl"] < 50


# Refusals


@pytest.mark.parametrize("token", [None, "hf_" + "x" * 20])
def test_gated_and_missing_say_so(
    hub: Hub, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    hub.add("datasets/user/gated", {"README.md": b"# Gated", "train.jsonl": lines("gated")}, gated=True)
    said = refused("dataset=user/gated")
    assert f"only to those who were granted access ({403 if token else 401})" in said
    assert f"{hub.endpoint}/datasets/user/gated" in said
    said = refused("dataset=user/missing")
    assert f"the hub has no such dataset, or it is private ({404 if token else 401})" in said
    assert "there is no such directory" in said


def test_a_revision_that_the_hub_lacks_is_told(hub: Hub, refused: Callable[..., str]) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows")})
    for revision in ("nope", "3" * 40):
        assert f"the hub has no revision {revision} of it (404)" in refused("dataset=user/rows", f"revision={revision}")


def test_a_loading_script_is_not_run(hub: Hub, refused: Callable[..., str], tmp_path: Path) -> None:
    script = f"open({str(tmp_path / 'executed')!r}, 'w')".encode()
    hub.add("datasets/user/rows", {"rows.py": script, "train.jsonl": lines("script")})
    said = refused("dataset=user/rows")
    assert f"revision={CONVERTED}" in said
    assert "rows.py" in said
    assert not (tmp_path / "executed").exists()


def test_rows_of_the_converted_branch_are_those_of_one_config(
    hub: Hub, prepared: Callable[..., Any], refused: Callable[..., str]
) -> None:
    files = {f"{config}/train/0000.parquet": parquet(config) for config in ("first", "second")}
    hub.add("datasets/user/rows", {"rows.py": b"1 / 0"}, files, refs={"main": FIRST, CONVERTED: SECOND})
    converted = ("dataset=user/rows", f"revision={CONVERTED}")
    assert "dataset_config=first, or another of first, second" in refused(*converted)
    assert prepared(*converted, "dataset_config=second")[0] == {"second"}


def test_configs_are_chosen_or_listed(hub: Hub, prepared: Callable[..., Any], refused: Callable[..., str]) -> None:
    files = {"a.jsonl": lines("a"), "b.jsonl": lines("b")}
    hub.add("datasets/user/rows", {"README.md": card(a="a.jsonl", b="b.jsonl"), **files})
    said = refused("dataset=user/rows")
    assert "it has several configs; give dataset_config=a, or another of a, b" in said
    assert "it is one of a, b" in refused("dataset=user/rows", "dataset_config=c")
    assert prepared("dataset=user/rows", "dataset_config=b")[0] == {"b"}
    hub.add("datasets/user/plain", files)
    assert "has no configs; leave it out" in refused("dataset=user/plain", "dataset_config=b")


def test_a_default_config_is_taken(hub: Hub, prepared: Callable[..., Any]) -> None:
    files = {"a.jsonl": lines("a"), "b.jsonl": lines("b"), "c/train.jsonl": lines("c")}
    hub.add("datasets/user/named", {"README.md": card(a="a.jsonl", default="b.jsonl"), **files})
    assert prepared("dataset=user/named")[0] == {"b"}
    told = "configs:\n- config_name: no\n  data_files: a.jsonl\n- config_name: 1.0\n  data_dir: c\n  default: true"
    hub.add("datasets/user/told", {"README.md": f"---\n{told}\n---\n".encode(), **files})
    assert prepared("dataset=user/told")[0] == {"c"}
    assert prepared("dataset=user/told", "dataset_config=no")[0] == {"a"}  # a name, not a truth value


@pytest.mark.parametrize(
    "head",
    [
        "configs:\n- config_name: a\n  data_files: {elsewhere}",
        "configs:\n- config_name: a\n  data_files: [",
        "configs: !!python/object/apply:os.system ['touch executed']",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\n"
        "c: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c, *c]\n"
        "e: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d]\nconfigs: [*e, *e, *e, *e, *e, *e, *e, *e, *e, *e]",
        "configs: " + "[" * 100_000,
        "a: &a b.jsonl\nconfigs:\n- config_name: a\n  data_files: *a",
    ],
    ids=["elsewhere", "no-yaml", "tag", "laughs", "deep", "alias"],
)
def test_a_readme_reaches_nothing_but_its_own_files(
    hub: Hub, refused: Callable[..., str], tmp_path: Path, head: str
) -> None:
    (tmp_path / "secret.jsonl").write_bytes(lines("secret"))
    for elsewhere in (
        f"{tmp_path}/secret.jsonl",
        "../../../secret.jsonl",
        "hf://datasets/a/b/c.jsonl",
        f"{hub.endpoint}/x",
    ):
        readme = f"---\n{head.format(elsewhere=elsewhere)}\n---\n".encode()
        hub.add("datasets/user/rows", {"README.md": readme, "train.jsonl": lines("rows")})
        said = refused("dataset=user/rows", f"revision={FIRST}")
        assert "the configs in its README.md can't be read" in said
        assert not (tmp_path / "executed").exists()
        if "{elsewhere}" not in head:
            break
        hub.repositories.clear()
        shutil.rmtree(tmp_path / "hub-cache")


@pytest.mark.parametrize("name", ["../../outside.jsonl", "/outside.jsonl", "a/../../outside.jsonl"])
def test_names_that_lead_out_are_left_alone(hub: Hub, refused: Callable[..., str], tmp_path: Path, name: str) -> None:
    hub.add("datasets/user/rows", {name: lines("outside")})
    assert "it holds no file of rows" in refused("dataset=user/rows")
    assert not list(tmp_path.rglob("outside.jsonl"))


# Splits and files


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["rows.jsonl"], {"train": ["rows.jsonl"]}),
        (["a.jsonl", "b/c.jsonl"], {"train": ["a.jsonl", "b/c.jsonl"]}),
        (["train.jsonl", "test.jsonl"], {"train": ["train.jsonl"], "test": ["test.jsonl"]}),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/dpo-00000-of-00001.parquet",
            ],
            {
                "train": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
                "dpo": ["data/dpo-00000-of-00001.parquet"],
            },
        ),
        (["train/x.jsonl", "dev/y.jsonl"], {"train": ["train/x.jsonl"], "validation": ["dev/y.jsonl"]}),
        (["train.jsonl", "test/picture.png", "notes/instruction.md"], {"train": ["train.jsonl"]}),
        ([".hidden/train.jsonl", "__pycache__/train.jsonl", "train.jsonl"], {"train": ["train.jsonl"]}),
        (["a.parquet", "b.parquet", "a.jsonl"], {"train": ["a.parquet", "b.parquet"]}),
        (["data-00000-of-00001.arrow", "state.json", "dataset_info.json"], {"train": ["data-00000-of-00001.arrow"]}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_files_are_dealt_to_splits_by_their_names(
    hub: Hub, refused: Callable[..., str], names: list[str], splits: dict[str, list[str]]
) -> None:
    for split, files in splits.items():
        wanted = Wanted(config=None, split=split, named="dataset=d")
        assert choose(names, b"", wanted, script=("d.py", "")) == files
    with pytest.raises(UserError, match=f"split=none: dataset=d has no such split; it is one of {', '.join(splits)}"):
        choose(names, b"", Wanted(config=None, split="none", named="dataset=d"), script=("d.py", ""))


def test_several_files_are_one_source(hub: Hub, prepared: Callable[..., Any]) -> None:
    shards = {f"data/train-0000{n}-of-00002.parquet": parquet(word) for n, word in enumerate(("first", "second"))}
    hub.add("datasets/user/rows", {**shards, "data/test-00000-of-00001.parquet": parquet("test", 5)})
    found, told = prepared("dataset=user/rows", "limits={user/rows: 30}")
    assert (found, told["rows"]) == ({"first", "second"}, 30)
    assert prepared("dataset=user/rows", "split=test")[0] == {"test"}


def test_a_slice_of_a_split_is_refused_with_what_to_do(hub: Hub, refused: Callable[..., str]) -> None:
    hub.add("datasets/user/rows", {"train.jsonl": lines("rows")})
    said = refused("dataset=user/rows", "split='train[:10]'")
    assert "limits says how many rows" in said
    assert "it is one of train" in said


@pytest.mark.parametrize(
    "kind", ["csv", "tsv", "csv.gz", "arrow", "stream.arrow", "ndjson", "parquet", "json", "jsonl.zst"]
)
def test_every_kind_of_file_gives_the_same_rows(prepared: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    rows = [json.loads(line) for line in lines("words").splitlines()]
    rows[3]["output"] = 'several, "quoted"\nlines\twith tabs'
    rows[4]["output"] = "4"
    (tmp_path / "rows").mkdir()
    store(tmp_path / "rows" / f"train.{kind}", rows)
    assert prepared("dataset=rows")[0] == {"words"}
    assert trained(tmp_path / "out") == sorted(row["output"] for row in rows)


def store(path: Path, rows: list[dict[str, str]]) -> None:
    """Writes rows as the file's name says."""
    table = pa.Table.from_pylist(rows)
    kind = path.name.removeprefix("train.")
    content = io.BytesIO()
    if kind.startswith(("csv", "tsv")):
        text = io.StringIO()
        table_writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
        table_writer.writeheader()
        table_writer.writerows(rows)
        content.write(text.getvalue().encode())
    elif kind.endswith("arrow"):
        with (pa.ipc.new_stream if "stream" in kind else pa.ipc.new_file)(content, table.schema) as stored:
            stored.write_table(table)
    elif kind == "parquet":
        pq.write_table(table, content)
    elif kind == "json":
        content.write(json.dumps(rows).encode())
    else:
        content.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.output_stream(str(path), compression=compression) as file:
        file.write(content.getvalue())


def trained(directory: Path) -> list[str]:
    """The replies of a prepared dataset."""
    tokenizer = ChatTokenizer.load()
    texts = "".join(tokenizer.spell(list(row["ids"])) for row in open_split(directory, "train").to_pylist())
    return sorted(re.findall(r"\[/INST\] (.*?) </s>", texts, re.DOTALL))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train.csv", b"instruction,output\nx,y,z\n"),
        ("train.csv", b'instruction,output\n"x,y\n'),
        ("train.csv", b"\xff\xfe,output\n"),
        ("train.csv.gz", b"no gzip"),
        ("train.arrow", b"no arrow"),
        ("train.parquet", b"no parquet"),
        ("train.json", b"no json"),
    ],
)
def test_a_damaged_file_is_named(refused: Callable[..., str], tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / name).write_bytes(content)
    assert refused("dataset=rows").startswith(f"data: dataset=rows: {name}: it ")


def test_a_bad_row_is_named_by_file_and_line(hub: Hub, refused: Callable[..., str]) -> None:
    hub.add("datasets/user/bad", {"train.jsonl": lines("good", 3) + b'{"instruction": "a", "output": \n'})
    assert "user/bad/train.jsonl, line 4: " in refused("dataset=user/bad")


def test_what_holds_no_rows_says_what_it_holds(hub: Hub, refused: Callable[..., str]) -> None:
    hub.add("datasets/user/rows", {"README.md": b"# Nothing", "train.txt": b"words", ".gitattributes": b""})
    assert "it holds no file of rows, only .txt" in refused("dataset=user/rows")


# Directories


def test_a_file_that_changes_and_keeps_its_time_gives_the_new_rows(
    prepared: Callable[..., Any], data: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "rows").mkdir()
    file = tmp_path / "rows" / "train.jsonl"
    file.write_bytes(lines("apple"))
    time = file.stat().st_mtime_ns
    assert prepared("dataset=rows")[0] == {"apple"}
    assert "nothing was done" in data("dataset=rows").stderr
    file.write_bytes(lines("peach"))
    os.utime(file, ns=(time, time))
    found, told = prepared("dataset=rows")
    assert found == {"peach"}
    assert told["files"] == [{"file": "train.jsonl", "bytes": len(lines("peach")), "sha256": sha256(file)}]


def test_what_fits_no_directory_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_bytes(lines("rows"))
    assert refused("dataset=rows", "revision=main").startswith("data: revision=main: ")
    assert "give files=[rows/train.jsonl]" in refused("dataset=rows/train.jsonl")
    assert "there is no such directory, and it is not a name on a hub" in refused("dataset=no/such/directory")


# Evaluation data and tokenizers


def test_a_leaderboard_task_is_read_at_its_commit(
    hub: Hub, prepared: Callable[..., Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    question = " ".join(f"word{n}" for n in range(GRAM))
    task = json.dumps({"question": question, "answer": "42"}) + "\n"
    gsm8k = hub.add("datasets/openai/gsm8k", {"README.md": card(main__test="t.jsonl"), "t.jsonl": task.encode()})
    (tmp_path / "rows.jsonl").write_bytes(lines("rows") + lines(question, 1))
    settings = ("files=[rows.jsonl]", "contamination=[gsm8k]")
    assert prepared(*settings)[1]["rows"] == 21
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["rows"]["rejected_by_reason"] == {"contaminated": 1}
    assert manifest["contamination"] == [{"task": "gsm8k", "dataset": "openai/gsm8k", "commit": FIRST}]
    gsm8k.commits[SECOND] = {"README.md": card(main__test="t.jsonl"), "t.jsonl": task.encode() * 2}
    gsm8k.cut = {"t.jsonl": 1000}
    assert refused(*settings).startswith("data: contamination=gsm8k: the transfer was cut off")
    gsm8k.commits["3" * 40] = {"README.md": card(other__test="t.jsonl"), "t.jsonl": b'{"text": "x"}'}
    gsm8k.cut = {}
    assert "contamination=gsm8k has no such config; it is one of other" in refused(*settings)


def test_a_tokenizer_is_read_at_one_commit_by_all_processes(
    hub: Hub, run_program: Callable[..., Any], tmp_path: Path
) -> None:
    model = resources.files("mistral_common").joinpath("data", "tokenizer.model.v1").read_bytes()
    hub.add("models/user/base", {"tokenizer.model": model})
    (tmp_path / "rows.jsonl").write_bytes(lines("rows"))
    outcome = run_program("data", "files=[rows.jsonl]", "output=out", "tokenizer=user/base", "workers=2")
    assert outcome.exit_code == 0, outcome.stderr
    assert [path for _, path in hub.requests].count("/api/models/user/base") == 1


def test_a_tokenizer_that_is_cut_off_is_told(hub: Hub, refused: Callable[..., str], tmp_path: Path) -> None:
    hub.add("models/user/base", {"tokenizer.json": b" " * 1000}, cut={"tokenizer.json": 1000})
    (tmp_path / "rows.jsonl").write_bytes(lines("rows"))
    assert refused("files=[rows.jsonl]", "tokenizer=user/base").startswith(
        "data: tokenizer=user/base: there is no such directory, and the transfer was cut off"
    )
