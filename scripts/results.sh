#!/usr/bin/env bash
# Does pre-training help, and what makes it FCMAE? On the embedded digits, from pre-training to the tables of
# docs/results.md: scripts/results.sh FOLDER. Three to four hours of one CPU core; typed again it goes on.
set -euo pipefail
out=$(realpath -m "${1:?usage: scripts/results.sh FOLDER}")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=scripts${PYTHONPATH:+:$PYTHONPATH}
python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)

size=(+model=custom "model.depths=[1,1,3,1]" "model.dims=[32,64,128,256]" trainer=cpu)

# A run that is finished says so and ends at once.
pretrain() { # name, seeds, options
    "$python" -m fcmae.pretrain -m "${size[@]}" model.decoder_dim=128 data=digits epochs=20 optim.warmup_epochs=2 \
        pictures=0 trainer.check_val_every_n_epoch=20 "run_dir=$out/pretrain/$1-\${seed}" "seed=$2" "${@:3}"
}

# 100 steps of 25 images each, whatever the number of labels: plain pictures and a plain loss, so that nothing but the
# start differs.
finetune() { # name, images per class, seeds, learning rates, options
    local epochs=$((100 * 25 / ($2 * 10)))
    "$python" -m fcmae.finetune -m "${size[@]}" data=digits data.batch_size=25 "data.shots=$2" "epochs=$epochs" \
        "optim.warmup_epochs=$(bc -l <<<"$epochs / 10")" "trainer.check_val_every_n_epoch=$epochs" \
        experiment=finetune_small_data "run_name=$1" "run_dir=$out/finetune/\${run_name}/\${data.shots}-\${optim.base_lr}-\${seed}" \
        "seed=$3" "optim.base_lr=$4" "${@:5}"
}
