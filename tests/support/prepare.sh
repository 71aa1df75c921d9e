# shellcheck shell=bash
# Sourced from the top of the checkout by tests/run.sh and packaging/demo.sh: what both have to install.

if [ -n "${LFSVC_CACHE:-}" ]; then
    CACHE=$LFSVC_CACHE
elif [ "$(id -u)" = 0 ]; then
    # Not root's home: other users, in the test machine, run what lies here.
    CACHE=/var/cache/lfsvc
else
    CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/lfsvc
fi
PYTHON=${LFSVC_PYTHON:-/usr/bin/python3}
VENV=$CACHE/tests-venv
# Other users, in the test machine, run what is made here.
umask 022
mkdir -p "$CACHE"

say() { printf '%s\n' "$*" >&2; }

# Run a command as root, whoever we are.
as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi
}

# Run a command quietly; where it fails, show what it printed.
quietly() {
    local log status=0
    log=$(mktemp)
    "$@" >"$log" 2>&1 || status=$?
    if [ "$status" != 0 ]; then
        cat "$log" >&2
        say "failed: $*"
    fi
    rm -f "$log"
    return "$status"
}

# Install Debian packages that are missing.
need_packages() {
    local package missing=()
    for package in "$@"; do
        dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return 0
    say "Installing with apt: ${missing[*]} ..."
    quietly as_root apt-get update
    quietly as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"
}

# The virtual environment of the tests, made anew when pyproject.toml or the checkout is another.
# A lock, shared and held until this script and what it execs ends, keeps it from being made anew under a run.
need_venv() {
    local stamp lock
    stamp=$VENV/.made-for-$(cat pyproject.toml <(pwd) | sha256sum | cut -c1-16)
    exec {lock}>"$VENV.lock"
    flock --shared "$lock"
    [ -e "$stamp" ] && return 0
    if ! flock --nonblock "$lock"; then
        say "Waiting for another test run that uses $VENV ..."
        flock "$lock"
    fi
    if [ ! -e "$stamp" ]; then
        make_venv "$stamp" || return
    fi
    flock --shared "$lock"
}

make_venv() {
    local stamp=$1
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        say "$PYTHON is older than Python 3.10; set LFSVC_PYTHON to a newer one"
        return 1
    }
    say "Making a virtual environment in $VENV ..."
    rm -rf "$VENV"
    quietly "$PYTHON" -m venv "$VENV"
    quietly "$VENV/bin/pip" install --upgrade pip
    quietly "$VENV/bin/pip" install -e '.[dev]'
    touch "$stamp"
}

# Wheels of this checkout and of what it needs, as a folder that a machine without network installs from.
need_wheels() {
    local stamp new
    # A folder for each checkout: a run must not install another one's wheel.
    LFSVC_WHEELS=$CACHE/wheels-$(pwd | sha256sum | cut -c1-8)
    export LFSVC_WHEELS
    stamp=$LFSVC_WHEELS/.made-for-$(sha256sum pyproject.toml | cut -c1-16)
    if [ ! -e "$stamp" ]; then
        rm -rf "$LFSVC_WHEELS"
        quietly "$VENV/bin/pip" wheel --wheel-dir "$LFSVC_WHEELS" .
        touch "$stamp"
    fi
    # Replaced, not removed and made: another run of this checkout may be reading the folder.
    new=$(mktemp -d "$LFSVC_WHEELS/.new.XXXXXX")
    quietly "$VENV/bin/pip" wheel --no-deps --no-build-isolation --wheel-dir "$new" . || {
        rm -rf "$new"
        return 1
    }
    find "$LFSVC_WHEELS" -maxdepth 1 -name 'lfsvc-*.whl' ! -name "$(basename "$new"/lfsvc-*.whl)" -delete
    mv -f "$new"/lfsvc-*.whl "$LFSVC_WHEELS"
    rmdir "$new"
}
