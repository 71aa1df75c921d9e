#!/usr/bin/env bash
# Shows lfsvc at its main job: the real LLaMA-Factory trains, merges and evaluates a tiny model.
#
#   ./packaging/demo.sh             with systemd: this user's own, or a throwaway one where there is none
#   ./packaging/demo.sh --process   without systemd
#
# It leaves nothing behind but what it installed (packages, and its cache folder) and, with this user's own
# systemd, the jobs in his queue and the row in his table of results.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=tests/support/prepare.sh
. tests/support/prepare.sh

# Whether an overlay of / may be mounted, as a machine needs it: not in every container. Tried in a mount
# namespace of its own, so that nothing stays mounted.
can_mount() {
    local folder status=0
    folder=$(mktemp -d /var/tmp/lfsvc-demo.XXXXXX)
    mkdir "$folder/up" "$folder/work" "$folder/m"
    unshare --mount mount -t overlay overlay \
        -o "lowerdir=/,upperdir=$folder/up,workdir=$folder/work" "$folder/m" 2>/dev/null || status=$?
    rm -rf "$folder"
    return "$status"
}

case ${1:-} in
--process) how=process why="--process was given" ;;
'')
    if systemctl --user show-environment >/dev/null 2>&1; then
        how=user why="this user's systemd answers"
    elif [ "$(id -u)" = 0 ] && [ ! -d /run/systemd/system ] && can_mount; then
        how=machine why="no systemd runs here, so one is booted for the time of the demo"
    elif [ "$(id -u)" = 0 ] && [ ! -d /run/systemd/system ]; then
        how=process why="no systemd runs here, and this container lets none be booted"
    else
        how=process why="no systemd user manager answers"
    fi
    ;;
*)
    say "usage: ./packaging/demo.sh [--process]"
    exit 2
    ;;
esac

packages="python3-venv dbus"
# dbus-user-session: the user's bus in the machine and, through libpam-systemd, his manager.
[ "$how" = machine ] && packages="$packages systemd-container dbus-user-session"
# shellcheck disable=SC2086  # a list of words
need_packages $packages
need_venv
need_wheels
llamafactory=$(tests/support/llamafactory.sh "$CACHE")

tour=$PWD/tests/support/tour.sh
case $how in
machine)
    say "Demo in a throwaway machine: $why."
    exec "$PYTHON" tests/integration/machine.py "$LFSVC_WHEELS" "$(dirname "$llamafactory")" \
        "tests/support/tiny_model.py" "tests/support/tour.sh" -- \
        bash /opt/demo/tour.sh "$llamafactory" /opt/demo/tiny_model.py machine
    ;;
user | process)
    say "Demo as this user: $why."
    demo=$CACHE/demo-venv
    [ -x "$demo/bin/python" ] || quietly "$PYTHON" -m venv "$demo"
    quietly "$demo/bin/pip" install --no-index --find-links "$LFSVC_WHEELS" --force-reinstall lfsvc
    export PATH=$demo/bin:$PATH
    exec bash "$tour" "$llamafactory" "$PWD/tests/support/tiny_model.py" "$([ "$how" = user ] && echo systemd || echo process)"
    ;;
esac
