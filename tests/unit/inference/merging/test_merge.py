"""A merged checkpoint is base + adapter, whole, or not there."""

import errno
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from configs.program.errors import UserError, VerificationError
from data.disk import files as disk_files
from data.disk import weights
from data.disk.mixtral_files import pieces
from data.disk.weights import StoredWeights
from data.template import ChatTokenizer
from inference.adapter import Adapter
from inference.config import InferenceConfig
from inference.load import find_adapter, find_base, load, load_tokenizer
from inference.merging import merge as merging
from inference.merging import verify as verification
from inference.merging.merge import merge, write_weights
from inference.merging.verify import (
    compare_logits,
    compare_tensors,
    logits,
    sample_conversations,
    streamed,
    verify,
)
from inference.run import run
from tests.conftest import Live
from tests.support.adapters import KINDS, dequantised, make, make_adapter, make_base
from tests.support.killing import killed_at_every_change

ROOT = Path(__file__).parents[4]
SIZES = {"vocab_size": 32_000}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


@pytest.mark.parametrize("kind", ["all", "attention-only", "rank-stabilised", "low-rank-router", "trained-router"])
def test_the_merged_model_is_the_folded_one_bit_for_bit(tmp_path: Path, kind: str) -> None:
    config = make(tmp_path, kind=kind)
    receipt = merge(config)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").state_dict()
    config.dtype = "bfloat16"
    folded = load(config).model.state_dict()
    assert merged.keys() == folded.keys()
    assert all(torch.equal(merged[name], folded[name]) for name in folded)
    assert files(tmp_path / "out") == {
        "README.md",
        "config.json",
        "generation_config.json",
        "merge.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    }
    assert json.loads((tmp_path / "out" / "merge.json").read_text()) == receipt
    measured = receipt["verification"]
    assert measured["tensors_changed"] + measured["tensors_bit_identical"] == len(tensors(tmp_path / "out"))
    assert measured["logits_difference"] <= 2 * measured["logits_difference_unmerged"] < 0.1
    assert measured["logits_difference_without_adapter"] > 4 * measured["logits_difference"]


def test_however_the_base_is_stored_the_merged_tensors_are_the_same(tmp_path: Path) -> None:
    """One file or several, Mixtral's original names or those of transformers' model: original names come out."""
    forms: dict[str, dict[str, Any]] = {
        "one-file": {},
        "several-files": {"max_shard_size": "20KB"},
        "names-of-the-model": {"save_original_format": False},
    }
    outcomes = {}
    for name, saving in forms.items():
        merge(make(tmp_path / name, **saving))
        outcomes[name] = tensors(tmp_path / name / "out")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(tmp_path / "names-of-the-model" / "base")
    assert len(list((tmp_path / "several-files" / "out").glob("*.safetensors"))) > 3
    top = tmp_path / "one-file-with-an-index"
    config = make(top)
    (top / "base" / "model.safetensors").rename(top / "base" / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors(top / "base"), "model-00001-of-00001.safetensors")}
    (top / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    merge(config)
    outcomes[top.name] = tensors(top / "out")
    first = outcomes["one-file"]
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in first
    for outcome in outcomes.values():
        assert outcome.keys() == first.keys()
        assert all(torch.equal(outcome[name], first[name]) for name in first)
    for name in outcomes:
        MixtralForCausalLM.from_pretrained(tmp_path / name / "out")


def test_the_base_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its headers, for the adapter's fingerprint and for the merge alike."""
    config = make(tmp_path, max_shard_size="2MB")
    fingerprint = StoredWeights(tmp_path / "base", "base").fingerprint
    (tmp_path / "adapter" / "receipt.json").write_text(json.dumps({"base": {"fingerprint": fingerprint}}))
    seen: list[Path] = []
    read = weights.read_header

    def noting(file: Path) -> Any:
        seen.append(file)
        return read(file)

    monkeypatch.setattr(weights, "read_header", noting)
    config.verify = False
    assert merge(config)["base"]["fingerprint"] == fingerprint
    assert sorted(seen) == sorted((tmp_path / "base").glob("*.safetensors"))
    assert len(seen) > 1


def test_a_head_that_is_the_embedding_stays_it(tmp_path: Path) -> None:
    base = make_base(torch.bfloat16, **SIZES, tie_word_embeddings=True)
    base.save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "adapter", base, **KINDS["all"])
    arguments = {"base": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter"), "output": str(tmp_path / "out")}
    merge(InferenceConfig(task="merge", device="cpu", **arguments))
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_float32_base_stays_float32(tmp_path: Path) -> None:
    config = make(tmp_path, torch.float32)
    assert merge(config)["verification"]["logits_difference"] < 1e-5
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.float32}


