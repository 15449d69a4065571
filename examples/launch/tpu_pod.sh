#!/usr/bin/env bash
# Forgets a concept of Stable Diffusion on a TPU pod slice: 16 chips, 4 machines.
# The bucket is mounted on every machine, so that all see OUT and a preempted run can go on.
set -euo pipefail
name=unlearn zone=us-west4-a bucket=YOUR-BUCKET
ssh() { gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker all --command "$1"; }

gcloud compute tpus tpu-vm create "$name" --zone "$zone" --accelerator-type v5litepod-16 \
    --version v2-alpha-tpuv5-lite
ssh "mkdir -p ~/out && gcsfuse $bucket ~/out && pip install 'jax[tpu]' jax_unlearn"
ssh "jax-unlearn concept --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --forget 'a photo of a golf ball' --base 'a photo' --dtype bfloat16 --train cross-attention \
    --mesh data=-1 --coordinator auto --out ~/out/golf-ball"
gcloud compute tpus tpu-vm delete "$name" --zone "$zone" --quiet
