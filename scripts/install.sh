# Sourced by quickstart.sh and test.sh: makes .venv with the pinned packages. Says what is missing and stops, in one
# sentence; does nothing if everything is there already.

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }

die() {
    printf '%s: %s\n' "$(basename "$0")" "$*" >&2
    exit 2
}

find_python() { # the first Python that is new enough
    local candidate
    for candidate in python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "Python 3.11 or newer is needed and none is on the PATH; install it, for example with: apt install python3"
}

install() { # install EXTRA: the packages of pyproject.toml with that extra ("" for none), at the versions of constraints.txt
    local extra="$1" python wanted refused=$'[[:space:]:;&|<>()$`"\'\\\\]'
    # In such a path pip writes scripts (.venv/bin/deepspeed) whose first line no system can read, and torch compiles
    # DeepSpeed's operator by commands that a shell takes apart.
    [[ "$PWD" != *$refused* ]] ||
        die "$PWD: its name holds a space or a sign that shells read, and what pip and torch build in it wouldn't run;" \
            "move the checkout to a path without, for example to $HOME/openhermes-mixtral"
    command -v g++ >/dev/null ||
        die "g++ is needed to compile DeepSpeed's shared-memory op and is not on the PATH; install it, for example with: apt install g++"
    python="$(find_python)"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        die "Python's venv module is needed and $python lacks it; install it, for example with: apt install python3-venv"
    "$python" -c 'import os, sysconfig, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
        die "Python's header files are needed to compile DeepSpeed's op and $python lacks them; install them, for example with: apt install python3-dev"

    # What is installed is remembered by the hash of what asks for it. An environment holds absolute paths, so one that
    # was made elsewhere (the checkout was moved) is made again.
    wanted="$({ cat pyproject.toml constraints.txt && pwd; } | sha256sum | cut -d' ' -f1)"
    if ! { grep -qsx "$wanted:${extra:-run}" .venv/installed && .venv/bin/python -c '' 2>/dev/null; }; then
        say "Installing packages into .venv (once; several minutes, and gigabytes if torch comes with CUDA)"
        if [ "$(cat .venv/made-in 2>/dev/null)" != "$PWD" ] || ! .venv/bin/python -c '' 2>/dev/null; then
            "$python" -m venv --clear .venv || die ".venv can't be made here; is the disk full or read-only?"
            pwd >.venv/made-in
        fi
        .venv/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt \
            --editable ".${extra:+[$extra]}" >.venv/pip.log 2>&1 ||
            die "pip could not install the packages ($(grep -o 'ERROR: .*' .venv/pip.log | tail -n1));" \
                "check the network and the free disk space, then run this again; .venv/pip.log has the details"
        echo "$wanted:${extra:-run}" >>.venv/installed
        # Development packages include what running needs.
        [ -z "$extra" ] || echo "$wanted:run" >>.venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH" VIRTUAL_ENV="$PWD/.venv"
}
