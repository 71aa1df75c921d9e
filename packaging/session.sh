#!/usr/bin/env bash
# What the picture shows. usage: session.sh LLAMAFACTORY_VENV TINY_MODEL_SCRIPT
set -euo pipefail

llamafactory=$1
export PATH=$llamafactory/bin:$PATH HF_HUB_OFFLINE=1 NPROC_PER_NODE=1 TERM=xterm-256color
{
    lfsvc setup --no-linger
    "$llamafactory/bin/python" "$2" "$HOME/lab"
    cd "$HOME/lab"
    for run in 1.0e-3:night_lr3:40 3.0e-3:night_lr3e-3:8 1.0e-2:night_lr2:8; do
        IFS=: read -r rate name epochs <<<"$run"
        sed "s/1.0e-3/$rate/; s|saves/sums|saves/$name|; s/num_train_epochs: .*/num_train_epochs: $epochs/" \
            train.yaml >"$name.yaml"
    done
    echo 'tar -czf backup.tar.gz saves' >backup.sh
} >/dev/null 2>&1
cd "$HOME/lab"

# A command as on a terminal of 96 columns.
show() {
    printf '\033[32m$\033[0m \033[1m%s\033[0m\n' "$1"
    script -qec "stty cols 96 rows 60; $1" /dev/null
    echo
}

show "lfsvc submit train:night_lr3.yaml@0 night_lr3e-3.yaml@0 night_lr2.yaml@0 backup.sh"
# Nothing tells a shell of a third of a training; every second it looks.
until [ "$(lfsvc status --json | grep -c '"percentage": [3-9][0-9]')" != 0 ]; do sleep 0.5; done
show "lfsvc status"
lfsvc wait --all >/dev/null
lfsvc wait --all >/dev/null
show "lfsvc show 1"
show "lfsvc results --sort eval_loss"
