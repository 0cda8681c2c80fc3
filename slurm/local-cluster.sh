#!/usr/bin/env bash
# A real two-node Slurm on this machine for tests and trials, with munge and accounting (sacct), without systemd.
#   eval "$(slurm/local-cluster.sh start)"     start, and let this shell's sbatch, srun and sacct use it
#   slurm/local-cluster.sh status              exit code 0 when both nodes are up
#   slurm/local-cluster.sh stop                cancel all jobs, end all processes, delete everything except log/
# Debian: apt-get install --no-install-recommends slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin \
#   munge mariadb-server-core
# Partitions: low (the default; its jobs are requeued for the other) and high. SLURM_LOCAL_DIR: the private folder.
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
dir=${SLURM_LOCAL_DIR:-/tmp/slurm-$UID}
nodes=(n1 n2) cpus=4 memory_mb=32768

fail() { echo "local-cluster: $*" >&2; exit 1; }
# settings of another cluster that this shell uses must not reach this one
while IFS= read -r name; do unset "$name"; done < <(compgen -e | grep -E '^(SLURM|SBATCH|SRUN|SACCT|SQUEUE)_' | grep -vx SLURM_LOCAL_DIR)
export SLURM_CONF=$dir/slurm.conf

launch() { # name command...: in a session of its own, which the terminal's Ctrl-C does not reach
  local name=$1; shift
  SLURM_LOCAL_OWNER=$dir setsid "$@" </dev/null >>"$dir/log/$name.out" 2>&1 9>&- &
  echo $! >"$dir/pid/$name"
}
await() { # name command...: wait until the command succeeds, while the daemon runs, for at most 30 s
  local name=$1 end=$((SECONDS + 30)); shift
  until "$@" &>/dev/null; do
    if ((SECONDS > end)) || ! kill -0 "$(<"$dir/pid/$name")" 2>/dev/null; then
      tail -n 5 "$dir"/log/"$name"* >&2 || true
      fail "$name did not start; see $dir/log"
    fi
    sleep 0.05
  done
}
listening() { (exec 3<>"/dev/tcp/127.0.0.1/$1"); }
free_ports() { # the first of five free ports, below the ephemeral range
  local base port
  for _ in {1..50}; do
    base=$((16000 + RANDOM % 15000))
    for ((port = base; port < base + 5; port++)); do ! listening $port 2>/dev/null || continue 2; done
    echo $base && return
  done
  fail "no free ports"
}
ours() { # pids of all processes that this cluster started, including jobs
  { grep -lszxF "SLURM_LOCAL_OWNER=$dir" /proc/[0-9]*/environ || true; } | cut -d/ -f3
}

configure() {
  local base host node
  base=$(free_ports) host=$(hostname -s)
  dbd_port=$((base + 1)) ctld_port=$base
  (umask 077; head -c 1024 /dev/urandom >"$dir/munge.key")
  { cat /etc/hosts; printf '127.0.0.1 %s\n' "${nodes[@]}"; } >"$dir/hosts"
  echo 'CgroupPlugin=disabled' >"$dir/cgroup.conf"
  # Slurm before 23.02 does not know this setting
  [[ $(slurmctld -V) =~ \ (2[0-2]|1)[0-9.]* ]] && : >"$dir/cgroup.conf"
  printf '#!/bin/sh\necho "export SLURM_LOCAL_OWNER=%s"\necho "export SLURM_CONF=%s"\n' "$dir" "$SLURM_CONF" >"$dir/prolog"
  chmod 755 "$dir/prolog"
  cat >"$SLURM_CONF" <<EOF
ClusterName=local
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ctld_port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
# cred_expire is also how long a requeued job waits before it starts again; below 5, Slurm uses 120
AuthInfo=socket=$dir/munge.sock,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/pid/slurmctld.own
SlurmdPidFile=$dir/pid/%n.own
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
# different job ids in every cluster, since submitit names its files after them
FirstJobId=$(($(date +%s) % 600000 * 100 + 1000))
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog=$dir/prolog
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=5
SlurmdTimeout=0
MinJobAge=86400
MaxArraySize=10001
MaxJobCount=50000
EnforcePartLimits=ALL
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$dbd_port
AccountingStoragePass=$dir/munge.sock
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=60 OverSubscribe=NO
PartitionName=low Default=YES PriorityTier=1 GraceTime=10
PartitionName=high PriorityTier=10 PreemptMode=OFF
EOF
  for node in "${!nodes[@]}"; do
    echo "NodeName=${nodes[node]} NodeHostname=$([[ $isolated ]] && echo "${nodes[node]}" || echo "$host") NodeAddr=127.0.0.1" \
      "Port=$((base + 2 + node)) CPUs=$cpus RealMemory=$memory_mb" >>"$SLURM_CONF"
  done
  cat >"$dir/slurmdbd.conf" <<EOF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$dbd_port
SlurmUser=$(id -un)
AuthInfo=socket=$dir/munge.sock
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
LogFile=$dir/log/slurmdbd.log
PidFile=$dir/pid/slurmdbd.own
EOF
  chmod 600 "$dir/slurmdbd.conf"
}

