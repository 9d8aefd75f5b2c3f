"""What the user got wrong ends in exit code 2 and one sentence: field, value, remedy."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.program.errors import UserError
from train.config.train import TrainConfig

GOOD = {"instruction": "Add 1 and 2.", "input": "", "output": "3"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The working directory of `run_program`, with the files that the cases below name."""
    (tmp_path / "good.jsonl").write_text("\n".join([json.dumps(GOOD)] * 4))
    (tmp_path / "table.txt").write_text("instruction,output\nx,y\n")
    (tmp_path / "no_reply.jsonl").write_text(json.dumps({"instruction": "Speak."}))
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "some_directory").mkdir()
    adapter = tmp_path / "foreign_adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    for name, tokens in LOADS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"tokens_per_expert": tokens}))
    return tmp_path


LOADS = {
    "load": [[1] * 8] * 2,
    "load_of_4": [[1] * 4] * 2,
    "ragged": [[1] * 8, [1] * 7],
    "negative": [[-1] + [1] * 7] * 2,
    "infinite": [[float("inf")] + [1] * 7] * 2,
    "idle": [[1] * 8, [0] * 8],
    "no_load": None,
}
BY_LOAD = "train dry_run=true lora.experts=by_load"


# The command line → what the sentence has to hold, beside the program's name.
CASES = {
    "data sequence_length=5": ["sequence_length", "no such setting"],
    "data seqlen=5": ["seqlen", "did you mean seq_len?"],
    "train learning_rate=5": ["learning_rate", "no such setting"],
    "train optim.learning_rate=5": ["optim.learning_rate", "no such setting"],
    "train +anything=5": ["anything", "no such setting"],
    "train lora.rnak=5": ["lora.rnak", "did you mean lora.rank?"],
    "inference max_length=5": ["max_length", "did you mean max_new_tokens?"],
    "data seq_len=abc": ["seq_len=abc", "not of type"],
    "data files=good.jsonl": ["files", "good.jsonl"],
    "train lora.rank=abc": ["lora.rank=abc", "not of type"],
    "train lora.rank=1.5": ["lora.rank=1.5", "not of type"],
    "train epochs=null": ["epochs=null"],
    "train optim.eps=0": ["optim.eps=0"],
    "train overwrite=perhaps": ["overwrite=perhaps", "not of type"],
    "inference temperature=hot": ["temperature=hot", "not of type"],
    "data files=[absent.jsonl]": ["files=absent.jsonl", "no such file"],
    "data files=[table.txt]": ["files=table.txt", "not JSON"],
    "data files=[no_reply.jsonl]": ["max_reject_fraction=0.1", "no_reply.jsonl", "line 1", "output"],
    "data files=[empty.json]": ["files", "no rows"],
    "data": ["files", "nothing to prepare"],
    "data good.jsonl": ["good.jsonl"],
    "data files=[good.jsonl": ["files=[good.jsonl"],
    "train quickstart": ["quickstart"],
    "train +lora.bias=0.1": ["lora.bias", "no such setting"],
    "train +model._target_=os.getcwd": ["model._target_", "no such setting"],
    "inference hello": ["hello"],
    "data files=[good.jsonl] dataset=x/y": ["dataset=x/y"],
    "data files=[good.jsonl] seq_len=0": ["seq_len=0", "at least 16"],
    "data files=[good.jsonl] eval_fraction=1": ["eval_fraction=1"],
    "data files=[good.jsonl] eval_fraction=-0.1": ["eval_fraction=-0.1"],
    "data files=[good.jsonl] eval_fraction=nan": ["eval_fraction=nan"],
    "data files=[good.jsonl] max_reject_fraction=2": ["max_reject_fraction=2"],
    "data files=[good.jsonl] markers=drop": ["markers=drop", "one of reject, keep"],
    "data files=[good.jsonl] duplicates=all": ["duplicates=all", "drop_near"],
    "data files=[good.jsonl] near_threshold=0": ["near_threshold=0", "above 0"],
    "data files=[good.jsonl] workers=-1": ["workers=-1", "0 for one a core"],
    "data files=[good.jsonl] task=delete": ["task=delete", "preview"],
    "data files=[good.jsonl] overlong=cut": ["overlong=cut", "split_turns"],
    "data files=[good.jsonl] columns=3": ["columns", "columns={name: value}"],
    "data files=[good.jsonl] columns={output:answer}": [
        "max_reject_fraction=0.1",
        "no field answer, which columns.output names",
    ],
    "data files=[good.jsonl] columns={inptu:context}": ["columns.inptu", "input"],
    "data files=[good.jsonl,good.jsonl]": ["files=good.jsonl", "named twice", "weights"],
    "data files=[good.jsonl] seq_len=2000000000": ["seq_len=2000000000", "at most a million"],
    "data files=[good.jsonl] weights={good.jsonl:1e10}": ["weights.good.jsonl=", "from 0 up"],
    "data files=[good.jsonl] limits={good.jsonl:0}": ["limits.good.jsonl=0", "from 1 up"],
    "data files=[good.jsonl] limits={good.jsonl:x}": ["limits.good.jsonl=x", "not of type"],
    "data files=[good.jsonl] weights={good.jsonl:-1}": ["weights.good.jsonl=-1", "from 0 up"],
    "data files=[good.jsonl] weights={other.jsonl:2}": ["weights.other.jsonl", "one of good.jsonl"],
    "data files=[good.jsonl] contamination=[absent.txt]": ["contamination=absent.txt", "no such file"],
    "data files=[good.jsonl] contamination=[good.jsonl]": ["contamination=good.jsonl", "13 words long", "hellaswag"],
    "data files=[good.jsonl] contamination=[gsm8k]": ["contamination=gsm8k", "openai/gsm8k"],
    "data task=preview output=absent": ["output=absent", "no prepared dataset"],
    "data task=report output=some_directory": ["output=some_directory", "no prepared dataset"],
    "data task=preview rows=0": ["rows=0", "at least 1"],
    "data files=[good.jsonl] tokenizer=absent": ["tokenizer=absent", "no such directory"],
    "data files=[good.jsonl] tokenizer=some_directory": ["tokenizer=some_directory", "neither"],
    "data files=[good.jsonl] output=good.jsonl": ["output=good.jsonl"],
    "data files=[good.jsonl] output=good.jsonl/below": ["output=good.jsonl/below"],
    "data data=nope": ["data=nope", "sample"],
    "train recipe=nope": ["recipe=nope", "quickstart"],
    "train model=nope": ["model=nope", "nano"],
    "train lora=none dataset=absent": ["dataset=absent", "python -m data"],
    "train lora=none dataset=some_directory": ["dataset=some_directory", "python -m data"],
    "train lora.rank=0": ["lora.rank=0", "above 0"],
    "train lora=all": ["lora=all", "by_load"],
    "train lora.method=qlora": ["lora.method=qlora", "none"],
    "train lora.alpha=0": ["lora.alpha=0", "above 0"],
    "train lora.rank_stabilised=maybe": ["lora.rank_stabilised=maybe", "not of type"],
    "train lora.dropout=1": ["lora.dropout=1.0", "below 1"],
    "train lora.dropout=-0.1": ["lora.dropout=-0.1", "from 0"],
    "train lora.dropout=nan": ["lora.dropout=nan", "from 0"],
    "train lora.attention=[k]": ["lora.attention=k:", "k_proj"],
    "train lora.attention=k_proj": ["lora.attention=k_proj: it takes a list", "lora.attention=[k_proj]"],
    "train lora.attention=[k_proj,k_proj]": ["lora.attention", "k_proj is named twice"],
    "train lora.attention=null": ["lora.attention=null: "],
    "train lora.projections=[gate]": ["lora.projections=gate", "gate_up_proj"],
    "train lora.projections=[down_proj,down_proj]": ["lora.projections", "down_proj is named twice"],
    "train lora.attention=[] lora.projections=[]": ["lora.attention=[]"],
    "train lora.attention=[] lora.projections=[] lora.router=trained": ["lora.attention=[]", "trained router"],
    "train lora.router=free": ["lora.router=free", "frozen, trained"],
    "train lora.experts=some": ["lora.experts=some", "by_load"],
    "train lora.experts=3": ["lora.experts=3", "[0,3]"],
    "train lora.experts=null": ["lora.experts=None", "all, by_load"],
    "train lora.experts=[]": ["lora.experts=[]", "lora=attention"],
    "train lora.experts=[1.5]": ["lora.experts=[1.5]", "[0,3]"],
    "train dry_run=true lora.experts=[8]": ["lora.experts=[8]", "no expert 8", "0 to 7"],
    "train dry_run=true lora.experts=[-1]": ["lora.experts=[-1]", "no expert -1", "0 to 7"],
    "train lora.expert_ranks=8": ["lora.expert_ranks=8: it takes a list"],
    "train lora.expert_ranks=[8,-1]": ["lora.expert_ranks=[8, -1]", "0 for no adapter"],
    "train lora.expert_ranks=[0,0]": ["lora.expert_ranks=[0, 0]", "lora=attention"],
    "train lora.expert_ranks=[8,0] lora.experts=[1]": ["lora.expert_ranks=[8, 0]", "lora.experts=[1]", "above 0"],
    "train lora=attention lora.experts=[0]": ["lora.experts=[0]", "no expert has an adapter", "gate_up_proj"],
    "train lora=attention lora.expert_ranks=[8,8]": ["lora.expert_ranks=[8, 8]", "leave it out"],
    "train dry_run=true lora.expert_ranks=[8,8]": ["lora.expert_ranks=[8, 8]", "8 experts a layer"],
    "train lora=by_load": ["lora.load", "task=profile"],
    BY_LOAD: ["lora.load", "task=profile"],
    f"{BY_LOAD} lora.load=load.json": ["lora.budget=0", "above 0"],
    f"{BY_LOAD} lora.load=load.json lora.budget=8191": ["lora.budget=8191", "8,192"],
    f"{BY_LOAD} lora.load=load.json lora.budget=9e3": ["lora.budget=9000.0", "write 9000"],
    f"{BY_LOAD} lora.load=load.json lora.budget=1 lora.by_load=x": ["lora.by_load=x", "ranks, experts"],
    f"{BY_LOAD} lora.load=load.json lora.budget=1 lora.projections=[]": ["lora.projections=[]", "gate_up_proj"],
    f"{BY_LOAD} lora.load=load.json lora.budget=1 lora.expert_ranks=[1]": ["lora.expert_ranks=[1]", "leave it out"],
    f"{BY_LOAD} lora.load=absent.json lora.budget=1": ["lora.load=absent.json", "task=profile"],
    f"{BY_LOAD} lora.load=some_directory lora.budget=1": ["lora.load=some_directory", "task=profile"],
    f"{BY_LOAD} lora.load=good.jsonl lora.budget=1": ["lora.load=good.jsonl", "task=profile"],
    f"{BY_LOAD} lora.load=no_load.json lora.budget=1": ["lora.load=no_load.json", "task=profile"],
    f"{BY_LOAD} lora.load=load_of_4.json lora.budget=1": ["lora.load=load_of_4.json", "2 layers of 4", "2 of 8"],
    f"{BY_LOAD} lora.load=ragged.json lora.budget=1": ["lora.load=ragged.json", "different numbers"],
    f"{BY_LOAD} lora.load=negative.json lora.budget=1": ["lora.load=negative.json", "tokens_per_expert[0][0]"],
    f"{BY_LOAD} lora.load=infinite.json lora.budget=1": ["lora.load=infinite.json", "it holds Infinity"],
    f"{BY_LOAD} lora.load=idle.json lora.budget=1": ["lora.load=idle.json", "no tokens"],
    "train lora.load=load.json": ["lora.load=load.json", "lora.experts=by_load"],
    "train lora.budget=1": ["lora.budget=1", "lora.experts=by_load"],
    "train lora.export_per_expert=perhaps": ["lora.export_per_expert=perhaps", "not of type"],
    "train task=sing": ["task=sing", "profile"],
    "train logging.routing_every=-1": ["logging.routing_every=-1", "0 or more"],
    "train --local_rank=0 recipe=quickstart": ["--local_rank=0", "--no_local_rank"],
    "train optim.lr=-1": ["optim.lr=-1", "above 0"],
    "train optim.lr=nan": ["optim.lr=nan", "above 0"],
    "train optim.lr=inf": ["optim.lr=inf"],
    "train optim.clip=nan": ["optim.clip=nan"],
    "train optim.eps=-1": ["optim.eps=-1"],
    "train optim.weight_decay=-1": ["optim.weight_decay=-1"],
    "train router_aux_loss=nan": ["router_aux_loss=nan"],
    "train seed=-1": ["seed=-1"],
    "train seed=18446744073709551616": ["seed=18446744073709551616", "from 0 to"],
    "train seed=null": ["seed=null", "can't be null"],
    "train optim=null": ["optim=null", "leave it out", "adamw"],
    "train model=null": ["model=null", "nano"],
    "train model.architecture=null": ["model.architecture=null", "can't be null"],
    "train --experimental-rerun job.pickle": ["--experimental-rerun=job.pickle", "pickle"],
    "train --experimental-re=job.pickle": ["--experimental-rerun=job.pickle", "pickle"],
    "train hydra.run.dir=outputs": ["hydra.run.dir=outputs", "leave it out"],
    "train -m hydra.mode=RUN lora=none": ["hydra.mode=RUN", "leave it out"],
    "train --multirun --cfg job lora=none": ["--multirun", "--cfg", "one of them"],
    "train --run --cfg job lora=none": ["--run", "--cfg", "one of them"],
    "train -m lora=none optim.lr=1e-3,1e-4": ["run_dir", "${optim.lr}"],
    "train -m lora=none optim.lr=1e-3,1e-4 run_dir=r": ["run_dir=r", "optim.lr=0.001; optim.lr=0.0001"],
    "train -m lora=none optim.lr=1e-3,1e-4 run_dir=a/../r,r": ["run_dir=r", "two jobs"],
    "train -m lora=none optim.lr=1e-3,-1 run_dir=r${optim.lr}": ["optim.lr=-1", "above 0"],
    "train -m lora=none optim.lr=1e-3,fast run_dir=r${optim.lr}": ["optim.lr=fast", "not of type"],
    "train -m lora=none optim.lr=interval(0,1) run_dir=r": ["optim.lr=interval(0,1)", "optim.lr=1,2,3"],
    "train -m lora=none,nonsense run_dir=r": ["lora=nonsense", "by_load"],
    "data -m files=[good.jsonl] seq_len=64,128": ["--multirun", "data does not sweep"],
    "inference -m prompt=hi temperature=0,1": ["--multirun", "inference does not sweep"],
    "train hardware.threads=-1": ["hardware.threads=-1"],
    "train optim.betas=[0.9]": ["optim.betas=[0.9]"],
    "train epochs=0": ["epochs=0"],
    "train global_batch=-8": ["global_batch=-8"],
    "train max_steps=-1": ["max_steps=-1"],
    "train deepspeed.stage=4": ["deepspeed.stage=4"],
    "train deepspeed=none deepspeed.offload_optimizer=cpu": ["deepspeed.offload_optimizer=cpu", "deepspeed.stage=2"],
    "train deepspeed=zero2 deepspeed.offload_param=cpu": ["deepspeed.offload_param=cpu"],
    "train model.dtype=float16": ["model.dtype=float16", "bfloat16"],
    "train global_batch=3 micro_batch=2 dry_run=true": ["global_batch=3", "global_batch=4"],
    "inference adapter=some_directory": ["prompt"],
    "inference prompt=hi": ["adapter"],
    "inference prompt=hi task=sing": ["task=sing"],
    "inference prompt=hi adapter=absent": ["adapter=absent", "there is no such directory"],
    "inference prompt=hi adapter=some_directory": ["adapter=some_directory", "adapter_config.json"],
    "inference prompt=hi adapter=foreign_adapter": ["adapter=foreign_adapter", "IA3"],
    "inference prompt=hi base=some_directory": ["base=some_directory"],
    "inference prompt=hi base=some_directory top_p=0": ["top_p=0"],
    "inference prompt=hi base=some_directory top_p=0.9": ["top_p=0.9", "temperature=0 takes the likeliest"],
    "inference prompt=hi base=some_directory top_k=5": ["top_k=5", "temperature=0.7"],
    "inference prompt=hi base=some_directory min_p=0.1": ["min_p=0.1", "temperature=0.7"],
    "inference prompt=hi base=some_directory temperature=1 min_p=2": ["min_p=2", "from 0 to 1"],
    "inference prompt=hi base=some_directory min_p=nan": ["min_p=nan", "from 0 to 1"],
    "inference prompt=hi base=some_directory repetition_penalty=0": ["repetition_penalty=0", "above 0"],
    "inference prompt=hi base=some_directory repetition_penalty=nan": ["repetition_penalty=nan", "above 0"],
    "inference prompt=hi base=some_directory history=perhaps": ["history=perhaps", "not of type"],
    "inference prompt=hi base=some_directory max_new_tokens=0": ["max_new_tokens=0"],
    "inference prompt=hi base=some_directory temperature=nan": ["temperature=nan"],
    "inference prompt=hi base=some_directory dtype=int8": ["dtype=int8"],
    "inference prompt=hi base=some_directory stop=[a,'']": ["stop=", "empty"],
    "inference prompt=hi base=some_directory stop=END": ["stop=END: it takes a list; write 'stop=[END]'"],
    "inference prompt=hi base=some_directory markers=drop": ["markers=drop", "reject, keep"],
    "inference prompt=hi prompt_file=good.jsonl base=some_directory": ["prompt_file=good.jsonl", "one of the two"],
    "inference prompt_file=absent.txt base=some_directory": ["prompt_file=absent.txt", "no such file"],
    "inference prompt=[/INST]hi base=some_directory": ["prompt", "[/INST]", "markers=keep"],
    "inference task=batch base=some_directory output=out.jsonl": ["input", "prompts.jsonl"],
    "inference task=batch base=some_directory input=good.jsonl": ["output", "answers.jsonl"],
    "inference task=batch base=some_directory input=absent output=out.jsonl": ["input=absent"],
    "inference task=batch base=some_directory input=good.jsonl output=good.jsonl": ["output=good.jsonl", "overwrite"],
    "inference task=batch base=some_directory input=good.jsonl output=o batch_size=0": ["batch_size=0"],
    "inference task=batch base=some_directory input=good.jsonl output=o batching=none": ["batching=none", "padded"],
    "inference task=batch base=some_directory input=good.jsonl output=o": ["base=some_directory"],
    "inference prompt=hi base=some_directory stop=[{a:1}]": ["stop={'a': 1}", "not a string"],
    "inference prompt=hi base=some_directory temperature=1e-300": ["temperature=1e-300", "smaller than 1e-06"],
    "inference prompt=hi base=some_directory temperature=abc": ["temperature=abc", "Float"],
    "inference prompt=hi base=some_directory seed=-1": ["seed=-1", "from 0"],
    "inference prompt=hi base=some_directory seed=99999999999999999999999": ["seed=9", "4294967295"],
    "inference task=merge base=some_directory output=o": ["adapter", "nothing to merge"],
    "inference task=merge adapter=foreign_adapter output=o dtype=float32": ["dtype=float32", "the base's files"],
    "inference task=merge adapter=foreign_adapter": ["output", "models/merged"],
    "inference task=merge adapter=foreign_adapter output=o": ["adapter=foreign_adapter", "IA3"],
    "inference task=chat": ["adapter", "no model"],
}


