#!/usr/bin/env bash
# Runs the tests; installs what they need, once.
#
#   ./tests/run.sh                          all
#   ./tests/run.sh unit                     fast, no root
#   ./tests/run.sh component                real SQLite, dbus-daemon and runner, no root
#   ./tests/run.sh integration -k kill      in a booted systemd, as root (or with sudo)
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=tests/support/prepare.sh
. tests/support/prepare.sh

case ${1:-} in
unit | component | integration)
    suites=("tests/$1")
    shift
    ;;
*)
    # git keeps no empty folder, and pytest runs nothing at all where one that it is given is missing.
    suites=()
    for suite in tests/unit tests/component tests/integration; do
        if [ -d "$suite" ]; then suites+=("$suite"); else say "There is no $suite: nothing of it is run."; fi
    done
    ;;
esac

case ${suites[*]} in
*integration*)
    # dbus-user-session: the user's bus and, through libpam-systemd, his manager; libglib2.0-bin: gdbus; procps: pgrep.
    packages="python3-venv dbus dbus-user-session systemd-container libglib2.0-bin procps shellcheck"
    # A notification daemon and its display; what the Debian package is built with, and its man page read.
    packages="$packages dunst xvfb openssl"
    packages="$packages git dpkg-dev debhelper dh-python pybuild-plugin-pyproject python3-hatchling python3-shtab man-db"
    ;;
*) packages="python3-venv dbus shellcheck openssl" ;;
esac
# shellcheck disable=SC2086  # a list of words
need_packages $packages
need_venv

pytest=("$VENV/bin/python" -m pytest)
if [[ ${suites[*]} != *integration* ]]; then
    exec "${pytest[@]}" "${suites[@]}" "$@"
fi

can_sudo() { sudo -n true 2>/dev/null; }

if [ "$(id -u)" = 0 ] || can_sudo || [ -n "${LFSVC_REQUIRE_INTEGRATION:-}" ]; then
    need_wheels
    LFSVC_LLAMAFACTORY=$(tests/support/llamafactory.sh "$CACHE")
    export LFSVC_LLAMAFACTORY
    # What the checks at submit are compared with: the real parser, and LLaMA-Factory's own configs.
    LFSVC_EXAMPLES=$(tests/support/example_configs.sh "$CACHE" "$VENV/bin/pip")
    export LFSVC_EXAMPLES LFSVC_ORACLE=$LFSVC_LLAMAFACTORY/bin/python
fi
if [ "$(id -u)" = 0 ] || ! can_sudo; then
    exec "${pytest[@]}" "${suites[@]}" "$@"
fi

# Booting a test machine needs root; the other suites do not, and would leave root's files in the checkout.
# 5: no test was selected, as with -k and a name of the other half.
others=5
if [ ${#suites[@]} -gt 1 ]; then
    others=0
    # The last one is tests/integration.
    "${pytest[@]}" "${suites[@]:0:${#suites[@]}-1}" "$@" || others=$?
fi
status=0
sudo -n --preserve-env=CI,LFSVC_WHEELS,LFSVC_LLAMAFACTORY,LFSVC_REQUIRE_INTEGRATION PYTHONDONTWRITEBYTECODE=1 \
    "${pytest[@]}" -p no:cacheprovider tests/integration "$@" || status=$?
case $status:$others in
5:*) exit "$others" ;;
*:0 | *:5) exit "$status" ;;
*) exit "$others" ;;
esac
