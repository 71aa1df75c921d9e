#!/usr/bin/env bash
# Makes packaging/terminal.svg, the picture in the README: real commands on a real scheduler, recorded in a
# throwaway machine where the real LLaMA-Factory trains tiny models.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=tests/support/prepare.sh
. tests/support/prepare.sh

need_packages python3-venv dbus dbus-user-session systemd-container
need_venv
need_wheels
llamafactory=$(tests/support/llamafactory.sh "$CACHE")
transcript=$(mktemp)
trap 'rm -f "$transcript"' EXIT
say "Recording ..."
"$PYTHON" tests/integration/machine.py "$LFSVC_WHEELS" "$(dirname "$llamafactory")" \
    tests/support/tiny_model.py packaging/session.sh -- \
    bash /opt/demo/session.sh "$llamafactory" /opt/demo/tiny_model.py >"$transcript"
"$VENV/bin/python" packaging/picture.py <"$transcript" >packaging/terminal.svg
say "packaging/terminal.svg is made."
