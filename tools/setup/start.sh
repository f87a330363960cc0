#!/bin/sh
# Finds a Python that can make a virtual environment and hands over to tools/setup, which does the rest.
#
# Order: $PYTHON; the one that .venv was made with; /usr/bin/python3; python3. It has to be 3.11 or newer and able to make virtual
# environments, which Debian and Ubuntu package apart. As root that package is installed; otherwise the one line to type is printed. sudo is never called.
set -eu

root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)

refuse() {
    printf 'set-up: %s\n' "$1" >&2
    exit 1
}

# 0: will do. 3: too old or not a Python. 4: cannot make virtual environments.
judge() {
    "$1" -c 'import sys
if sys.version_info < (3, 11): sys.exit(3)
try: import ensurepip, venv
except ImportError: sys.exit(4)' >/dev/null 2>&1 && return 0
    [ $? -eq 4 ] && return 4
    return 3
}

install_venv() {
    package="$("$1" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
    command -v apt-get >/dev/null || refuse "$1 cannot make virtual environments (modules venv and ensurepip are missing). Install them, or set PYTHON."
    [ "$(id -u)" -eq 0 ] || refuse "one package is missing. Type: sudo apt-get install $package"
    printf 'set-up: installing %s\n' "$package" >&2
    log=$(mktemp)
    if ! { DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package" ||
        { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$package"; }; } >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        rm -f "$log"
        refuse "$package could not be installed. Type: apt-get install $package"
    fi
    rm -f "$log"
}

choose() {
    if [ -n "${PYTHON:-}" ]; then
        command -v "$PYTHON" >/dev/null || refuse "PYTHON names $PYTHON, which is not there."
        set -- "$PYTHON"
    else
        set -- /usr/bin/python3 python3
        before=$(sed -n 's/^executable = //p' "$root/.venv/pyvenv.cfg" 2>/dev/null) || before=
        [ -z "$before" ] || set -- "$before" "$@"
    fi
    incomplete=
    for candidate in "$@"; do
        status=0
        judge "$candidate" || status=$?
        case $status in
        0) chosen=$candidate && return ;;
        4) incomplete=${incomplete:-$candidate} ;;
        esac
    done
    [ -n "$incomplete" ] || refuse "Python 3.11 or newer is needed. Name one (make PYTHON=/path/to/python3), or install it: apt-get install python3 python3-venv"
    install_venv "$incomplete"
    chosen=$incomplete
}

choose
cd "$root"
exec "$chosen" -B -m tools.setup