start_database() {
  local tables options
  tables=$(ls /usr/share/{mariadb,mysql}/{mariadb,mysql}_system_tables.sql 2>/dev/null | head -n 1) || true
  options=(--no-defaults "--datadir=$dir/db" --skip-grant-tables --skip-networking --innodb-log-file-size=8M
    --innodb-buffer-pool-size=32M --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900)
  ((UID)) || options+=(--user=root)
  { printf 'create database mysql;\nuse mysql;\n'; cat "$tables"; } |
    mariadbd "${options[@]}" --bootstrap &>"$dir/log/bootstrap.out" || fail "the database was not made; see $dir/log/bootstrap.out"
  launch mariadbd mariadbd "${options[@]}" "--socket=$dir/db/my.sock"
  await mariadbd test -S "$dir/db/my.sock"
  launch slurmdbd env MYSQL_UNIX_PORT="$dir/db/my.sock" slurmdbd -D
  await slurmdbd listening "$dbd_port"
}

accounted() { sacctmgr --noheader --parsable2 show cluster format=ControlHost | grep -q .; }

start_node() { # with a host name of its own, if this user has the right to set one
  if [[ $isolated ]]; then
    launch "$1" unshare --uts --mount sh -c 'mount --bind "$1" /etc/hosts && hostname "$2" && exec slurmd -D -N "$2"' - "$dir/hosts" "$1"
  else
    launch "$1" slurmd -D -N "$1"
  fi
}

all_up() { [[ $(timeout 10 sinfo -h -N -p low -o %T | grep -cE 'idle|mixed|allocated|completing') == "${#nodes[@]}" ]]; }

start() {
  local tool node
  for tool in munged slurmctld slurmd slurmdbd mariadbd sbatch sacct; do
    command -v $tool >/dev/null || fail "$tool is not installed; the packages are named in this script's head"
  done
  [[ $dir == /* && $dir != *[[:space:]]* && ${#dir} -le 80 ]] || fail "SLURM_LOCAL_DIR must be absolute, short and without blanks: $dir"
  if [[ -e $SLURM_CONF ]] && all_up 2>/dev/null; then echo "export SLURM_CONF=$SLURM_CONF" && return; fi
  stop
  mkdir -p "$dir"/{log,pid,state,spool,db}
  trap '((done_)) || stop' EXIT
  done_=0 isolated=
  unshare --uts --mount hostname x 2>/dev/null && isolated=1
  configure
  launch munged munged --foreground --force "--key-file=$dir/munge.key" "--socket=$dir/munge.sock" \
    "--pid-file=$dir/pid/munged.own" "--log-file=$dir/log/munged.log" "--seed-file=$dir/munge.seed"
  await munged test -S "$dir/munge.sock"
  start_database
  launch slurmctld slurmctld -D
  await slurmctld listening "$ctld_port"
  await slurmctld accounted
  for node in "${nodes[@]}"; do start_node "$node"; done
  await slurmctld all_up
  done_=1
  echo "export SLURM_CONF=$SLURM_CONF"
}

stop() {
  local signal end pids
  [[ ! -e $dir/pid/slurmctld ]] || timeout 10 scancel --user="$(id -un)" 2>/dev/null || true
  for signal in TERM KILL; do
    pids=$(ours)
    # CONT: a stopped process does not receive the other signal
    [[ -z $pids ]] || kill -"$signal" $pids 2>/dev/null || true
    [[ -z $pids ]] || kill -CONT $pids 2>/dev/null || true
    for ((end = SECONDS + 10; SECONDS < end; )); do
      [[ $(ours) ]] || break 2
      sleep 0.1
    done
  done
  rm -rf "${dir:?}"/{pid,state,spool,db,munge.*,hosts,prolog,*.conf}
}

mkdir -p "$dir"
exec 9>"$dir/lock"
case ${1:-} in
  start) flock -w 60 9 || fail "somebody else is starting or stopping $dir"; start ;;
  stop) flock -w 60 9 || fail "somebody else is starting or stopping $dir"; stop ;;
  status) [[ -e $SLURM_CONF ]] && all_up && sinfo -N >&2 ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
