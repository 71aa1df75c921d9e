#!/usr/bin/env bash
# What the demo shows. usage: tour.sh LLAMAFACTORY_VENV TINY_MODEL_SCRIPT systemd|process
set -euo pipefail

llamafactory=$1 tiny_model=$2 how=$3
work=$(mktemp -d "${HOME:-/tmp}/lfsvc-demo.XXXXXX")
export HF_HUB_OFFLINE=1 PATH=$PATH:$llamafactory/bin

# A scheduler of the demo's own: neither the user's queue nor his settings are touched.
export XDG_STATE_HOME=$work/state XDG_DATA_HOME=$work/data
installed=''

finish() {
    [ -n "$installed" ] && lfsvc setup --remove >/dev/null 2>&1
    [ "$how" = process ] && lfsvc stop >/dev/null 2>&1
    rm -rf "$work"
}
trap finish EXIT

show() {
    printf '\n\033[1m$ %s\033[0m\n' "$*"
    "$@"
}

echo "Making a tiny model and its data ..."
"$llamafactory/bin/python" "$tiny_model" "$work" >/dev/null 2>&1

cd "$work"
if [ "$how" = systemd ]; then
    if systemctl --user cat lfsched.service >/dev/null 2>&1; then
        echo "lfsched.service is installed already: the demo's job joins your own queue."
        unset XDG_STATE_HOME XDG_DATA_HOME
    else
        installed=yes
        unset XDG_STATE_HOME XDG_DATA_HOME
        show lfsvc setup --no-linger
    fi
else
    export XDG_CONFIG_HOME=$work/config XDG_RUNTIME_DIR=$work/run DBUS_SESSION_BUS_ADDRESS=unix:path=$work/none
    mkdir -m 700 "$work/run"
    printf '\n\033[1m$ lfsvc serve &\033[0m\n'
    lfsvc serve >"$work/serve.log" 2>&1 &
    # It answers when it is ready; until then nothing owns the name.
    until lfsvc status >/dev/null 2>&1; do sleep 0.1; done
    cat "$work/serve.log"
fi

show lfsvc submit "train:$work/train.yaml#no_eval" --name sums --env NPROC_PER_NODE=1 --env HF_HUB_OFFLINE=1 --follow
id=$(lfsvc list -n 1 --json | sed -n 's/^ *"id": \([0-9]*\),.*/\1/p')

show lfsvc status
show lfsvc show "$id"
if [ "$how" = systemd ]; then
    show busctl --user get-property org.lfsvc1 /org/lfsvc1 org.lfsvc1.Scheduler State
    printf '\n\033[1m$ journalctl --user -u lfsched JOB_ID=%s\033[0m   (first and last lines)\n' "$id"
    journalctl --user -u lfsched "JOB_ID=$id" --no-pager -o short >"$work/journal" || true
    head -n 3 "$work/journal"
    echo "..."
    tail -n 3 "$work/journal"
fi
printf '\nThe log: %s\n' "$(ls "$work"/saves/sums/llamafactory_train_*.log)"
echo "The trained adapter:"
ls -l "$work"/saves/sums/adapter_*