@pytest.mark.parametrize("command", CASES)
@pytest.mark.usefixtures("place")
def test_one_sentence_and_exit_code_2(run_program: Callable[..., Any], project_root: Path, command: str) -> None:
    program, *settings = command.split(" ")
    outcome = run_program(program, *settings)

    assert outcome.exit_code == 2, outcome.stderr
    assert outcome.stdout == ""
    assert re.fullmatch(rf"{program}: [\w.-]+(=[^:]*)?: .*\n", outcome.stderr), outcome.stderr  # field, value, the rest
    assert "Traceback" not in outcome.stderr
    remedy = re.sub(r"'[^']*'", "", outcome.stderr.partition(";")[2])
    assert not re.search(r"\w=[\[{]", remedy), remedy  # a shell would read the brackets
    for file in re.findall(r"configs/\S*\.yaml", outcome.stderr):  # a remedy that sends to a file sends to a real one
        assert (project_root / file).is_file(), outcome.stderr
    for part in CASES[command]:
        assert part in outcome.stderr


@pytest.mark.parametrize("line", ["lr: !!python/name:os.getcwd", "lr: [1", "lr: @1"])
def test_a_yaml_file_of_the_users_that_cannot_be_read_is_named(
    run_program: Callable[..., Any], tmp_path: Path, line: str
) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text(f"# @package _global_\noptim:\n  {line}\n")
    outcome = run_program("train", f"--config-dir={tmp_path}", "recipe=own")
    assert outcome.exit_code == 2, outcome.stderr
    assert re.fullmatch(
        r"train: .*/own\.yaml, line [34]: it can't be read \(.*\); write plain YAML there\n", outcome.stderr
    )


