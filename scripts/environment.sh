# shellcheck shell=bash
# Sourced by scripts/quickstart and scripts/test: makes or reuses .venv with this repository in it.
#
# prepare_environment EXTRAS leaves PYTHON_IN_VENV set. Nothing is installed again while
# pyproject.toml and constraints.txt stay as they are. The environment variable PYTHON chooses the
# interpreter to start from.

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
environment="$repository/.venv"
PYTHON_IN_VENV="$environment/bin/python"

say() { printf '  %s\n' "$*"; }

fail() {
    printf '\n  error: %s\n' "$1" >&2
    shift
    for hint in "$@"; do printf '         %s\n' "$hint" >&2; done
    exit 1
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or newer."
        printf '%s' "$PYTHON"
        return
    fi
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "Python 3.11 or newer is needed, and found is: $(python3 --version 2>&1 || echo none)." \
        "Install it from your system's packages or python.org; if it has an unusual name, say" \
        "PYTHON=/path/to/python3.12 $0"
}

# Runs a command that takes long: shows seconds and its last words while a person watches, and the
# log's end when it fails.
run_with_progress() {
    local title="$1" log="$2"
    shift 2
    local started=$SECONDS status=0 last
    "$@" >"$log" 2>&1 </dev/null &
    local job=$!
    # shellcheck disable=SC2064
    trap "kill $job 2>/dev/null || true; exit 130" INT TERM
    if [ -t 1 ]; then
        while kill -0 "$job" 2>/dev/null; do
            last="$(grep -v '^WARNING' "$log" | tail -n 1 | cut -c 1-60 | tr -d '\r' || true)"
            printf '\r\033[K  … %s  %ds  \033[2m%s\033[0m' "$title" $((SECONDS - started)) "$last"
            sleep 0.3
        done
        printf '\r\033[K'
    else
        say "$title …"
    fi
    wait "$job" || status=$?
    trap - INT TERM
    if [ "$status" -ne 0 ]; then
        grep -v '^WARNING' "$log" | tail -n 15 | sed 's/^/    /' >&2
        fail "$title failed (exit code $status)." "The whole log is in $log" \
            "Without a network, pip needs a folder of wheels: see PIP_FIND_LINKS and PIP_NO_INDEX."
    fi
    say "✓ $title  ($((SECONDS - started)) s)"
}

prepare_environment() {
    local extras="$1" python wanted stamp
    if ! [ -x "$PYTHON_IN_VENV" ] || ! is_new_enough "$PYTHON_IN_VENV"; then
        python="$(find_python)"
        run_with_progress "making .venv with $("$python" --version 2>&1)" \
            "${TMPDIR:-/tmp}/sovereign-swarm-venv-$$.log" \
            "$python" -m venv --clear "$environment"
        rm -f "${TMPDIR:-/tmp}/sovereign-swarm-venv-$$.log"
    fi
    # The editable install remembers this folder, so a moved repository is installed anew.
    wanted="$("$PYTHON_IN_VENV" -c '
import hashlib, pathlib, sys
digest = hashlib.sha256(f"{sys.version} {sys.argv[1]}".encode())
for name in ("pyproject.toml", "constraints.txt"):
    digest.update(pathlib.Path(sys.argv[1], name).read_bytes())
print(digest.hexdigest())' "$repository")"
    for stamp in "$environment/installed-$extras" "$environment/installed-demo,dev"; do
        if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then return; fi
    done
    run_with_progress "installing packages into .venv (the first time takes minutes)" \
        "$environment/install.log" \
        "$PYTHON_IN_VENV" -m pip install --disable-pip-version-check --progress-bar off \
        --constraint "$repository/constraints.txt" --editable "$repository[$extras]"
    rm -f "$environment"/installed-*
    printf '%s\n' "$wanted" >"$environment/installed-$extras"
}
