"""What a base's config.json may decide: sizes, and neither code nor a quantisation that no one can compute with."""

import ast
import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.program.errors import UserError
from data.disk.architecture import exported, read_architecture
from data.disk.formats import sizes
from data.disk.weights import INDEX, SINGLE
from inference.config import InferenceConfig
from inference.load import find_base, load_base
from tests.support.adapters import make_base
from train.config.model import ModelConfig
from train.model import mixtral

CODE = ("data", "train", "inference", "configs", "scripts")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def say(base: Path, **settings: Any) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def asked(base: Path) -> InferenceConfig:
    return InferenceConfig(base=str(base), device="cpu", dtype="float32")


def load(base: Path) -> Any:
    return load_base(find_base(asked(base)), asked(base))


METHODS = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp8": {"quant_method": "fp8"},
    "mxfp4": {"quant_method": "mxfp4"},
    "unheard_of": {"quant_method": "unheard_of"},
    "by an unknown method": {"bits": 3},
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("program", ["inference", "train", "plan"])
def test_a_quantised_base_is_refused_before_its_weights(
    base: Path, run_program: Any, method: str, program: str
) -> None:
    """All programs say which method it is and what works instead; the weights aren't even there."""
    say(base, quantization_config=METHODS[method])
    (base / SINGLE).unlink()
    if program == "plan":
        outcome = run_program("train", "dry_run=true", "recipe=quickstart", f"model.path={base}")
        assert outcome.exit_code == 2
        told = outcome.stderr
    else:
        with pytest.raises(UserError) as refused:
            find_base(asked(base)) if program == "inference" else mixtral.pretrained(ModelConfig(path=str(base)))
        told = str(refused.value)
    setting = f"base={base}" if program == "inference" else f"model.path={base}"
    assert f"{setting}: it is quantised ({method}, says quantization_config in its config.json)" in told
    assert "bfloat16, float16 and float32" in told


def test_training_says_so_before_it_hashes_a_weight(base: Path, run_program: Any, project_root: Path) -> None:
    """The weights aren't even there, and no process has met another."""
    rows = project_root / "data" / "sample" / "identity.jsonl"
    assert run_program("data", f"files=[{rows}]", "output=prepared", "seq_len=256", "workers=1").exit_code == 0
    say(base, quantization_config=METHODS["awq"])
    (base / SINGLE).unlink()
    outcome = run_program("train", "run_dir=run", f"model.path={base}", "dataset=prepared", "hardware=cpu")
    assert outcome.exit_code == 2
    assert f"model.path={base}: it is quantised (awq" in outcome.stderr


def test_an_empty_quantisation_is_none(base: Path) -> None:
    say(base, quantization_config=None)
    load(base)