@pytest.mark.parametrize("kind", ["all", "down-only", "low-rank-router", "trained-head"])
def test_the_logits_are_compared_with_stock_peft(tmp_path: Path, kind: str) -> None:
    """What the verification streams an expert at a time is what stock PEFT computes on the whole model."""
    config = make(tmp_path, kind=kind)
    base = MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    base.set_experts_implementation("eager")
    adapter = Adapter(tmp_path / "adapter", base.config)
    parts = pieces(StoredWeights(tmp_path / "base", "base"), base.config)
    model = streamed(base.config, torch.bfloat16, parts, adapter)
    whole = PeftModel.from_pretrained(base, str(config.adapter)).eval()
    chat = ChatTokenizer.load()
    ours, theirs = (logits(each, chat, sample_conversations()) for each in (model, whole))
    assert torch.equal(ours, theirs)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("saved", ["experts", "mlp", "gate"])
def test_modules_that_an_adapter_holds_in_full_are_merged(tmp_path: Path, saved: str, dtype: torch.dtype) -> None:
    """A layer's experts in PEFT's `modules_to_save`, or its block of experts and router, beside low-rank factors."""
    base = make_base(dtype, **SIZES)
    base.save_pretrained(tmp_path / "base")
    stock = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=[saved])
    paths = {"base": str(tmp_path / "base"), "adapter": str(tmp_path / "adapter"), "output": str(tmp_path / "out")}
    receipt = merge(InferenceConfig(task="merge", device="cpu", **paths))

    merged = MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype, experts_implementation="eager").eval()
    changed = ["experts.gate_up_proj", "experts.down_proj"] if saved != "gate" else []
    changed += ["gate.weight"] if saved != "experts" else []
    after, before = dict(merged.named_parameters()), dict(base.named_parameters())
    trained = {name: tensor for name, tensor in stock.named_parameters() if ".modules_to_save." in name}
    assert len(trained) == 2 * len(changed)
    for name, tensor in trained.items():
        parameter = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
        assert torch.equal(after[parameter], tensor), parameter
        assert not torch.equal(after[parameter], before[parameter])
    of_a_layer = {"experts": 3 * 4, "mlp": 3 * 4 + 1, "gate": 1}[saved] + 1  # w1, w2 and w3; the router; q_proj
    assert receipt["verification"]["tensors_changed"] == 2 * of_a_layer
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs, without = (model(ids).logits for model in (merged, stock, base))
    # In bfloat16 rounding hides a router's part; there the merge's own verification compares with wider sums.
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    assert (ours - theirs).norm() <= tolerance * theirs.norm() < (ours - without).norm()


