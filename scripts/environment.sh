# Sourced by the other scripts: makes or reuses .venv and puts its Python into $PYTHON.
#
#   prepare_environment EXTRA     install llava[EXTRA] in place
#
# TORCH_SPEC chooses the torch to install (a pip requirement). By default an importable torch in
# range is reused; else a machine with an NVIDIA GPU gets the newest and any other the tested one.

say() { printf '\033[1m%s\033[0m\n' "$*" >&2; }

torch_in_range() {
    "$1" -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' \
        2>/dev/null
}

prepare_environment() {
    local extra=$1 base=${BASE_PYTHON:-python3} constraints=()
    PYTHON=$PWD/.venv/bin/python
    if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or newer is needed; set BASE_PYTHON to one" >&2
        exit 2
    fi
    if [ ! -x "$PYTHON" ]; then
        say "creating .venv"
        if torch_in_range "$base"; then
            "$base" -m venv --system-site-packages .venv
        else
            "$base" -m venv .venv
        fi
    fi
    command -v nvidia-smi >/dev/null || constraints=(-c constraints-cpu.txt)
    if ! torch_in_range "$PYTHON"; then
        say "installing ${TORCH_SPEC:-torch}"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check \
            "${constraints[@]}" "${TORCH_SPEC:-torch}"
    fi
    # the stamp makes a second run skip pip while nothing about the requirements has changed
    local stamp=.venv/installed-$extra wanted
    wanted=$(cat pyproject.toml constraints-cpu.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        say "installing llava[$extra]"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check \
            "${constraints[@]}" --editable ".[$extra]"
        echo "$wanted" >"$stamp"
    fi
}
