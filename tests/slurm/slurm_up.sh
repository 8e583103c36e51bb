#!/usr/bin/env bash
# slurm_up.sh: start a real SLURM (munged + slurmctld + N x slurmd) on this one machine, without systemd and
# without touching system configuration. Everything lives in $SLURM_TEST_DIR. Must run as root.
#
#   apt-get install -y --no-install-recommends slurmctld slurmd slurm-client munge iproute2    (Debian 12: SLURM 22.05.8)
#   (12 s; then 1 s from here to idle nodes)
#   eval "$(./slurm_up.sh)"         # stdout = shell exports (SLURM_CONF, SLURM_TEST_DIR); all talk goes to stderr
#   sinfo; sbatch job.sh; squeue
#   ./slurm_down.sh                 # kills only the pids recorded in $SLURM_TEST_DIR/pids
#
# Idempotent: a second call on a live cluster prints the same exports and starts nothing; on a dead or half dead
# one it stops what is left and starts again.
#
# Knobs (environment):
#   SLURM_TEST_DIR    state folder                    (required)
#   SLURM_TEST_NODES  number of virtual nodes         (default 2)
#   SLURM_TEST_CPUS   CPUs each node claims           (default 2; need not exist, config_overrides)
#   SLURM_TEST_MEM    MB each node claims             (default 4000)
#   SLURM_TEST_NET    netns | shared | auto           (default auto: netns if the kernel lets us)
#       netns:  each node = own network + UTS + mount namespace: own IP (10.x.y.1N), own hostname, own /etc/hosts,
#               /dev/shm and /tmp shared. What a real cluster looks like to torch.distributed.
#       shared: all nodes share the host's network (127.0.0.1), only UTS + mount namespaces differ.
#   SLURM_TEST_SUBNET first three octets for netns    (default: 10.x.y from a hash of SLURM_TEST_DIR, so that
#                     clusters in different folders can run side by side)
#   SLURM_TEST_GRACE  GraceTime in s of a job preempted by one in partition "urgent" (default 15)
#   SLURM_TEST_GPUS   pretend GPUs per node           (default 0; for --gpus-per-node=, nothing sees them)
set -euo pipefail
DIR=${SLURM_TEST_DIR:?set it to a folder of your own, empty or not yet there}
N=${SLURM_TEST_NODES:-2}
CPUS=${SLURM_TEST_CPUS:-2}
MEM=${SLURM_TEST_MEM:-4000}
NET=${SLURM_TEST_NET:-auto}
GPUS=${SLURM_TEST_GPUS:-0}
HASH=$(printf %s "$DIR" | md5sum | cut -c1-4)
SUBNET=${SLURM_TEST_SUBNET:-10.$((64 + 0x${HASH:0:2} % 64)).$((0x${HASH:2:2}))}
HERE=$(cd "$(dirname "$0")" && pwd)
say() { echo "slurm_up: $*" >&2; }
die() { say "$*"; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root (unshare, munged --force, SlurmUser=root)"
for b in munged slurmctld slurmd sinfo scontrol unshare ip; do
  PATH=$PATH:/usr/sbin:/sbin command -v $b >/dev/null || die "$b missing: see the head of $0"
done
export PATH=$PATH:/usr/sbin:/sbin
exports() {
  echo "export SLURM_TEST_DIR=$DIR"
  echo "export SLURM_CONF=$DIR/slurm.conf"
}

# ---- already up?
alive() {
  [ -s "$DIR/pids" ] || return 1
  while read -r _ pid start; do
    [ "$(awk '$3 != "Z" {print $22}' /proc/"$pid"/stat 2>/dev/null)" = "$start" ] || return 1
  done <"$DIR/pids"
  SLURM_CONF=$DIR/slurm.conf scontrol ping 2>/dev/null | grep -q "is UP"
}
if alive; then
  say "already up in $DIR"; exports; exit 0
fi
if [ -e "$DIR/pids" ]; then
  say "stale cluster in $DIR: stopping what is left"
  SLURM_TEST_DIR=$DIR "$HERE/slurm_down.sh" >&2 || true
fi
if [ -d "$DIR" ] && [ -n "$(ls -A "$DIR")" ] && [ ! -e "$DIR/slurm.conf" ]; then
  die "$DIR is not empty and not ours: choose another SLURM_TEST_DIR"
fi
rm -rf "$DIR"
mkdir -p "$DIR"/{ctld,spool,log,run,munge}
chmod 755 "$DIR" "$DIR"/{ctld,spool,log,run,munge}
: >"$DIR/pids"
record() { # name pid: start time guards against pid reuse
  echo "$1 $2 $(cut -d' ' -f22 /proc/"$2"/stat)" >>"$DIR/pids"
}

# ---- network
BR=fs${HASH}br
if [ "$NET" = auto ]; then
  if unshare --net true 2>/dev/null && ip link add fs"${HASH}"p0 type veth peer name fs"${HASH}"p1 2>/dev/null; then
    ip link del fs"${HASH}"p0; NET=netns
  else NET=shared; fi
fi
cp /etc/hosts "$DIR/hosts"
HOSTN=$(hostname)
if [ "$NET" = netns ]; then
  CTLADDR=$SUBNET.1
  ip link del "$BR" 2>/dev/null || true
  ip link add "$BR" type bridge
  ip addr add "$SUBNET".1/24 dev "$BR"
  ip link set "$BR" up
  echo "$BR" >"$DIR/bridge"
  for i in $(seq 1 "$N"); do echo "$SUBNET.$((10 + i)) n$i" >>"$DIR/hosts"; done
else
  CTLADDR=127.0.0.1
  for i in $(seq 1 "$N"); do echo "127.0.0.1 n$i" >>"$DIR/hosts"; done
fi
freeport() { python3 -c 'import socket; s=socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }
CTLPORT=$(freeport)

# ---- munge: private key, socket and log
dd if=/dev/urandom bs=1 count=1024 of="$DIR/munge/munge.key" 2>/dev/null
chmod 400 "$DIR/munge/munge.key"
munged --foreground --force --key-file="$DIR/munge/munge.key" --socket="$DIR/munge/munge.socket" \
  --log-file="$DIR/munge/munged.log" --pid-file="$DIR/munge/munged.pid" --seed-file="$DIR/munge/munged.seed" \
  </dev/null >"$DIR/log/munged.out" 2>&1 &
record munged $!
for _ in $(seq 50); do [ -S "$DIR/munge/munge.socket" ] && break; sleep 0.1; done
[ -S "$DIR/munge/munge.socket" ] || die "munged did not start: $(cat "$DIR/log/munged.out")"

# ---- config
cat >"$DIR/slurm.conf" <<CONF
ClusterName=fcmaetest
SlurmctldHost=$HOSTN($CTLADDR)
SlurmctldPort=$CTLPORT
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire also is how long a requeued job waits before it may start again (120 s by default, and for less than 5)
AuthInfo=socket=$DIR/munge/munge.socket,cred_expire=5
StateSaveLocation=$DIR/ctld
SlurmdSpoolDir=$DIR/spool/%n
SlurmctldPidFile=$DIR/run/slurmctld.pid
SlurmdPidFile=$DIR/run/slurmd-%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/slurmd-%n.log
SlurmctldDebug=info
SlurmdDebug=info
# no cgroups, no affinity, no accounting daemon
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$DIR/log/jobcomp.log
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
SlurmdTimeout=30
InactiveLimit=0
$(for i in $(seq 1 "$N"); do
    a=n$i; [ "$NET" = shared ] && a=127.0.0.1 || a=$SUBNET.$((10 + i))
    echo "NodeName=n$i NodeHostname=n$i NodeAddr=$a Port=$((CTLPORT > 60000 ? CTLPORT - 1000 + i : CTLPORT + i)) CPUs=$CPUS RealMemory=$MEM State=UNKNOWN"
  done)
# a job in "urgent" preempts one in "test": SIGCONT + SIGTERM at once, SIGKILL and requeue after GraceTime
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=test Nodes=n[1-$N] Default=YES MaxTime=60 DefaultTime=10 State=UP PriorityTier=1 GraceTime=${SLURM_TEST_GRACE:-15}
PartitionName=urgent Nodes=n[1-$N] MaxTime=60 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
CONF
if [ "$GPUS" -gt 0 ]; then # regular files stand in for /dev/nvidia*
  mkdir -p "$DIR/dev"
  for g in $(seq 0 $((GPUS - 1))); do : >"$DIR/dev/gpu$g"; done
  echo "GresTypes=gpu" >>"$DIR/slurm.conf"
  sed -i "s/^NodeName=.*/& Gres=gpu:$GPUS/" "$DIR/slurm.conf"
  echo "AutoDetect=off
NodeName=n[1-$N] Name=gpu File=$DIR/dev/gpu[0-$((GPUS - 1))]" >"$DIR/gres.conf"
fi
case $(slurmctld -V) in # SLURM >= 23.02 wants to be told; 22.05 never touches cgroups with this config
  *\ 2[0-2].*) ;;
  *) echo "CgroupPlugin=disabled" >"$DIR/cgroup.conf" ;;
