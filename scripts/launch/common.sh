# Sourced by the launchers beside it, in the checkout's root. `me` is the script's name.

die() {
    # shellcheck disable=SC2154 # whoever sources this sets it
    printf '%s: %s\n' "$me" "$*" >&2
    exit 2
}

need_run_dir() { # need_run_dir SETTING=VALUE …: prints that setting
    local setting run_dir=
    for setting in "$@"; do
        case "${setting##+}" in
        run_dir=?* | +run_dir=?*) run_dir="$setting" ;;
        overwrite=[Ff]alse | +overwrite=[Ff]alse) ;;
        overwrite=* | +overwrite=*)
            die "$setting: the same command is to go on after an interruption, and would start over; empty run_dir by hand, or name another"
            ;;
        esac
    done
    [ -n "$run_dir" ] ||
        die "run_dir: after an interruption the same command goes on only if it finds the run; give run_dir=runs/NAME"
    echo "$run_dir"
}

need_number() { # need_number NAME VALUE LEAST
    [[ "$2" =~ ^[0-9]+$ ]] && [ "$2" -ge "$3" ] ||
        die "$1=$2: it must be a whole number from $3 on; give for example $1=$3"
}

need_environment() { # what is active, or else the checkout's own
    command -v deepspeed >/dev/null || PATH="$PWD/.venv/bin:$PATH"
    command -v deepspeed >/dev/null ||
        die "deepspeed is not on the PATH and .venv holds none; make the environment with ./scripts/quickstart.sh"
}

show() { # show COMMAND …: as it could be typed
    printf '%q ' "$@"
    echo
}

# supervise STOP FINISHED COMMAND …: runs the command, calls STOP when this script gets SIGTERM, SIGINT or SIGHUP, and
# returns the command's exit code; or 76 if it is 0 and FINISHED fails: `deepspeed` answers 0 when what it has started
# was killed. Not exec, because DeepSpeed's own programs on the way to the training processes do not hand
# on what they get: `deepspeed` dies of a SIGTERM and leaves them running, its launcher on the node gives them 30
# seconds and answers 1 whatever they say. The command has a process group of its own, or else Ctrl-C would reach those
# too.
supervise() {
    local stop="$1" finishes="$2" code=0
    shift 2
    set -m
    "$@" </dev/null & # a background process that reads from the terminal is stopped
    supervised=$!
    set +m
    trap '"$stop"' TERM INT HUP
    while kill -0 "$supervised" 2>/dev/null; do
        wait "$supervised" || true # a signal ends the waiting, not what is waited for
    done
    wait "$supervised" || code=$?
    trap - TERM INT HUP
    if [ "$code" -eq 0 ] && ! "$finishes"; then
        echo "$me: DeepSpeed's launcher was killed before the run had finished; launch the run again" >&2
        code=76
    elif [ "$code" -eq 137 ]; then
        echo "$me: a launcher was killed; launch the run again" >&2
        code=76
    elif [ "$code" -gt 224 ]; then # the launcher's 256 - N for a process that signal N has killed, or ssh's own 255
        echo "$me: a process was killed, or its node can't be reached (exit code $code); launch the run again" >&2
        code=76
    fi
    return "$code"
}
