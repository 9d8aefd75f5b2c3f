#!/usr/bin/env bash
set -euo pipefail
me="$(basename "$0")"

usage() {
    cat <<'TEXT'
Starts a run on all nodes of a hostfile, from one of them, over pdsh and ssh.

    scripts/launch/hostfile.sh [--print] HOSTFILE SETTING=VALUE …

HOSTFILE has a line for each node, such as `node-0 slots=8`, with the same number of slots in all of them; process 0
runs on the first. ssh must reach every node without a password, and the checkout and its environment must lie at the
same path on each. The settings are those of `python -m train`; run_dir must be among them. MASTER_ADDR says at which
address the nodes find the first, if that is not the first that `hostname -I` prints there, and MASTER_PORT which of
its ports is free, if 29500 is not. Variables for the processes go into a file .deepspeed_env in the checkout, one
NAME=VALUE a line.

SIGTERM and SIGINT (Ctrl-C) reach the training processes, which finish their step and save. The exit code is the highest
of the nodes': 0 done, 2 a mistake in the settings, 75 stopped and saved, 76 a process or a launcher was lost; after the
last two the same command goes on. --print shows the command and starts nothing.
TEXT
}

print=false
case "${1:-}" in
--help | -h) usage && exit ;;
--print) print=true && shift ;;
esac
hostfile="$PWD/${1:-}" # until here, relative paths are the caller's
[[ "${1:-}" != /* ]] || hostfile="$1"
cd "$(dirname "$0")/../.."
source scripts/launch/common.sh

[ $# -gt 0 ] || die "HOSTFILE: which nodes are there? Name a file like scripts/launch/hostfile.example; see $me --help"
[ -f "$hostfile" ] || die "HOSTFILE=$1: there is no such file; write one like scripts/launch/hostfile.example"
shift
# DeepSpeed would number the processes of uneven nodes wrongly, end on a doubled one with a traceback, and read digits
# before junk as a number.
hosts=() slots=
bad() { # bad SENTENCE: of the line that is read
    die "$hostfile: in the line \"$line\", $*"
}
while read -r line || [ -n "$line" ]; do
    line="${line%$'\r'}"
    [ "${#hosts[@]}" -gt 0 ] || [[ "$line" != $'\xef\xbb\xbf'* ]] ||
        die "$hostfile: it begins with a byte order mark, which would become part of a name; save it as UTF-8 without one"
    case "$line" in '' | '#'*) continue ;; esac
    [[ "$line" =~ ^([^[:space:]]+)[[:space:]]+slots=([^[:space:]]*)([[:space:]]|$) ]] ||
        die "$hostfile: the line \"$line\" is not understood; write it like \"node-0 slots=8\""
    host="${BASH_REMATCH[1]}" number="${BASH_REMATCH[2]}"
    [[ "$number" =~ ^0*[1-9][0-9]{0,3}$ ]] || bad "slots=$number is no number of GPUs; write it like \"slots=8\""
    [[ ! "$host" =~ ^[^:]+:[0-9]+$ ]] ||
        bad "$host holds a port; name the node alone, and give ssh the port in ~/.ssh/config"
    [[ "$host" =~ ^[[:alnum:]_][[:alnum:]_.:@-]*$ ]] ||
        bad "$host is no name of one node; write a line like \"node-0 slots=8\" for each"
    [[ " ${hosts[*]} " != *" $host "* ]] || bad "$host comes a second time; name each node once, with all its slots"
    [ "${slots:-$number}" -eq "$number" ] ||
        bad "slots=$number differs from the $slots before; give all nodes as many, the fewest that any of them has"
    hosts+=("$host") slots="$number"
done <"$hostfile"
[ "${#hosts[@]}" -gt 0 ] || die "$hostfile: it names no node; write a line like \"node-0 slots=8\" for each"
run_dir="$(need_run_dir "$@")"
need_environment

# The nodes' shells read the settings once more. DeepSpeed quotes what holds a space, but leaves what a shell would read
# within quotes; the rest it leaves alone. pdsh puts names in the place of %h, %n and %u.
settings=()
for setting in "${@//%/%%}"; do
    case "$setting" in
    *' '*) settings+=("$(printf %s "$setting" | sed 's/[\\$`]/\\&/g')") ;;
    *) settings+=("$(printf %q "$setting")") ;;
    esac
done
command=(deepspeed --quiet --hostfile "$hostfile" --force_multi --no_ssh_check
    ${MASTER_ADDR:+--master_addr "$MASTER_ADDR"} --master_port "${MASTER_PORT:-29500}"
    --no_local_rank --module train "${settings[@]}")
if $print; then
    show "${command[@]}"
    exit
fi

command -v pdsh >/dev/null ||
    die "pdsh is needed and is not on the PATH; install it, for example with: apt install pdsh"
reach() { # reach HOST COMMAND
    ssh -n -o BatchMode=yes -o ConnectTimeout=10 "$@" 2>/dev/null
}
for host in "${hosts[@]}"; do
    reach "$host" true ||
        die "$host: ssh does not get in without a password; see \`ssh $host true\`, and mend keys, known_hosts or names"
done

stop() { # one training process is enough: they agree among themselves
    local code=0
    reach "${hosts[0]}" "pkill -TERM -f -- $(printf %q "$training")" || code=$?
    case "$code" in
    0) ;;
    1) # pkill found none: none has started, so there is nothing to save, and DeepSpeed ends its launchers
        kill -TERM "$supervised"
        wait "$supervised" || true
        exit 75
        ;;
    *) echo "$me: ${hosts[0]} can't be reached to stop the run; send the signal again" >&2 ;;
    esac
}

# Their command line, by the run directory; the brackets keep the pattern from matching the shell that carries it.
training="-u -[m] train .*$(printf %s "$run_dir" | sed 's/[][\.*^$+?(){}|]/\\&/g')( |\$)"
# A node whose network is gone says nothing, and ssh would wait for it for ever.
export PDSH_SSH_ARGS_APPEND="-oServerAliveInterval=15 -oServerAliveCountMax=4 ${PDSH_SSH_ARGS_APPEND:-}"
# What `deepspeed` starts is a pdsh of ours, which notes that it has come to its end, whatever that is.
beside="$(mktemp -d)"
trap 'rm -rf "$beside"' EXIT
printf '#!/usr/bin/env bash\ncode=0\n%q "$@" || code=$?\ntouch %q\nexit "$code"\n' \
    "$(command -v pdsh)" "$beside/ended" >"$beside/pdsh"
chmod +x "$beside/pdsh"

has_ended() {
    [ -e "$beside/ended" ] && return
    reach "${hosts[0]}" "pkill -TERM -f -- $(printf %q "$training")" || true # the nodes may not know
    return 1
}

code=0
supervise stop has_ended env PATH="$beside:$PATH" "${command[@]}" || code=$?
case "$code" in
129 | 130 | 143) # from the nodes, where a second signal ended the run; or `deepspeed` alone got one, and died of it
    if ! has_ended; then
        echo "$me: DeepSpeed's launcher ended before the processes that it started; launch the run again" >&2
        code=76
    fi
    ;;
esac
exit "$code"