esac
export SLURM_CONF=$DIR/slurm.conf

# ---- daemons
slurmctld -D -c -f "$SLURM_CONF" </dev/null >"$DIR/log/slurmctld.out" 2>&1 &
record slurmctld $!
for i in $(seq 1 "$N"); do
  mkdir -p "$DIR/spool/n$i"
  nsargs=(--uts --mount)
  [ "$NET" = netns ] && nsargs+=(--net)
  # the shell inside waits on a fifo until its veth end is there, then becomes slurmd (same pid)
  mkfifo "$DIR/run/go-n$i"
  # shellcheck disable=SC2016 # the inner shell expands these
  unshare "${nsargs[@]}" bash -c '
    read -r _ <"$1/run/go-$2"
    hostname "$2"
    mount --bind "$1/hosts" /etc/hosts
    if [ "$3" = netns ]; then
      ip link set lo up; ip link set "$5" name eth0; ip addr add "$4/24" dev eth0; ip link set eth0 up
    fi
    exec slurmd -D -N "$2" -f "$1/slurm.conf"' _ "$DIR" "n$i" "$NET" "$SUBNET.$((10 + i))" "fs${HASH}n$i" \
    </dev/null >"$DIR/log/slurmd-n$i.out" 2>&1 &
  pid=$!
  record slurmd-n"$i" $pid
  if [ "$NET" = netns ]; then
    for _ in $(seq 100); do # until unshare has happened
      [ "$(readlink /proc/$pid/ns/net)" != "$(readlink /proc/self/ns/net)" ] && break; sleep 0.05
    done
    ip link del fs"${HASH}"h"$i" 2>/dev/null || true
    ip link add fs"${HASH}"h"$i" type veth peer name fs"${HASH}"n"$i"
    ip link set fs"${HASH}"h"$i" master "$BR" up
    ip link set fs"${HASH}"n"$i" netns "$pid"
  fi
  echo go >"$DIR/run/go-n$i"
done

# ---- ready?
t0=$(date +%s)
until [ "$(sinfo -h -p test -o %T -N 2>/dev/null | grep -c '^idle$')" = "$N" ]; do
  if [ $(($(date +%s) - t0)) -gt 40 ]; then
    sinfo >&2 || true; tail -n 20 "$DIR"/log/*.out "$DIR"/log/*.log >&2
    SLURM_TEST_DIR=$DIR "$HERE/slurm_down.sh" >&2 || true
    die "nodes not idle after 40 s"
  fi
  sleep 0.2
done
say "up: $N nodes, net=$NET, state in $DIR; stop with: SLURM_TEST_DIR=$DIR $HERE/slurm_down.sh"
exports
