#!/usr/bin/env bash
# slurm_down.sh: stop the cluster of slurm_up.sh: cancels its jobs, then ends only the recorded pids.
set -uo pipefail
DIR=${SLURM_TEST_DIR:?set it to a folder of your own, empty or not yet there}
export PATH=$PATH:/usr/sbin:/sbin SLURM_CONF=$DIR/slurm.conf
[ -e "$DIR/pids" ] || { echo "slurm_down: nothing in $DIR"; exit 0; }
same() { [ -n "$1" ] && [ "$(awk '$3 != "Z" {print $22}' /proc/"$1"/stat 2>/dev/null)" = "$2" ]; }
# the nodes' mount namespaces: what is still in one of them at the end (job steps) is ours
own=$(readlink /proc/self/ns/mnt)
spaces=$(while read -r name pid start; do
  case $name in slurmd-*) same "$pid" "$start" && readlink /proc/"$pid"/ns/mnt ;; esac
done <"$DIR/pids" | grep -vxF "$own")
if timeout 5 scontrol ping 2>/dev/null | grep -q "is UP"; then
  timeout 10 scancel --full --user=root 2>/dev/null
  for _ in $(seq 50); do [ -z "$(timeout 5 squeue -h 2>/dev/null)" ] && break; sleep 0.2; done
fi
tac "$DIR/pids" | while read -r name pid start; do
  if same "$pid" "$start"; then kill -TERM "$pid" 2>/dev/null; fi
done
for _ in $(seq 50); do
  left=0
  while read -r name pid start; do same "$pid" "$start" && left=1; done <"$DIR/pids"
  [ $left = 0 ] && break; sleep 0.1
done
while read -r name pid start; do
  if same "$pid" "$start"; then echo "slurm_down: KILL $name $pid"; kill -KILL "$pid"; fi
done <"$DIR/pids"
if [ -n "$spaces" ]; then
  for p in /proc/[0-9]*; do
    ns=$(readlink "$p/ns/mnt" 2>/dev/null) || continue
    if grep -qxF "$ns" <<<"$spaces"; then
      echo "slurm_down: KILL ${p#/proc/} $(tr "\0" " " <"$p/cmdline" 2>/dev/null | cut -c1-60)"
      kill -KILL "${p#/proc/}" 2>/dev/null
    fi
  done
fi
[ -e "$DIR/bridge" ] && ip link del "$(cat "$DIR/bridge")" 2>/dev/null
rm -f "$DIR/pids" "$DIR/bridge"
echo "slurm_down: stopped ($DIR kept for its logs)"
