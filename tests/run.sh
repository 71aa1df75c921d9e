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

suites=(tests/unit tests/component tests/integration)
case ${1:-} in
unit | component | integration)
    suites=("tests/$1")
    shift
    ;;
esac

case ${suites[*]} in
# dbus-user-session: the user's bus and, through libpam-systemd, his manager; libglib2.0-bin: gdbus; procps: pgrep.
*integration*) packages="python3-venv dbus dbus-user-session systemd-container libglib2.0-bin procps shellcheck" ;;
*) packages="python3-venv dbus shellcheck" ;;
esac
# shellcheck disable=SC2086  # a list of words
need_packages $packages
need_venv

run=("$VENV/bin/python" -m pytest "${suites[@]}" "$@")
if [[ ${suites[*]} == *integration* ]]; then
    if [ -n "${LFSVC_REQUIRE_INTEGRATION:-}" ] || [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; then
        need_wheels
        LFSVC_LLAMAFACTORY=$(tests/support/llamafactory.sh "$CACHE")
        export LFSVC_LLAMAFACTORY
    fi
    # Booting a test machine needs root; nothing of the tests needs this user's own session.
    if [ "$(id -u)" != 0 ] && sudo -n true 2>/dev/null; then
        run=(sudo -n --preserve-env=LFSVC_WHEELS,LFSVC_LLAMAFACTORY,LFSVC_REQUIRE_INTEGRATION "${run[@]}" -p no:cacheprovider)
    fi
fi
exec "${run[@]}"
