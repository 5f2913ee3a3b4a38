# Sourced by scripts/train.sh for --demo: llava-tiny instead of a released model, drawn scenes instead
# of LLaVA's data, and settings that do something in minutes. What is set in the environment stays.
# WORK is the folder of the demo, LIMIT the number of questions asked before and after. A second run
# continues what was cut off.
WORK=${WORK:-outputs/demo}
DATA=${DATA:-$WORK/data/conversations.json}
IMAGES=${IMAGES:-$WORK/data/images}
OUTPUT=${OUTPUT:-$WORK/$stage}
BATCH=${BATCH:-8}
GLOBAL_BATCH=${GLOBAL_BATCH:-8}
REPORT_TO=${REPORT_TO:-none}
export OPENBLAS_NUM_THREADS=1 # numpy's threads would fight torch's
demo_arguments=(
    --gradient_checkpointing False --dataloader_num_workers 1 --logging_steps 10 --save_steps 50
    --seed 0
)
rates=(--adam_beta2 0.98 --mm_projector_lr 2e-5 --parallel_turns 0.9)
pruned=(--pruner zoo --keep-tokens-range 32 576)

case $stage in
pretrain) # from a projector of random weights between the tower and the language model of llava-tiny
    MODEL=${MODEL:-$WORK/data/language-model} TOWER=${TOWER-$WORK/data/vision-tower}
    [ "$DATA" != "$WORK/data/conversations.json" ] || DATA=$WORK/data/captions.json
    demo_arguments+=(--max_steps 100)
    ;;
finetune | finetune_task) # the model's projector moves slowly, as when llava-tiny was made
    demo_arguments+=(--max_steps 240 --learning_rate 3e-4 "${rates[@]}" "${pruned[@]}")
    ;;
finetune_lora | finetune_task_lora)
    demo_arguments+=(--max_steps 100 --learning_rate 1e-3 "${rates[@]}" "${pruned[@]}")
    ;;
*) fail "this script has no demo; scripts/v1_5/finetune.sh --demo is one" ;;
esac
MODEL=${MODEL:-llava-tiny} TOWER=${TOWER-} PROJECTOR=${PROJECTOR-}

# Draw what is missing, unless the user brought data.
draw_demo() {
    [ "$IMAGES" = "$WORK/data/images" ] || return 0
    [ -f "$WORK/data/demo-data.json" ] || "$PYTHON" -m llava.train.tiny.demo_data "$WORK/data"
}

# Print what the run came to.
score_demo() {
    local words=(losses "$OUTPUT")
    if [ "$stage" != pretrain ]; then
        words=(score --after "$OUTPUT" --folder "$WORK/$stage-score" --run "$demo_command")
        words+=(--limit "${LIMIT:-720}")
        case $stage in
        *lora) words+=(--model-base "$MODEL") ;;
        esac
        [ -n "$PROJECTOR" ] || words+=(--before "$MODEL")
    fi
    "$PYTHON" scripts/finetune_demo.py "${words[@]}"
}
