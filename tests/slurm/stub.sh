#!/usr/bin/env bash
# In the place of Python (FCMAE_PYTHON): a run of which only the end matters. It waits for a signal and ends with 75;
# after STUB_RESTARTS requeues it ends with 0. With STUB_CODE it does not wait, and ends with that.
if ((${SLURM_RESTART_COUNT:-0} >= ${STUB_RESTARTS:-1})); then
    exit 0
fi
if [[ -n ${STUB_CODE:-} ]]; then
    exit "$STUB_CODE"
fi
trap 'echo "stub $SLURM_PROCID: stopped"; exit 75' USR1 TERM
echo "stub $SLURM_PROCID: waits"
for _ in {1..3000}; do
    sleep 0.1
done
