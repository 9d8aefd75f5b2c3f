"""scripts/launch: mistakes end in one sentence, settings pass as they stand, and Slurm's job comes back when it should.

`deepspeed`, `srun` and `scontrol` are stand-ins here; tests/integration has the real launchers.
"""

import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCHERS = ("per_node.sh", "hostfile.sh", "slurm.sbatch")
NODE = {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node-0", "GPUS_PER_NODE": "8"}
JOB = {
    "SLURM_JOB_ID": "4711",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_NODELIST": "node-[3-4]",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_CPUS_PER_TASK": "3",
}
# Starts each task as srun does, and answers with the highest of their exit codes.
SRUN = """
for option in "$@"; do [ "$option" = bash ] && break; echo "$option" >>"$NOTES/srun"; shift; done
highest=0
for task in $(seq 0 $((SLURM_NTASKS - 1))); do
    code=0
    SLURM_PROCID="$task" SLURM_LOCALID=$((task % SLURM_NTASKS_PER_NODE)) "$@" || code=$?
    [ "$code" -le "$highest" ] || highest="$code"
done
exit "$highest"
"""
SCONTROL = """
case "$1 $2" in
"show hostnames") printf 'node-3\\nnode-4\\n' ;;
"show job") echo "   JobState=${STATE:-RUNNING} Reason=None Dependency=(null)" ;;
*) echo "$*" >>"$NOTES/scontrol" ;;
esac
"""
# Answers as if all of a node's processes had done their work.
DEEPSPEED = """
printf '%s\\n' "$@"
[ -z "${LAUNCH_FINISHED:-}" ] || (cd "$LAUNCH_FINISHED" && touch 0 1 2 3 4 5 6 7)
case " $* " in *" --force_multi "*) pdsh ;; esac
"""
PYTHON = """
echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT" >>"$NOTES/tasks"
echo "$LAUNCHER_PID" >>"$NOTES/launchers"
printf '%s\\n' "$@" >"$NOTES/arguments"
[ -z "${BUSY:-}" ] || { touch "$NOTES/busy"; sleep 1; }
[ "$RANK" = 1 ] && exit "${CODE_OF_1:-$CODE}"
exit "$CODE"
"""


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """bin/ with programs that note how they were called."""
    scripts = {"deepspeed": DEEPSPEED, "srun": SRUN, "scontrol": SCONTROL, "python": PYTHON, "pdsh": ""}
    (tmp_path / "bin").mkdir()
    for name, script in (scripts | {"ssh": "exit 255"}).items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
    return tmp_path


def environment(stand_ins: Path, variables: dict[str, str]) -> dict[str, str]:
    return {"PATH": f"{stand_ins}/bin:{os.environ['PATH']}", "NOTES": str(stand_ins), **variables}


def launch(
    stand_ins: Path, script: str, *arguments: str, expect: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        ("bash", str(ROOT / "scripts/launch" / script), *arguments),
        cwd=stand_ins,
        env=environment(stand_ins, variables),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def notes(stand_ins: Path, name: str) -> list[str]:
    path = stand_ins / name
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("script", [*sorted((ROOT / "scripts").rglob("*.sh")), ROOT / "scripts/launch/slurm.sbatch"])
def test_bash_can_read_it(script: Path) -> None:
    assert subprocess.run(("bash", "-n", str(script)), check=False).returncode == 0


@pytest.mark.parametrize("script", LAUNCHERS)
def test_help_says_how(stand_ins: Path, script: str) -> None:
    done = launch(stand_ins, script, "--help")
    assert f"scripts/launch/{script} " in done.stdout
    assert "SETTING=VALUE" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize(
    ("script", "variables", "arguments", "words"),
    [
        ("per_node.sh", {**NODE, "NODES": ""}, ["run_dir=r"], "NODES --nodes"),
        ("per_node.sh", {**NODE, "NODE_RANK": ""}, ["run_dir=r"], "NODE_RANK --node-rank"),
        ("per_node.sh", {**NODE, "NODE_RANK": "2"}, ["run_dir=r"], "NODE_RANK=2 at most 1"),
        ("per_node.sh", {**NODE, "NODE_RANK": "-1"}, ["run_dir=r"], "NODE_RANK=-1 whole number"),
        ("per_node.sh", {**NODE, "MASTER_ADDR": ""}, ["run_dir=r"], "MASTER_ADDR --master-addr"),
        ("per_node.sh", {**NODE, "NODES": "1"}, ["run_dir=r"], "NODE_RANK=1 at most 0"),
        ("per_node.sh", {**NODE, "NODES": "one"}, ["run_dir=r"], "NODES=one whole number"),
        ("per_node.sh", {**NODE, "GPUS_PER_NODE": "0"}, ["run_dir=r"], "GPUS_PER_NODE=0"),
        ("per_node.sh", NODE, ["--nodes"], "--nodes value"),
        ("per_node.sh", NODE, ["--node", "2"], "--node no such option"),
        ("per_node.sh", NODE, ["recipe=quickstart"], "run_dir run_dir=runs/NAME"),
        ("hostfile.sh", {}, [], "HOSTFILE hostfile.example"),
        ("hostfile.sh", {}, ["nothing", "run_dir=r"], "HOSTFILE=nothing hostfile.example"),
        ("hostfile.sh", {}, ["bad", "run_dir=r"], 'bad "node-0 slots=8"'),
        ("hostfile.sh", {}, ["empty", "run_dir=r"], "empty no node"),
        ("hostfile.sh", {}, ["good", "recipe=quickstart"], "run_dir run_dir=runs/NAME"),
        ("hostfile.sh", {}, ["good", "run_dir=r"], "node-0 ssh password"),
        ("slurm.sbatch", {}, ["run_dir=r"], "sbatch scripts/launch/slurm.sbatch"),
        ("slurm.sbatch", {**JOB, "SLURM_SUBMIT_DIR": "/"}, ["run_dir=r"], "checkout's root"),
        ("slurm.sbatch", {**JOB, "SLURM_NTASKS_PER_NODE": ""}, ["run_dir=r"], "--ntasks-per-node"),
        ("slurm.sbatch", {**JOB, "MAX_REQUEUES": "many"}, ["run_dir=r"], "MAX_REQUEUES=many"),
        ("slurm.sbatch", JOB, ["recipe=quickstart"], "run_dir run_dir=runs/NAME"),
        ("slurm.sbatch", JOB, ["run_dir=r", "overwrite=true"], "overwrite=true start over"),
        ("per_node.sh", NODE, ["run_dir=r", "++overwrite=True"], "++overwrite=True start over"),
        ("hostfile.sh", {}, ["good", "overwrite=yes", "run_dir=r"], "overwrite=yes start over"),
    ],
)
def test_a_mistake_is_told_in_one_sentence(
    stand_ins: Path, script: str, variables: dict[str, str], arguments: list[str], words: str
) -> None:
    (stand_ins / "bad").write_text("node-0\n")
    (stand_ins / "empty").write_text("# node-0 slots=8\n")
    (stand_ins / "good").write_text("node-0 slots=8\n")
    (line,) = launch(stand_ins, script, *arguments, expect=2, **variables).stderr.splitlines()
    assert line.startswith(f"{script}: ")
    assert all(word in line for word in words.split())
    assert not notes(stand_ins, "tasks")


SETTINGS = ["recipe=quickstart", "run_dir=runs/${name}", "lora.experts=[0,3]", 'dataset={a: it\'s "$b"}', "x=100%n;&"]


@pytest.mark.parametrize(
    ("variables", "arguments"),
    [
        (NODE, []),
        ({}, ["--nodes", "2", "--node-rank", "1", "--master-addr", "node-0", "--gpus-per-node", "8"]),
        ({**NODE, "NODE_RANK": "", "JOB_COMPLETION_INDEX": "1"}, []),
    ],
    ids=["environment", "options", "Indexed Job"],
)
def test_per_node_starts_deepspeed_with_the_settings_as_they_stand(
    stand_ins: Path, variables: dict[str, str], arguments: list[str]
) -> None:
    started = launch(stand_ins, "per_node.sh", *arguments, *SETTINGS, **variables).stdout.splitlines()
    at = started.index("--hostfile")
    assert started[at + 2 :] == [
        *("--no_ssh", "--node_rank", "1", "--master_addr", "node-0", "--master_port", "29500"),
        *("--no_local_rank", "--module", "train", *SETTINGS),
    ]
    assert not Path(started[at + 1]).exists()  # the hostfile is gone with the run
    printed = launch(stand_ins, "per_node.sh", "--print", *arguments, *SETTINGS, **variables).stdout.splitlines()
    assert printed[:2] == ["node-0 slots=8", "node-1 slots=8"]
    assert shlex.split(printed[2])[-len(SETTINGS) :] == SETTINGS


@pytest.mark.parametrize("variables", [{}, {"NODE_RANK": "0", "MASTER_ADDR": "localhost"}], ids=["unset", "given"])
def test_one_node_needs_neither_number_nor_address(stand_ins: Path, variables: dict[str, str]) -> None:
    options = ("--nodes", "1", "--gpus-per-node", "2", "--print")
    printed = launch(stand_ins, "per_node.sh", *options, *SETTINGS, **variables).stdout.splitlines()
    words = shlex.split(printed[1])
    assert printed[0] == "node-0 slots=2"
    assert words[words.index("--node_rank") + 1] == "0"
    assert words[words.index("--master_addr") + 1] == "localhost"
    assert words[-len(SETTINGS) :] == SETTINGS


def test_without_a_gpu_the_number_of_processes_is_asked_for(stand_ins: Path) -> None:
    (stand_ins / "bin" / "python").write_text("#!/usr/bin/env bash\necho 0\n")
    done = launch(stand_ins, "per_node.sh", "--nodes", "1", "--print", "run_dir=r", expect=2)
    (line,) = done.stderr.splitlines()
    assert all(word in line for word in ("no GPU here", "--gpus-per-node"))
    assert not done.stdout


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("node-0 slots=8\nnode-0 slots=8\n", "node-0 a second time"),
        ("node-0 slots=0\n", "slots=0 no number"),
        ("node-0 slots=8x\n", "slots=8x no number"),
        ("node-0 slots=\n", "slots= no number"),
        ("node-0:22 slots=8\n", "node-0:22 a port"),
        ("node-[0-1] slots=8\n", "node-[0-1] no name of one node"),
        ("node-0,node-1 slots=8\n", "node-0,node-1 no name of one node"),
        ("\ufeffnode-0 slots=8\n", "byte order mark"),
        ("\ufeff# nodes\nnode-0 slots=8\n", "byte order mark"),
        ("node-0 slots=8\nnode-1 slots=4\n", "slots=4 the 8 before as many"),
    ],
)
def test_a_hostfile_that_deepspeed_would_misread_is_refused(stand_ins: Path, content: str, words: str) -> None:
    (stand_ins / "nodes").write_text(content, encoding="utf-8")
    done = launch(stand_ins, "hostfile.sh", "--print", "nodes", "run_dir=r", expect=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"hostfile.sh: {stand_ins}/nodes: ")
    assert all(word in line for word in words.split())
    assert not done.stdout


