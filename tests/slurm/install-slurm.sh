#!/usr/bin/env bash
# Installs what slurm/local-cluster.sh needs, where this user may; the tests on a real Slurm skip themselves, loudly,
# where it may not. No service is started. Usage: tests/slurm/install-slurm.sh
set -euo pipefail
packages=(slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core)
as_root=()
if ((EUID != 0)); then
  if ! sudo -n true 2>/dev/null; then
    echo "NOT ROOT, and sudo asks for a password: Slurm is NOT installed, grids on a real Slurm are NOT tested." >&2
    echo "As root: apt-get install ${packages[*]}" >&2
    exit 0
  fi
  as_root=(sudo -n)
fi
export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
"${as_root[@]}" apt-get update -qq
"${as_root[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
