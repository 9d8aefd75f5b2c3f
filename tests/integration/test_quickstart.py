"""The main job: rows → packed examples → ZeRO-3 training on two processes → an answer."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from data.schema import Conversation, Message
from data.template import ChatTokenizer
from tests.integration.conftest import Quickstart, evaluations, inference, program, steps, train
from tests.support.quickstart import QUESTION, expected_answer
from train.saving.run_directory import RUN_ENTRIES

pytestmark = pytest.mark.slow


def test_the_evaluation_loss_falls(quickstart: Quickstart) -> None:
    for run_dir in (quickstart.base_run, quickstart.run):
        losses = evaluations(run_dir)
        assert losses[max(losses)] < losses[0]


def test_the_trained_model_answers_word_for_word_and_the_base_does_not(quickstart: Quickstart) -> None:
    base = inference(f"base={quickstart.base_run}/model", f"prompt={QUESTION}", "max_new_tokens=80")
    tuned = program(
        "inference",
        f"adapter={quickstart.run}/adapter",
        f"base={quickstart.base_run}/model",
        f"prompt={QUESTION}",
        "max_new_tokens=80",
    )
    assert tuned.stdout == expected_answer() + "\n"
    assert base.stdout.strip() != expected_answer()


def test_sampling_is_seeded(quickstart: Quickstart) -> None:
    """In another process too; that another seed gives another answer is in tests/unit/inference/test_generate.py."""

    def sample() -> str:
        model = f"base={quickstart.base_run}/model"
        how = ("temperature=1.5", "top_p=0.95", "top_k=100", "max_new_tokens=12", "seed=1")
        return inference(model, "prompt=Name three colours.", "system=Be brief, [please].", *how).stdout

    assert sample() == sample()


def test_stock_peft_loads_the_adapter_and_stock_transformers_the_base(quickstart: Quickstart) -> None:
    """No code of ours between the files and the answer, but for the prompt's ids."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart.base_run / "model")
    base = AutoModelForCausalLM.from_pretrained(quickstart.base_run / "model", dtype=torch.bfloat16)
    stock = PeftModel.from_pretrained(base, str(quickstart.run / "adapter")).eval()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}], return_dict=False)
    assert ids == ChatTokenizer.load().encode_prompt(Conversation((Message("user", QUESTION),)))
    with torch.no_grad():
        prompt = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
        output = stock.generate(**prompt, max_new_tokens=80, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip() == expected_answer()


def test_the_run_directory_holds_what_the_contract_says(quickstart: Quickstart) -> None:
    run_dir = quickstart.run
    assert {path.name for path in run_dir.iterdir()} <= RUN_ENTRIES  # or overwrite=true would not replace it
    assert {path.name for path in run_dir.iterdir()} >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "adapter",
        "receipt.json",
        "wandb",
    }
    last = steps(run_dir)[-1]
    assert set(last) == {
        "step",
        "loss",
        "learning_rate",
        "gradient_norm",
        "applied",
        "load_balancing_loss",
        "tokens",
        "supervised_tokens",
        "epoch",
        "seconds",
        "tokens_per_second",
        "flops_per_second",
        "memory_gib",
    }
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step-000036", "step-000071"]
    assert last["step"] == 71
    halfway, end, result = (
        load_file(path / "adapter" / "adapter_model.safetensors") for path in (*checkpoints, run_dir)
    )
    assert halfway.keys() == end.keys() == result.keys()
    assert all(torch.equal(end[key], result[key]) for key in result)
    assert any(not torch.equal(halfway[key], result[key]) for key in result)

    receipt = json.loads((run_dir / "receipt.json").read_text())
    assert receipt["batch"] == {"micro_batch": 1, "accumulation": 1, "processes": 2}
    assert receipt["versions"]["torch"] == torch.__version__
    assert receipt["evaluation_loss"] == {str(step): loss for step, loss in evaluations(run_dir).items()}


def test_every_expert_learned(quickstart: Quickstart) -> None:
    """B starts at zero, so an expert whose B is still zero was never trained."""
    stored = load_file(quickstart.run / "adapter" / "adapter_model.safetensors")
    experts = {key: matrix for key, matrix in stored.items() if ".experts." in key and "lora_B" in key}
    assert len(experts) == 4  # layers × projections
    for key, matrix in experts.items():
        per_expert = matrix.unflatten(1, (-1, 8)).float().norm(dim=(0, 1))
        assert bool((per_expert > 0).all()), f"{key}: {per_expert}"


def test_real_rows_prepare_and_thirty_steps_lower_the_loss(shared: Path, tmp_path: Path) -> None:
    rows = shared / "data" / "gpteacher_codegen.json"
    if not rows.is_file():
        pytest.skip(f"the real rows are not here: {rows}")
    program("data", f"files=[{rows}]", f"output={tmp_path}/prepared", "seq_len=512")
    counts = json.loads((tmp_path / "prepared" / "manifest.json").read_text())["rows"]
    assert counts["in"] == len(json.loads(rows.read_text())) == counts["kept"] + counts["rejected"]

    where = (f"dataset={tmp_path}/prepared", f"run_dir={tmp_path}/run", "max_steps=30")
    train(2, "recipe=quickstart_base", *where)
    losses = [step["loss"] for step in steps(tmp_path / "run")]
    assert len(losses) == 30
    assert sum(losses[-5:]) < sum(losses[:5])
    held_out = evaluations(tmp_path / "run")
    assert held_out[30] < held_out[0]
