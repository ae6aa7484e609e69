#!/usr/bin/env bash
# Runs a command with the package on the path, on a machine where nothing can be installed:
#     bash benchmarks/on_device.sh python3 benchmarks/gpu_linear.py
set -euo pipefail
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
cp -r zeroskip "$site/"
cp -r ir passes runtime "$site/zeroskip/"
PYTHONPATH="$site" PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1 OMP_NUM_THREADS=1 "$@"
