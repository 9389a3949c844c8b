#!/usr/bin/env bash
# A slice of TPU VMs: `launch/tpu_vm.sh create|start|follow|stop|delete`, from your own machine, with
# gcloud logged in. Every host of the slice runs the same command, and JAX finds the others itself.
set -euo pipefail

: "${NAME:=stvit}" "${ZONE:=us-west4-a}" "${TYPE:=v5litepod-256}" "${VERSION:=v2-alpha-tpuv5-lite}"
: "${BUCKET:=gs://your-bucket}" "${CONFIG:=configs/stvit_small.py}"
: "${REPOSITORY:=https://github.com/YOU/stvit_jax}"
# Checkpoints and metrics go to the bucket. Data are read from a disk: ArrayRecord reads no gs://, so
# the bucket is mounted, read only.
WORKDIR="$BUCKET/runs/stvit_small"
DATA_DIR=/mnt/data/tensorflow_datasets

everywhere() { # a command on every host of the slice
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"
}

case "${1:-}" in
create)
    gcloud compute tpus tpu-vm create "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --version "$VERSION"
    everywhere "set -e
        command -v gcsfuse || { echo 'install gcsfuse first, see its page'; exit 1; }
        sudo apt-get update -q
        sudo apt-get install -qy python3-venv
        git clone -q $REPOSITORY stvit_jax
        cd stvit_jax
        python3 -m venv .venv
        .venv/bin/pip install -q -r requirements.txt 'jax[tpu]' gcsfs
        sudo mkdir -p /mnt/data && sudo chown \$USER /mnt/data"
    ;;
start)
    # A unit of systemd outlives the connection. It starts again after whatever went wrong and after
    # a stop (75), and not after the end (0): the same command continues.
    everywhere "set -e
        mountpoint -q /mnt/data || gcsfuse -o ro --implicit-dirs ${BUCKET#gs://} /mnt/data
        sudo systemctl reset-failed stvit 2>/dev/null || true
        sudo systemd-run --unit=stvit --uid=\$USER --working-directory=\$PWD/stvit_jax \
            --property=Restart=on-failure --property=RestartSec=15 \
            --property=StartLimitIntervalSec=3600 --property=StartLimitBurst=20 \
            --property=TimeoutStopSec=120 --setenv=HOME=\$HOME \
            --setenv=JAX_COMPILATION_CACHE_DIR=\$HOME/.cache/stvit_jax \
            \$PWD/stvit_jax/.venv/bin/python train.py --config $CONFIG --workdir $WORKDIR \
            --config.data.dir=$DATA_DIR"
    ;;
follow) # the first host speaks for all; the others tell of trouble only
    gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=0 \
        --command "journalctl --unit=stvit --follow --output=cat"
    ;;
stop) # SIGTERM: all save at the same step; `start` continues
    everywhere "sudo systemctl stop stvit"
    ;;
delete)
    gcloud compute tpus tpu-vm delete "$NAME" --zone "$ZONE"
    ;;
*)
    echo "usage: $0 create|start|follow|stop|delete" >&2
    exit 1
    ;;
esac