@pytest.mark.parametrize("kind", ["own", "mixtral"])
def test_a_bases_own_code_is_neither_offered_nor_run(base: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """In a terminal transformers would ask whether to run it, and someone may answer with yes."""
    said = base / "EXECUTED"
    (base / "own.py").write_text(
        f"open({str(said)!r}, 'w').close()\nfrom transformers import MixtralConfig\n"
        "class Own(MixtralConfig):\n    model_type = 'own'\n"
    )
    say(base, model_type=kind, auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"})
    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda question="": questions.append(question) or "y")
    for reading in (load, lambda base: mixtral.pretrained(ModelConfig(path=str(base), attention="sdpa"))):
        if kind == "own":
            with pytest.raises(UserError, match="it is an own model"):
                reading(base)
        else:
            reading(base)
    assert not questions
    assert not said.exists()


def test_no_call_leaves_it_to_transformers_whether_foreign_code_runs(project_root: Path) -> None:
    """Read from the source: every `from_pretrained` of transformers says trust_remote_code=False."""
    found = 0
    for file in (file for package in CODE for file in (project_root / package).rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
                continue
            if call.func.attr not in ("from_pretrained", "from_config", "pipeline"):
                continue
            if ast.unparse(call.func.value) in ("PeftModel", "MixtralConfig"):  # neither knows other code than its own
                continue
            said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert said.get("trust_remote_code") == "False", f"{file}, line {call.lineno}"
            found += 1
    assert found >= 2


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation_internal", "_attn_implementation"])
@pytest.mark.parametrize("value", ["someone/kernel", "flash_attention_2", {"": "someone/kernel"}])
def test_the_attention_that_a_base_names_reaches_no_loader_of_kernels(base: Path, name: str, value: Any) -> None:
    say(base, **{name: value}, experts_implementation="someone/kernel")
    assert load(base).config._attn_implementation == "sdpa"
    assert read_architecture(str(base), None, "base")._experts_implementation is None
    trained = mixtral.pretrained(ModelConfig(path=str(base), attention="eager", dtype="float32"))
    assert trained.config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["../outside.safetensors", "/dev/zero", "sub/inside.safetensors", 5])
def test_an_index_names_files_of_the_directory_alone(base: Path, name: Any) -> None:
    index = {"weight_map": dict.fromkeys(["model.norm.weight", "lm_head.weight"], name)}
    (base / INDEX).write_text(json.dumps(index))
    (base.parent / "outside.safetensors").write_bytes((base / SINGLE).read_bytes())
    (base / SINGLE).unlink()
    readings = {
        f"base={base}": lambda: load(base),
        f"model.path={base}": lambda: mixtral.pretrained(ModelConfig(path=str(base), attention="sdpa")),
    }
    for named, reading in readings.items():
        with pytest.raises(UserError, match=f"^{named}: its {INDEX}"):
            reading()


def test_what_is_exported_names_no_other_code_and_no_quantisation() -> None:
    settings = {"model_type": "mixtral", "hidden_size": 8, "auto_map": {}, "attn_implementation": "x"}
    assert exported(settings | {"quantization_config": {"a": 1}, "use_cache": False}) == {
        "model_type": "mixtral",
        "hidden_size": 8,
        "use_cache": True,
    }
    assert "use_cache" not in exported(settings)


@pytest.mark.parametrize(
    "settings", [{"hidden_size": "x"}, {"id2label": 5}, {"dtype": "x"}, {"quantization_config": 5}]
)
def test_values_of_another_kind_end_in_a_sentence(base: Path, settings: dict[str, Any]) -> None:
    say(base, **settings)
    with pytest.raises(UserError, match=r"^base: "):
        read_architecture(str(base), None, "base")


UNFIT = {
    "many layers": ({"num_hidden_layers": 10_000_000}, "num_hidden_layers: expected int <= 1024"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads: expected int >= 1"),
    "no width": ({"hidden_size": 0}, "hidden_size: expected int >= 1"),
    "fraction": ({"num_local_experts": 4.5}, "num_local_experts: expected int, got float"),
    "truth": ({"num_key_value_heads": True}, "num_key_value_heads: expected int"),
    "chosen": ({"num_experts_per_tok": 5}, "5 can't be chosen from 4 num_local_experts"),
    "heads": ({"num_attention_heads": 5}, "32 is not a multiple of the 5 num_attention_heads"),
    "groups": ({"num_key_value_heads": 3}, "4 is not a multiple of the 3 num_key_value_heads"),
    "odd": ({"head_dim": 7}, "head_dim: 7 is odd"),
    "labels": ({"label2id": {"x": "y"}}, "label2id"),
    "rope": ({"rope_parameters": 5}, "rope_parameters: expected"),
    "theta": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": "I64"}},
        "rope_parameters.rope_theta: expected",
    ),
    "factors": ({"rope_scaling": {"rope_type": "longrope", "long_factor": 5}}, "rope_scaling.long_factor: expected"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_sizes_are_bounded_and_fit_each_other(base: Path, case: str) -> None:
    """Before transformers sees them, by field; a base of ten million layers was built until the memory ended."""
    settings, told = UNFIT[case]
    say(base, **settings)
    with pytest.raises(UserError) as refused:
        read_architecture(str(base), None, "base")
    assert str(refused.value).startswith("base: its config.json doesn't describe a Mixtral (")
    assert told in str(refused.value)


@pytest.mark.parametrize("settings", [{"num_hidden_layers": 900}, {"num_local_experts": 512}, {"vocab_size": 1 << 23}])
def test_a_base_that_asks_for_more_than_its_files_hold_gets_no_memory(base: Path, settings: dict[str, Any]) -> None:
    """transformers would allocate all of it first."""
    say(base, **settings)
    with pytest.raises(UserError, match=f"^base={base}: its tensor .* (is missing|asks for)"):
        load(base)


@pytest.mark.parametrize("content", ["[]", "5", '{"max_length": "x"}', "[" * 100_000])
def test_what_a_base_recommends_for_generation_is_not_read(base: Path, content: str) -> None:
    (base / "generation_config.json").write_text(content)
    assert load(base).generation_config.max_length is None or load(base).generation_config.max_length > 0


@pytest.mark.timeout(60)
def test_a_pipe_beside_the_weights_is_waited_for_by_nobody(base: Path) -> None:
    (base / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(base / "generation_config.json")
    load(base)
    (base / "config.json").unlink()
    os.mkfifo(base / "config.json")
    with pytest.raises(UserError, match="not a regular file"):
        load(base)


def test_an_adapter_within_a_base_is_not_loaded_on_top(base: Path) -> None:
    """transformers would, without a word."""
    (base / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json; move the adapter"):
        mixtral.pretrained(ModelConfig(path=str(base), attention="sdpa"))


def test_where_the_weights_lie_is_not_for_the_config_to_say(base: Path) -> None:
    say(base, transformers_weights="elsewhere.safetensors", fusion_config={"x": 1}, distributed_config={"x": 1})
    assert torch.equal(load(base).lm_head.weight, load(base).lm_head.weight)
    assert "transformers_weights" not in exported(json.loads((base / "config.json").read_text()))


def test_a_configuration_of_megabytes_is_not_parsed(base: Path) -> None:
    say(base, comment="x" * sizes.SETTINGS)
    with pytest.raises(UserError, match=r"^base: its config.json can't be read \(it is larger than 4 MiB\)"):
        read_architecture(str(base), None, "base")


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "5", "", "{"])
def test_a_configuration_that_is_none_ends_in_a_sentence(base: Path, content: str) -> None:
    (base / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"^base: "):
        read_architecture(str(base), None, "base")