def test_a_hostfile_may_hold_comments_spaces_and_the_line_ends_of_windows(stand_ins: Path) -> None:
    (stand_ins / "nodes").write_bytes(b"# two\r\n  user@node-0 slots=8 # eight\r\n\r\n\tnode_1.lan\tslots=08\r\n")
    (stand_ins / "bin" / "ssh").write_text('#!/usr/bin/env bash\necho "${@: -2}" >>"$NOTES/ssh"\n')
    launch(stand_ins, "hostfile.sh", "nodes", "run_dir=r")
    assert notes(stand_ins, "ssh") == ["user@node-0 true", "node_1.lan true"]


def test_hostfile_settings_come_out_of_the_nodes_shell_as_they_went_in(stand_ins: Path) -> None:
    (stand_ins / "nodes").write_text("# two\nnode-0 slots=8\n\nnode-1 slots=8\n")
    printed = launch(stand_ins, "hostfile.sh", "--print", "nodes", *SETTINGS, MASTER_ADDR="10.0.0.1").stdout
    words = shlex.split(printed)
    assert words[words.index("--hostfile") + 1] == str(stand_ins / "nodes")
    assert words[words.index("--master_addr") + 1] == "10.0.0.1"
    # What DeepSpeed's pdsh form makes of an argument, what pdsh does, and the shell.
    settings = words[words.index("train") + 1 :]
    settings = ['"{}"'.format(word.replace('"', '\\"')) if " " in word else word for word in settings]
    shell = subprocess.run(
        ("bash", "-c", " ".join(["printf '%s\\n'".replace("%", "%%"), *settings]).replace("%%", "%")),
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.splitlines() == SETTINGS


@pytest.mark.parametrize(("code", "expect"), [(0, 0), (2, 2), (75, 75), (137, 76), (247, 76), (255, 76)])
@pytest.mark.parametrize("script", ["hostfile.sh", "per_node.sh"])
def test_the_exit_code_comes_back_and_is_76_where_a_process_was_killed(
    stand_ins: Path, script: str, code: int, expect: int
) -> None:
    (stand_ins / "nodes").write_text("node-0 slots=8\nnode-1 slots=8")  # the last line counts, too
    (stand_ins / "bin" / "ssh").write_text('#!/usr/bin/env bash\necho "${@: -2}" >>"$NOTES/ssh"\n')
    (stand_ins / "bin" / "deepspeed").write_text(f"#!/usr/bin/env bash\n{DEEPSPEED}\nexit {code}\n")
    arguments = ["nodes"] if script == "hostfile.sh" else []
    done = launch(stand_ins, script, *arguments, "run_dir=r", expect=expect, **NODE)
    assert (f"exit code {code}" in done.stderr) == (code > 200)
    assert ("was killed" in done.stderr) == (expect == 76)
    if script == "hostfile.sh":
        assert notes(stand_ins, "ssh") == ["node-0 true", "node-1 true"]


@pytest.mark.parametrize("script", ["hostfile.sh", "per_node.sh"])
def test_an_answer_of_0_is_not_believed_if_the_processes_have_not_said_so(stand_ins: Path, script: str) -> None:
    """So `deepspeed` answers if what it has started is killed."""
    (stand_ins / "nodes").write_text("node-0 slots=8\n")
    (stand_ins / "bin" / "ssh").write_text('#!/usr/bin/env bash\necho "$@" >>"$NOTES/ssh"\n')
    (stand_ins / "bin" / "deepspeed").write_text('#!/usr/bin/env bash\ncd "${LAUNCH_FINISHED:-$NOTES}" && touch 0 1\n')
    arguments = ["nodes"] if script == "hostfile.sh" else []
    done = launch(stand_ins, script, *arguments, "run_dir=r", expect=76, **NODE)
    assert done.stderr == (
        f"{script}: DeepSpeed's launcher was killed before the run had finished; launch the run again\n"
    )
    assert script == "per_node.sh" or "pkill -TERM" in notes(stand_ins, "ssh")[-1]


@pytest.mark.parametrize(
    ("how", "expect"), [("kill -TERM $$", 76), ("kill -HUP $$", 76), ("pdsh", 143), ("exit 1", 1)], ids=str
)
def test_hostfile_tells_a_signal_to_deepspeed_alone_from_the_processes_own_answer(
    stand_ins: Path, how: str, expect: int
) -> None:
    """Both are 128 and a number; only in the first case do processes still run."""
    (stand_ins / "nodes").write_text("node-0 slots=8\n")
    for name, script in {
        "ssh": 'echo "$@" >>"$NOTES/ssh"',
        "pdsh": "exit 143",
        "deepspeed": f"{how}; exit",
    }.items():
        (stand_ins / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    done = launch(stand_ins, "hostfile.sh", "nodes", "run_dir=r", expect=expect)
    assert ("DeepSpeed's launcher ended before the processes that it started" in done.stderr) == (expect == 76)
    assert ("pkill -TERM" in notes(stand_ins, "ssh")[-1]) == (expect == 76)


def test_hostfile_does_not_take_an_unreachable_node_for_one_where_nothing_runs(stand_ins: Path) -> None:
    (stand_ins / "nodes").write_text("node-0 slots=8\n")
    for name, script in {
        "ssh": 'case "$*" in *pkill*) touch "$NOTES/asked"; exit 255 ;; esac',
        "deepspeed": 'touch "$NOTES/busy"; until [ -e "$NOTES/asked" ]; do sleep 0.05; done; sleep 0.5; pdsh',
    }.items():
        (stand_ins / "bin" / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    script = ("bash", str(ROOT / "scripts/launch/hostfile.sh"), str(stand_ins / "nodes"), "run_dir=r")
    launched = subprocess.Popen(script, env=environment(stand_ins, {}), stderr=subprocess.PIPE, text=True)
    while not (stand_ins / "busy").exists():
        assert launched.poll() is None
    launched.send_signal(signal.SIGTERM)
    _, told = launched.communicate()
    assert "hostfile.sh: node-0 can't be reached to stop the run; send the signal again" in told
    assert launched.returncode == 0  # the run's own, and not 75, which would say that it was stopped and saved


def test_slurm_gives_each_task_its_place(stand_ins: Path) -> None:
    launch(stand_ins, "slurm.sbatch", *SETTINGS, **JOB, CODE="0")
    assert notes(stand_ins, "tasks") == [f"{rank} 4 {rank % 2} 2 node-3 {15000 + 4711}" for rank in range(4)]
    assert notes(stand_ins, "arguments") == ["-m", "train", *SETTINGS]
    assert len(set(notes(stand_ins, "launchers"))) == 1  # of these tasks, one speaks for all
    assert {"--kill-on-bad-exit=0", "--cpus-per-task=3"} <= set(notes(stand_ins, "srun"))
    assert not notes(stand_ins, "scontrol")


@pytest.mark.parametrize(
    ("code", "variables", "requeued"),
    [
        ("75", {}, True),
        ("75", {"SLURM_RESTART_COUNT": "19"}, True),
        ("75", {"SLURM_RESTART_COUNT": "20"}, False),
        ("75", {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}, False),
        ("75", {"STATE": "COMPLETING"}, False),
        ("75", {"STATE": "CANCELLED"}, False),
        ("76", {}, True),
        ("143", {}, True),
        ("1", {}, False),
        ("2", {}, False),
    ],
)
def test_slurm_requeues_what_can_go_on(stand_ins: Path, code: str, variables: dict[str, str], requeued: bool) -> None:
    done = launch(stand_ins, "slurm.sbatch", f"run_dir={stand_ins}", expect=int(code), **JOB, **variables, CODE=code)
    assert notes(stand_ins, "scontrol") == (["requeue 4711"] if requeued else [])
    told = [line for line in done.stderr.splitlines() if line.startswith("slurm.sbatch: ")]
    assert len(told) == (code not in "12")
    assert all(("is requeued" in line) == requeued for line in told)


def test_slurm_says_when_a_requeued_run_is_not_found_again(stand_ins: Path) -> None:
    requeued = {**JOB, "SLURM_RESTART_COUNT": "1", "CODE": "0"}
    assert "keep it on a shared disk" in launch(stand_ins, "slurm.sbatch", "run_dir=/nowhere/r", **requeued).stderr
    assert not launch(stand_ins, "slurm.sbatch", f"run_dir={stand_ins}", "overwrite=false", **requeued).stderr


def test_slurm_takes_the_highest_of_the_tasks_exit_codes(stand_ins: Path) -> None:
    launch(stand_ins, "slurm.sbatch", "run_dir=r", expect=137, **JOB, CODE="76", CODE_OF_1="137")
    assert notes(stand_ins, "scontrol") == ["requeue 4711"]


@pytest.mark.parametrize(
    ("code", "others", "expect"),
    [(2, 75, 2), (2, 137, 2), (2, 143, 2), (2, 1, 2), (1, 143, 1), (1, 76, 1), (127, 137, 1)],
)
def test_slurm_does_not_requeue_a_mistake_or_fault_of_one_task_however_the_others_ended(
    stand_ins: Path, code: int, others: int, expect: int
) -> None:
    codes = {"CODE": str(others), "CODE_OF_1": str(code)}
    launch(stand_ins, "slurm.sbatch", "run_dir=r", expect=expect, **JOB, **codes)
    assert not notes(stand_ins, "scontrol")


@pytest.mark.parametrize(("answer", "code"), [("exit 75", 75), ("exit 2", 2), ("kill -KILL $$", 137)])
def test_slurm_hands_a_tasks_signal_to_its_training_process(stand_ins: Path, answer: str, code: int) -> None:
    busy = 'echo $PPID >"$NOTES/new"; mv "$NOTES/new" "$NOTES/task"; while :; do sleep 0.1; done'
    (stand_ins / "bin" / "python").write_text(f"#!/usr/bin/env bash\ntrap '{answer}' TERM\n{busy}\n")
    script = ("bash", str(ROOT / "scripts/launch/slurm.sbatch"), "run_dir=r")
    job = subprocess.Popen(script, env=environment(stand_ins, {**JOB, "SLURM_NTASKS": "1"}), stderr=subprocess.PIPE)
    while not (stand_ins / "task").exists():
        assert job.poll() is None
    os.kill(int((stand_ins / "task").read_text()), signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == code
    assert bool(notes(stand_ins, "scontrol")) == (code != 2)


def test_slurm_lets_the_tasks_end_when_the_job_itself_is_signalled(stand_ins: Path) -> None:
    script = ("bash", str(ROOT / "scripts/launch/slurm.sbatch"), "run_dir=r")
    job = subprocess.Popen(
        script, env=environment(stand_ins, {**JOB, "CODE": "75", "BUSY": "yes"}), stderr=subprocess.PIPE
    )
    while not (stand_ins / "busy").exists():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    job.communicate()
    assert job.returncode == 75
    assert len(notes(stand_ins, "tasks")) == 4
    assert notes(stand_ins, "scontrol") == ["requeue 4711"]