def damaged(directory: Path, edit: Any) -> None:
    stored = load_file(directory / "model.safetensors")
    edit(stored)
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def test_the_verification_finds_what_is_wrong(tmp_path: Path) -> None:
    config = make(tmp_path, kind="experts-only")
    merge(config)
    base = make_base(torch.bfloat16, **SIZES)
    adapter = Adapter(tmp_path / "adapter", base.config)
    parts = pieces(StoredWeights(tmp_path / "base", "base"), base.config)
    good = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(tmp_path / "base" / "model.safetensors")
    expert = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"

    def one_bit(stored: dict[str, torch.Tensor]) -> None:
        stored["model.norm.weight"].view(torch.int16)[7] ^= 1

    def left_out(stored: dict[str, torch.Tensor]) -> None:
        stored[expert.format(2)] = original[expert.format(2)]

    def mispaired(stored: dict[str, torch.Tensor]) -> None:
        for name in list(stored):
            if ".experts.0." in name:
                other = name.replace(".experts.0.", ".experts.1.")
                stored[name], stored[other] = stored[other].clone(), stored[name].clone()

    for edit, comparison, sentence in (
        (one_bit, compare_tensors, r"model.norm.weight: at \[\d+\] it is \S+ after merging, and \S+ in the base"),
        (left_out, compare_tensors, "experts.2.w1.weight is lost in rounding"),
        (mispaired, compare_logits, "logits differ"),
    ):
        save_file(good, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
        damaged(tmp_path / "out", edit)
        extra = (ChatTokenizer.load(),) if comparison is compare_logits else ()
        with pytest.raises((VerificationError, UserError), match=sentence):
            comparison(tmp_path / "out", parts, adapter, *extra)  # type: ignore[operator]


def test_a_merge_that_is_not_what_it_has_to_be_ends_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """One bit is flipped behind the back of the merge: exit code 1, the tensor, both numbers, and nothing is left."""
    config = make(tmp_path)
    honest = merging.write_weights

    def dishonest(directory: Path, *rest: Any) -> float:
        seconds = honest(directory, *rest)
        stored = load_file(directory / "model.safetensors")
        stored["model.norm.weight"][3] += 0.5
        save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
        return seconds

    monkeypatch.setattr(merging, "write_weights", dishonest)
    capfd.readouterr()  # what transformers says of the base that it has written
    with pytest.raises(SystemExit) as left:
        run(config)
    assert left.value.code == 1
    told = capfd.readouterr().err.strip()
    assert told.startswith("inference: model.norm.weight: at [3] it is 1.5 after merging, and 1.0 in the base")
    assert "\n" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_an_adapter_that_diverged_is_refused(tmp_path: Path, value: float) -> None:
    config = make(tmp_path)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = next(name for name in stored if "k_proj.lora_B" in name)
    stored[name] = torch.full_like(stored[name], value)
    save_file(stored, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    told = r"k_proj\.weight is not finite" if value == 3e38 else rf"its tensor {name} holds numbers that are not finite"
    with pytest.raises(UserError, match=told):
        merge(config)
    assert files(tmp_path) == {"base", "adapter"}


def test_a_failed_verification_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path)
    whole = Adapter.fold

    def half(self: Adapter, parameter: str, weight: torch.Tensor, *rest: Any) -> None:
        if ".q_proj" not in parameter:
            whole(self, parameter, weight, *rest)

    monkeypatch.setattr(Adapter, "fold", half)
    with pytest.raises(UserError, match=r"q_proj.weight is lost in rounding"):
        merge(config)
    assert files(tmp_path) == {"base", "adapter"}


def refusing(number: int) -> Callable[..., int]:
    """A copy_file_range that does nothing: it answers 0, or with that error."""

    def answer(*_: Any) -> int:
        if number:
            raise OSError(number, os.strerror(number))
        return 0

    return answer


@pytest.mark.parametrize("number", [0, errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
@pytest.mark.parametrize("at_first", [0, 3])
def test_where_the_kernel_copies_nothing_the_bytes_are_read_and_written(
    tmp_path: Path, number: int, at_first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start, or after a few bytes; in blocks that are no divisor of what is copied."""
    (tmp_path / "from").write_bytes(bytes(range(256)) * 40)
    by_kernel = os.copy_file_range
    answers = itertools.chain([at_first] if at_first else [], itertools.repeat(0))

    def some(source: int, target: int, size: int, begin: int, at: int) -> int:
        if few := next(answers):
            return by_kernel(source, target, few, begin, at)
        return refusing(number)()

    monkeypatch.setattr(os, "copy_file_range", some)
    monkeypatch.setattr(merging, "COPIED_AT_ONCE", 1000)
    with (tmp_path / "from").open("rb") as source, (tmp_path / "to").open("wb", buffering=0) as target:
        target.write(b"head")
        merging.copy(source.fileno(), 7, target.fileno(), 4, 10_200)
    assert (tmp_path / "to").read_bytes() == b"head" + (tmp_path / "from").read_bytes()[7:10_207]


def test_another_error_of_the_kernels_copy_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refusing(errno.EIO))
    with pytest.raises(UserError, match=rf"output={tmp_path}/out: it can't be written"):
        merge(make(tmp_path))
    assert files(tmp_path) == {"base", "adapter"}


def test_a_file_that_ends_too_early_is_an_error_and_no_loop(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"x" * 10)
    with (
        (tmp_path / "short").open("rb") as source,
        (tmp_path / "to").open("wb", buffering=0) as target,
        pytest.raises(OSError, match="ends 90 bytes too early"),
    ):
        merging.copy(source.fileno(), 0, target.fileno(), 0, 100)


def test_base_and_output_on_different_file_systems_are_merged(tmp_path: Path) -> None:
    """For real: a disk, and memory."""
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own")
    config = make(tmp_path)
    merge(config)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        config.output = f"{elsewhere}/out"
        merge(config)
        there, here = tensors(Path(elsewhere) / "out"), tensors(tmp_path / "out")
        assert there.keys() == here.keys()
        assert all(torch.equal(there[name], here[name]) for name in here)


def test_a_disk_that_takes_no_more_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    config = make(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))  # real writes that really fail
    try:
        with pytest.raises(UserError, match=rf"output={tmp_path}/out: it can't be written"):
            merge(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == {"base", "adapter"}


def test_what_is_there_is_replaced_only_when_told_and_only_by_its_like(tmp_path: Path) -> None:
    config = make(tmp_path)
    merge(config)
    with pytest.raises(UserError, match="a merged model is there"):
        merge(config)
    config.overwrite = True
    merge(config)
    (tmp_path / "papers").mkdir()
    (tmp_path / "papers" / "thesis.tex").touch()
    config.output = str(tmp_path / "papers")
    with pytest.raises(UserError, match="no merge wrote"):
        merge(config)
    config.output = str(tmp_path)
    with pytest.raises(UserError, match="holds the base"):
        merge(config)
    assert files(tmp_path) == {"base", "adapter", "out", "papers"}


def test_what_a_user_put_into_a_merged_model_is_not_lost(tmp_path: Path) -> None:
    config = make(tmp_path)
    (tmp_path / "out").mkdir()  # an empty directory is as good as none
    merge(config)
    (tmp_path / "out" / "scores.json").write_text("{}")
    config.overwrite = True
    with pytest.raises(UserError, match=r"scores\.json is in it"):
        merge(config)
    assert (tmp_path / "out" / "scores.json").is_file()


def test_what_a_killed_run_left_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path)
    (tmp_path / ".out.99999.tmp").mkdir()
    (tmp_path / ".out.99999.tmp" / "model.safetensors").write_bytes(bytes(1000))
    seen: list[set[str]] = []
    real = shutil.disk_usage

    def noting(path: Path) -> Any:
        seen.append(files(tmp_path))
        return real(path)

    monkeypatch.setattr(shutil, "disk_usage", noting)
    merge(config)
    assert [".out.99999.tmp" in names for names in seen] == [False]
    assert files(tmp_path) == {"base", "adapter", "out"}


def test_too_small_a_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make(tmp_path)
    usage = type("Usage", (), {"free": 10_000})
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="make room"):
        merge(config)
    assert files(tmp_path) == {"base", "adapter"}


@pytest.mark.parametrize("edit", ["quantised", "missing", "foreign"])
def test_a_base_that_is_none_is_refused(tmp_path: Path, edit: str) -> None:
    config = make(tmp_path)

    def change(stored: dict[str, torch.Tensor]) -> None:
        name = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
        if edit == "quantised":
            stored[name] = stored[name].to(torch.float8_e4m3fn)
        elif edit == "missing":
            del stored[name]
        else:
            stored["model.layers.0.bias"] = torch.zeros(3)

    damaged(tmp_path / "base", change)
    with pytest.raises(UserError, match=rf"^base={tmp_path}/base: its tensor model\.layers\.0\."):
        merge(config)


def test_the_card_says_what_a_reader_needs(tmp_path: Path) -> None:
    config = make(tmp_path)
    (tmp_path / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    merge(config)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card
    for part in (
        "## Use",
        "## Prompt format",
        "## Base",
        "## Data",
        "## Recipe",
        "## Licence",
        "LoRA rank 4, alpha 12",
    ):
        assert part in card
    assert str(tmp_path) not in card.replace(f"{tmp_path.name}/base", "")
    told = (tmp_path / "out" / "merge.json").read_text()
    assert str(tmp_path) not in told
    assert not re.search(r'"/|=/', told)  # neither the base's and adapter's paths nor those of the command


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """A base of 160 MB in one file, merged in a process of its own after a small one has loaded the libraries."""
    small, large = tmp_path / "small", tmp_path / "large"
    for top, hidden in ((small, 32), (large, 512)):
        base = make_base(torch.bfloat16, hidden_size=hidden, intermediate_size=1024, vocab_size=32_000)
        base.save_pretrained(top / "base")
        make_adapter(top / "adapter", base, **KINDS["all"])
    program = """
import resource, sys
from pathlib import Path
from transformers import AutoConfig
from data.disk.mixtral_files import pieces
from data.disk.weights import StoredWeights
from inference.adapter import Adapter
from inference.merging.merge import write_weights
for top in map(Path, sys.argv[1:]):
    (top / "out").mkdir()
    architecture = AutoConfig.from_pretrained(top / "base")
    parts = pieces(StoredWeights(top / "base", "base"), architecture)
    write_weights(top / "out", parts, Adapter(top / "adapter", architecture))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    command = [sys.executable, "-c", program, str(small), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    before, after = map(int, done.stdout.split())
    with safe_open(large / "out" / "model.safetensors", "pt") as stored:
        assert len(list(stored.keys())) > 20
    assert (large / "out" / "model.safetensors").stat().st_size > 90e6
    assert after - before < 40e6


def test_verifying_takes_less_memory_than_a_file_and_a_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are large here against everything else, as they are in Mixtral-8x7B."""
    monkeypatch.setattr(verification, "PROMPTS", 2)
    base = make_base(torch.bfloat16, vocab_size=32_000, hidden_size=256, intermediate_size=8192, num_local_experts=8)
    base.save_pretrained(tmp_path / "base", max_shard_size="30MB")
    make_adapter(tmp_path / "adapter", base, **KINDS["all"])
    parts = pieces(StoredWeights(tmp_path / "base", "base"), base.config)
    adapter = Adapter(tmp_path / "adapter", base.config)
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", parts, adapter)
    base.config.save_pretrained(tmp_path / "out")
    layer = sum(piece.size for piece in parts if ".layers.0." in piece.parameter)
    largest_file = max(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    del base
    with Live() as live:
        verify(tmp_path / "out", parts, adapter, ChatTokenizer.load())
    assert live.peak > 32_000 * 256 * 4  # the head alone in float32: what is counted is what is there
    assert live.peak < largest_file + layer


# Killed at every change

FUNCTIONS = {merging.__file__: {"merge"}, disk_files.__file__: {"staging", "take_place", "_exchange"}}
"""Those that decide over files."""


def every_change(top: Path) -> int:
    """Merges over and over, killed one change of the disk later each time; returns how many there are.

    First where nothing is, then over the merger of another adapter.
    """
    output = top / "merged" / "out"
    output.parent.mkdir()
    config = InferenceConfig(
        task="merge", base=str(top / "base"), output=str(output), device="cpu", overwrite=True, verify=False
    )
    wanted = {str(top / name): (top / f"{name}.safetensors").read_bytes() for name in ("first", "second")}

    def is_traced(frame: FrameType) -> bool:
        return frame.f_code.co_name in FUNCTIONS.get(frame.f_code.co_filename, ())

    of_name = {Path(path).name: content for path, content in wanted.items()}
    kills = 0
    for name in wanted:
        config.adapter = name
        # What is only read is read once, and not by each of the processes that are killed.
        base = find_base(config)
        adapter, tokenizer = find_adapter(config, base), load_tokenizer(base)
        read = {"find_base": base, "find_adapter": adapter, "load_tokenizer": tokenizer}
        for function, outcome in read.items():
            setattr(merging, function, lambda *_, outcome=outcome: outcome)
        # An absolute path is nobody else's: merge.json holds its last name.
        before = json.loads((output / "merge.json").read_text())["adapter"]["path"] if output.exists() else None
        for was_killed in killed_at_every_change(output.parent, is_traced, lambda _: merge(config)):
            assert before is None or output.exists()
            if output.exists():
                receipt = json.loads((output / "merge.json").read_text())
                assert receipt["adapter"]["path"] in (before, Path(name).name)
                before = receipt["adapter"]["path"]
                assert files(output) == set(receipt["files"])
                assert (output / "model.safetensors").read_bytes() == of_name[before]
            kills += was_killed
        assert [path.name for path in output.parent.iterdir()] == ["out"]
    return kills


def test_killing_it_at_every_change_leaves_a_whole_model_or_none(tmp_path: Path) -> None:
    base = make_base(torch.bfloat16, **SIZES, num_local_experts=2)
    base.save_pretrained(tmp_path / "base")
    for name, kind in (("first", "all"), ("second", "experts-only")):
        make_adapter(tmp_path / name, base, **KINDS[kind])
        arguments = {"base": str(tmp_path / "base"), "adapter": str(tmp_path / name), "output": str(tmp_path / "whole")}
        merge(InferenceConfig(task="merge", device="cpu", overwrite=True, verify=False, **arguments))
        shutil.copy(tmp_path / "whole" / "model.safetensors", tmp_path / f"{name}.safetensors")
    # In a process without threads, as it forks.
    command = [sys.executable, "-m", "tests.unit.inference.merging.test_merge", str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) > 20


if __name__ == "__main__":
    print(every_change(Path(sys.argv[1])))


@pytest.mark.parametrize("name", ["models/[a]", "models/[/b]"])
def test_names_that_look_like_markup_are_printed_whole(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    merging._show(Path(name), {"merged": {"bytes": 10, "seconds": 1.0}, "verification": None})
    assert name in capsys.readouterr().err


def test_a_merge_says_that_its_adapter_was_trained_on_four_bits_and_how_far_it_is_from_that(tmp_path: Path) -> None:
    config = make(tmp_path)
    (tmp_path / "adapter" / "receipt.json").write_text(json.dumps({"base": {"weights": "nf4"}}))
    receipt = merge(config)
    assert receipt["adapter"]["trained_on_base_in"] == "nf4"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "was trained on this base quantised to nf4, and is merged into its 16 bits here." in card
    assert f"they differ by {receipt['verification']['logits_difference_from_training']:.1e}." in card
    # as stock PEFT has it on the dequantised base
    tokenizer = ChatTokenizer.load(str(tmp_path / "out"))
    base = dequantised(MixtralForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    trained = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    merged = MixtralForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16).eval()
    exact, ours = (logits(model, tokenizer, sample_conversations()).double() for model in (trained, merged))
    difference = ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).median()
    assert receipt["verification"]["logits_difference_from_training"] == pytest.approx(float(difference), rel=0.02)
