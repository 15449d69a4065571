#!/usr/bin/env bash
# The same on a GKE cluster that XPK made; the cluster mounts a bucket at /out in every pod.
set -euo pipefail
xpk workload create --cluster YOUR-CLUSTER --workload unlearn --tpu-type v5litepod-16 \
    --base-docker-image python:3.12 --command "pip install 'jax[tpu]' jax_unlearn && \
jax-unlearn concept --model stable-diffusion-v1-5/stable-diffusion-v1-5 \
    --forget 'a photo of a golf ball' --base 'a photo' --dtype bfloat16 --train cross-attention \
    --mesh data=-1 --coordinator auto --out /out/golf-ball"
