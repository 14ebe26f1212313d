#!/usr/bin/env bash
# Makes .venv, installs, and trains a small GPT on two ranks with FSDP2 and Lamb, afresh each time; about two minutes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"

check_compiler "the demo runs its optimizer uncompiled" || true
prepare train
out=runs/demo
rm -rf "$out"
OMP_NUM_THREADS=1 $PY -m torch.distributed.run --standalone --nproc-per-node 2 launch/train.py \
    --optimizer lamb --lr 0.02 --parallel fsdp2 --steps 300 --batch-size 16 --schedule cosine --warmup 20 \
    --eval-every 50 --checkpoint "$out/checkpoint" --checkpoint-every 100 --out "$out" "$@"
