#!/usr/bin/env bash
# Installs what the deepspeed engine, the trackers, and the ffcv and dali loaders need, system packages included, where
# this user may; their tests skip themselves, loudly, where it may not. Usage: tests/loaders/install-extras.sh VENV/bin
set -euo pipefail
bin=$1
# pure Python as it is used here: nothing is compiled, and no root needed
DS_BUILD_OPS=0 "$bin/python" -m pip install -q --disable-pip-version-check -e '.[deepspeed]'
"$bin/python" -m pip install -q --disable-pip-version-check -e '.[wandb,mlflow]'
as_root=()
if ((EUID != 0)); then
  if ! sudo -n true 2>/dev/null; then
    echo "NOT ROOT, and sudo asks for a password: the extras ffcv and dali are NOT installed, their loaders NOT tested." >&2
    echo "As root: apt-get install pkg-config libopencv-dev libturbojpeg0-dev g++" >&2
    exit 0
  fi
  as_root=(sudo -n)
fi
export DEBIAN_FRONTEND=noninteractive
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends pkg-config libopencv-dev libturbojpeg0-dev g++ >/dev/null
"$bin/python" -m pip install -q --disable-pip-version-check -e '.[ffcv,dali]'