def test_a_file_of_settings_that_is_not_utf_8_is_named(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_bytes("# @package _global_\nname: café\n".encode("latin-1"))
    for multirun in ([], ["-m"]):
        outcome = run_program("train", f"--config-dir={tmp_path}", "recipe=own", *multirun)
        assert outcome.exit_code == 2, outcome.stderr
        assert re.fullmatch(
            r"train: .*/own\.yaml: it is not UTF-8 text \(.*\); write plain YAML there\n", outcome.stderr
        )


def test_null_in_a_recipe_names_the_setting(run_program: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "own.yaml").write_text("# @package _global_\noptim: null\n")
    outcome = run_program("train", f"--config-dir={tmp_path}", "recipe=own")
    assert (outcome.exit_code, outcome.stderr) == (
        2,
        "train: optim=null: it can't be null; leave it out, or give a value\n",
    )


def test_null_leaves_a_group_of_files_out(run_program: Callable[..., Any]) -> None:
    outcome = run_program("train", "recipe=null", "lora=none", "dry_run=true")
    assert "base parameters" in outcome.stdout
    assert outcome.exit_code == 2  # the plan's last word
    assert outcome.stderr.startswith("train: dataset=prepared/sample: there is no prepared dataset there;")


def test_a_sweep_inside_a_launcher_is_refused(run_program: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = ["-m", "lora=none", "optim.lr=1e-3,1e-4", "run_dir=r${optim.lr}"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused = run_program("train", *sweep)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("train: --multirun: a launcher has started 2 processes")
    assert refused.stderr.count("\n") == 1


def test_a_base_with_fewer_embeddings_than_the_dataset_has_ids(
    run_program: Callable[..., Any], tmp_path: Path, project_root: Path
) -> None:
    rows = project_root / "data" / "sample" / "identity.jsonl"
    assert run_program("data", f"files=[{rows}]", "output=rows", "seq_len=256").exit_code == 0
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": 31_999}))
    outcome = run_program("train", "dataset=rows", "model.path=base", "run_dir=run")
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert re.fullmatch(
        r"train: model\.path=base: its vocabulary has 31,999 pieces, .* has 32,000; .*\n", outcome.stderr
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("settings", [["prompt="], ["prompt=  "], ["system=be kind"]])
def test_nothing_to_answer(run_program: Callable[..., Any], settings: list[str]) -> None:
    outcome = run_program("inference", "adapter=x", *settings)
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    assert outcome.stderr.startswith("inference: prompt: there is nothing to answer;")
    assert outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("global_batch", "micro_batch", "processes", "nearest"), [(8, 3, 1, 9), (8, 1, 3, 9), (2, 4, 2, 8), (7, 2, 2, 8)]
)
def test_global_batch_of_no_whole_micro_batches(
    global_batch: int, micro_batch: int, processes: int, nearest: int
) -> None:
    config = TrainConfig(global_batch=global_batch, micro_batch=micro_batch)
    with pytest.raises(UserError, match=rf"^global_batch={global_batch}: .* global_batch={nearest}$"):
        config.batch(processes)
    assert TrainConfig(global_batch=nearest, micro_batch=micro_batch).batch(processes).rows == nearest


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 8), (2, 4), (4, 2)])
def test_accumulation_follows_from_the_global_batch(processes: int, accumulation: int) -> None:
    batch = TrainConfig(global_batch=16, micro_batch=2).batch(processes)
    assert (batch.accumulation, batch.rows) == (accumulation, 16)
