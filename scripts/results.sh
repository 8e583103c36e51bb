#!/usr/bin/env bash
# Does pre-training help, and what makes it FCMAE? On the embedded digits, from pre-training to the numbers of
# docs/results.md: scripts/results.sh FOLDER [PART ...], then python scripts/results_table.py FOLDER. About two hours of
# one CPU core. Typed again it goes on: a finished run says so and ends at once.
set -euo pipefail
out=$(realpath -m "${1:?usage: scripts/results.sh FOLDER [PART ...]}")
parts=("${@:2}")
[[ ${#parts[@]} -gt 0 ]] || parts=(pretrain labels crops ablations recipe)
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PYTHONPATH=scripts${PYTHONPATH:+:$PYTHONPATH}
python=$([[ -x .venv/bin/python ]] && echo .venv/bin/python || echo python)

size=(+model=custom "model.depths=[1,1,3,1]" "model.dims=[32,64,128,256]" trainer=cpu)
rates=5.12e-3,1.536e-2,4.608e-2 # 5e-4, 1.5e-3, 4.5e-3 at 25 images per step

pretrain() { # name, seeds, options
    "$python" -m fcmae.pretrain -m "${size[@]}" model.decoder_dim=128 data=digits epochs=20 optim.warmup_epochs=2 \
        pictures=0 trainer.check_val_every_n_epoch=20 "run_dir=$out/pretrain/$1-\${seed}" "seed=$2" "${@:3}"
}

finetune() { # name, images per class, seeds, options: 100 steps of 25 images, however many labels there are
    local epochs=$((100 * 25 / ($2 * 10)))
    "$python" -m fcmae.finetune -m "${size[@]}" data=digits data.batch_size=25 "data.shots=$2" "epochs=$epochs" \
        "trainer.check_val_every_n_epoch=$epochs" "optim.warmup_epochs=$((epochs / 10))" model.head_init_scale=1 \
        "run_dir=$out/finetune/$1/\${data.shots}_\${optim.base_lr}_\${seed}" "seed=$3" "${@:4}"
}

# Pictures as they are and a plain loss: nothing but the start differs.
plain=("augment.crop_scale=[1,1]" label_smoothing=0 model.drop_path_rate=0 optim.layer_decay=1 "optim.base_lr=$rates")
from() { echo "checkpoint=$out/pretrain/$1-\${seed}"; }

for part in "${parts[@]}"; do
    case $part in
    pretrain)
        pretrain fcmae 0,1,2,3,4
        ;;
    labels)
        for shots in 5 10 50; do
            finetune fcmae $shots 0,1,2,3,4 "${plain[@]}" "$(from fcmae)"
            finetune scratch $shots 0,1,2,3,4 "${plain[@]}" checkpoint=null
        done
        ;;
    crops) # the same with random crops of at least half a picture
        finetune crops-fcmae 10 0,1,2,3,4 "${plain[@]}" "augment.crop_scale=[0.5,1]" "$(from fcmae)"
        finetune crops-scratch 10 0,1,2,3,4 "${plain[@]}" "augment.crop_scale=[0.5,1]" checkpoint=null
        ;;
    ablations)
        pretrain leaky 0,1,2 model._target_=ablations.leaky
        pretrain no-grn 0,1,2 model.use_grn=false
        pretrain mask-30 0,1,2 masking.mask_ratio=0.3
        pretrain mask-90 0,1,2 masking.mask_ratio=0.88 # 8 of 9 patches; 0.9 would hide all
        finetune leaky 10 0,1,2 "${plain[@]}" "$(from leaky)"
        finetune no-grn 10 0,1,2 "${plain[@]}" "$(from no-grn)" model.use_grn=false
        finetune mask-30 10 0,1,2 "${plain[@]}" "$(from mask-30)"
        finetune mask-90 10 0,1,2 "${plain[@]}" "$(from mask-90)"
        ;;
    recipe) # experiment=finetune_small_data: each choice turned back, one at a time; what digits leave out, put back
        recipe=(experiment=finetune_small_data data.batch_size=25)
        for shots in 10 50; do
            epochs=$((shots == 10 ? 25 : 10)) # 100 and 200 steps
            one_choice() { # name, options
                finetune "recipe$1" "$shots" 0,1,2,3,4 "${recipe[@]}" "$(from fcmae)" optim.base_lr=1.536e-2 \
                    "epochs=$epochs" "trainer.check_val_every_n_epoch=$epochs" "optim.warmup_epochs=$((epochs / 10))" \
                    "${@:2}"
            }
            one_choice "" "optim.base_lr=$rates"
            one_choice -scratch checkpoint=null "optim.base_lr=$rates"
            one_choice -whole-pictures "augment.crop_scale=[1,1]"
            one_choice -crop-0.08 "augment.crop_scale=[0.08,1]"
            one_choice -mixed batch_augment.mixup=0.8 batch_augment.cutmix=1 data.batch_size=24 # pairs
            one_choice -erasing batch_augment.random_erasing=0.25
            one_choice -randaugment augment.randaugment=rand-m9-mstd0.5-inc1
            one_choice -head-0.001 model.head_init_scale=0.001
            one_choice -layer-decay-0.9 optim.layer_decay=0.9
            one_choice -no-smoothing label_smoothing=0
            one_choice -drop-path-0.2 model.drop_path_rate=0.2
            one_choice -imagenet batch_augment.mixup=0.8 batch_augment.cutmix=1 data.batch_size=24 batch_augment.random_erasing=0.25 \
                augment.randaugment=rand-m9-mstd0.5-inc1 model.head_init_scale=0.001 optim.layer_decay=0.9 \
                model.drop_path_rate=0.2 # what tiny takes on ImageNet-1K, at the rates and steps of here
        done
        ;;
    *)
        echo "results.sh: $part is none of pretrain labels crops ablations recipe" >&2
        exit 2
        ;;
    esac
done
