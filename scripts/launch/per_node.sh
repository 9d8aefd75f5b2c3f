#!/usr/bin/env bash
set -euo pipefail
me="$(basename "$0")"
cd "$(dirname "$0")/../.."
source scripts/launch/common.sh

usage() {
    cat <<'TEXT'
Starts the processes of one node, without ssh: run it on every node, each with its number. For containers, Kubernetes,
and for everything else that starts commands on the nodes itself.

    scripts/launch/per_node.sh [OPTION …] SETTING=VALUE …

    --nodes N          or NODES          nodes of the run; with one, the next two are not needed
    --node-rank R      or NODE_RANK      this node's number, from 0; unset, JOB_COMPLETION_INDEX (an Indexed Job's)
    --master-addr A    or MASTER_ADDR    node 0, by a name or address at which all nodes reach it
    --master-port P    or MASTER_PORT    a port that is free there; 29500
    --gpus-per-node G  or GPUS_PER_NODE  processes on each node, as many on every one; unset, the GPUs of this one
    --print            shows hostfile and command, and starts nothing

In a StatefulSet: NODE_RANK="${HOSTNAME##*-}". The settings are those of `python -m train`, the same on every node;
run_dir must be among them. SIGTERM and SIGINT, on any node, reach the training processes, which finish their step and
save, and the exit code is theirs: 0 done, 2 a mistake in the settings, 75 stopped and saved, 76 a process was lost;
after the last two the same command goes on.
TEXT
}

nodes="${NODES:-}" node_rank="${NODE_RANK:-${JOB_COMPLETION_INDEX:-}}" address="${MASTER_ADDR:-}"
port="${MASTER_PORT:-29500}" gpus="${GPUS_PER_NODE:-}" print=false
while [ $# -gt 0 ]; do
    case "$1" in
    --help | -h) usage && exit ;;
    --print) print=true && shift ;;
    --nodes | --node-rank | --master-addr | --master-port | --gpus-per-node)
        [ $# -gt 1 ] || die "$1: it needs a value; see $me --help"
        case "$1" in
        --nodes) nodes="$2" ;;
        --node-rank) node_rank="$2" ;;
        --master-addr) address="$2" ;;
        --master-port) port="$2" ;;
        --gpus-per-node) gpus="$2" ;;
        esac
        shift 2
        ;;
    -*) die "$1: there is no such option; see $me --help" ;;
    *) break ;;
    esac
done
[ -n "$nodes" ] || die "NODES: how many nodes are there? Give --nodes 2"
need_number NODES "$nodes" 1
if [ "$nodes" -eq 1 ]; then # nobody else has to be told apart or found
    node_rank="${node_rank:-0}" address="${address:-localhost}"
fi
[ -n "$node_rank" ] || die "NODE_RANK: which of the nodes is this? Give --node-rank 0 on the first, 1 on the next"
[ -n "$address" ] || die "MASTER_ADDR: where do the nodes meet? Give --master-addr with a name or address of node 0"
need_number NODE_RANK "$node_rank" 0
need_number MASTER_PORT "$port" 1
[ "$node_rank" -lt "$nodes" ] ||
    die "NODE_RANK=$node_rank: nodes are counted from 0, and NODES=$nodes; give at most $((nodes - 1))"
need_run_dir "$@" >/dev/null
need_environment
if [ -z "$gpus" ]; then
    gpus="$(python -c 'import torch; print(torch.cuda.device_count())')"
    [ "$gpus" != 0 ] ||
        die "GPUS_PER_NODE: torch finds no GPU here; give --gpus-per-node with the number of processes of each node"
fi
need_number GPUS_PER_NODE "$gpus" 1

# Nobody logs in by these names: all that counts is how many there are, and in which order.
hostfile="$(mktemp)"
finished="$(mktemp -d)" # each training process that has finished leaves a file there
trap 'rm -rf "$hostfile" "$finished"' EXIT
for ((node = 0; node < nodes; node++)); do echo "node-$node slots=$gpus"; done >"$hostfile"
# Not --quiet: at that level DeepSpeed's launcher has the last word, a command as a Python list "exits with return code".
command=(deepspeed --log_level critical --hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$address"
    --master_port "$port" --no_local_rank --module train "$@")
if $print; then
    cat "$hostfile"
    show "${command[@]}"
    exit
fi

children() { # the processes that a process has started
    { grep -lsE "^PPid:[[:space:]]+$1\$" /proc/[0-9]*/status || true; } | cut -d/ -f3
}

stop() { # deepspeed → its launcher → the training processes
    local launcher process found=false
    for launcher in $(children "$supervised"); do
        for process in $(children "$launcher"); do
            kill -TERM "$process" 2>/dev/null && found=true
        done
    done
    if ! $found; then # none has started, so there is nothing to save
        kill -TERM -- "-$supervised" 2>/dev/null || true
        wait "$supervised" || true
        exit 75
    fi
}

all_finished() {
    [ "$(find "$finished" -type f | wc -l)" -ge "$gpus" ]
}

training() { # the training processes that are left, wherever their launchers are
    local process
    for process in $(grep -lsz "^LAUNCH_FINISHED=$finished\$" /proc/[0-9]*/environ | cut -d/ -f3); do
        ! tr '\0' ' ' <"/proc/$process/cmdline" 2>/dev/null | grep -q ' -m train ' || echo "$process"
    done
}

code=0
supervise stop all_finished env LAUNCH_FINISHED="$finished" "${command[@]}" || code=$?
if [ "$code" -ne 76 ] && [ -n "$(training)" ]; then # `deepspeed` alone got SIGTERM, say, and dies of it
    echo "$me: DeepSpeed's launcher ended before the processes that it started; launch the run again" >&2
    code=76
fi
if [ "$code" -eq 76 ]; then
    # Processes whose launcher was killed save and leave by themselves, if the launcher is not `deepspeed` alone. The
    # same command must not come before they have left.
    for process in $(training); do
        parent="$(sed -n 's/^PPid:[[:space:]]*//p' "/proc/$process/status" 2>/dev/null)"
        ! grep -qs deepspeed.launcher "/proc/$parent/cmdline" || kill -TERM "$process" 2>/dev/null || true
    done
    for ((waited = 0; waited < 300; waited++)); do # twice the seconds: one may be held by a disk that hangs
        [ -n "$(training)" ] || break
        sleep 0.5
    done
fi
exit "$code"
