#!/usr/bin/env bash
# One node, one rank per GPU (or RANKS=n): launch/torchrun.sh run cifar10-folder data.root=/data/cifar10
set -euo pipefail
if [[ -z ${RANKS:-} ]]; then
  RANKS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || true
  ((RANKS)) || RANKS=1
fi
# unset, torchrun sets it to 1 with a warning; hpc-supcon shares the cores among the ranks itself
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc_per_node "$RANKS" -m hpc_supcon "$@"
