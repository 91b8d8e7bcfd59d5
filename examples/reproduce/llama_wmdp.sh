#!/usr/bin/env bash
# The paper's main experiment (arXiv 2602.18868) on one 80 GB GPU: Llama-3.1-8B-Instruct is hardened, relearning of
# WMDP-bio is tried on it and on the original, and accuracy is measured with lm-eval before and after.
#
#   HF_TOKEN=… bash examples/reproduce/llama_wmdp.sh
#
# Everything it depends on is a variable with the paper's value, so the same script runs on a small model with the
# stand-in for WMDP (no network, some minutes on two cores):
#
#   HF_HUB_OFFLINE=1 MODEL=examples/tiny_llama/model DATASET=examples/reproduce/standin/sums_corpus.jsonl \
#   EVAL_TASKS=standin_sums UTILITY_TASKS=standin_python EVAL_TASK_PATH=examples/reproduce/standin \
#   STEPS=4 PAPER_DTYPE=float32 CERTIFY="--formats", "none" OUT=demo/standin bash examples/reproduce/llama_wmdp.sh
#
# What is the paper's: model, questions, α, k, the three learning rates, the tasks of utility. What is chosen here,
# because this project doesn't know the paper's: the layers (harden's default: all that write to the residual stream),
# batch, and the corpus. STEPS covers the paper's best steps on the original (93, 20 and 10 at the three rates) and on
# SpecDef (10); of the earlier defences the slowest took 510. The paper keeps the best accuracy of a run. Here accuracy
# is measured after a run's last step, so give STEPS=10, 20 or 93 to look at a rate where the paper does.
#
# DATASET: the bio forget corpus is gated, and its authors grant access to it; HF_TOKEN must be of an account that has
# it. No trained weights are kept, only curves and accuracies.
#
# What fits. Memory on paper, in GB of 10⁹ bytes; an 80 GB card has about 85. Activations are the bytes that autograd
# saves for a step of 4 × 128 tokens, counted on the meta device. P parameters, of which T train, P = 8.03·10⁹ for the
# original, 9.10·10⁹ with the 64 compensations of 4096 × 4096:
#
#                                                   weights    gradient, AdamW's moments  activations    together
#   full, AdamW, bfloat16          original  2 P  = 16.1        6 T = 48.2                   4.4            69
#                                  factors          18.2              54.6                   4.7            78
#   full, AdamW, float32           original  4 P  = 32.1       12 T = 96.4                   7.0           135, no
#   full, Adafactor, float32       factors          36.4        4 T = 36.4                   7.5            80, too tight
#   LoRA on all linears, float32   factors          36.4       T = 0.05·10⁹: 0.6             7.0            44
#   every third layer, AdamW, f32  factors          36.4       T = 2.27·10⁹: 27.2            5.1            69
#   the same, width 1.5×           P = 10.85·10⁹:   43.4       T = 1.77·10⁹: 21.3            about 5.5      70
#   the same, depth 2              P = 10.18·10⁹:   40.7       T = 2.27·10⁹: 27.2            about 5.5      73
#
# A CUDA context, the logits' gradient and fragmentation come on top, some 2 GB; none of this was run on such a card yet.
#
# So the paper's own attack, full fine-tuning, fits in bfloat16 only (PAPER_DTYPE), where an update of size η is lost on
# every weight above some 500 η: most of them at η = 1e-6. The report says so, and that this flatters a defence. The
# sweep therefore runs in float32 (DTYPE) on what fits so: adapters, and all parameters of every third layer. Loading
# float32 takes 37 GB of the host's memory.
set -eu -o pipefail
here=$(dirname "${BASH_SOURCE[0]}")

MODEL=${MODEL:-meta-llama/Llama-3.1-8B-Instruct}
OUT=${OUT:-llama_wmdp}
METHODS=${METHODS:-factors fold}                     # the paper's, and the one without new layers
ALPHA=${ALPHA:-1e4}
TOP_K=${TOP_K:-25}
LAYERS=${LAYERS:-}                                   # globs; empty for all that write to the residual stream

DATASET=${DATASET:-cais/wmdp-bio-forget-corpus}
TEXT_COLUMN=${TEXT_COLUMN:-text}
EVAL_TASKS=${EVAL_TASKS:-wmdp_bio}                   # measured before, and after every run
UTILITY_TASKS=${UTILITY_TASKS-mmlu winogrande arc_challenge hellaswag}  # measured before: they take longer than a run
EVAL_TASK_PATH=${EVAL_TASK_PATH:-}                   # a directory with tasks of your own

PAPER_RATES=${PAPER_RATES:-1e-6 1e-5 3e-5}
PAPER_DTYPE=${PAPER_DTYPE:-bfloat16}
SUITE=${SUITE:-$here/llama_wmdp.toml}
DTYPE=${DTYPE:-float32}
STEPS=${STEPS:-100}
BATCH_SIZE=${BATCH_SIZE:-4}
SEQUENCE_LENGTH=${SEQUENCE_LENGTH:-128}
JOBS=${JOBS:-1}                                      # with several GPUs, runs at a time, one on each
# The Hessian of 8·10⁹ parameters and every deployment format are days on the CPU, where a certificate is measured.
CERTIFY=${CERTIFY---no-curvature --formats none}
PYTHON=${PYTHON:-python}

specdef() { "$PYTHON" -m specdef_cli "$@"; }
# "repeat --lr 1e-6 1e-5" is "--lr 1e-6 --lr 1e-5": one word a line, for mapfile.
repeat() { local flag=$1 value; shift; set -f; for value in $*; do printf '%s\n' "$flag" "$value"; done; set +f; }

mapfile -t layers < <(repeat --layers "$LAYERS")
mapfile -t rates < <(repeat --lr "$PAPER_RATES")
mapfile -t tasks < <(repeat --eval-task "$EVAL_TASKS")
mapfile -t released < <(repeat --task "$EVAL_TASKS $UTILITY_TASKS")
task_path=()
if [ -n "$EVAL_TASK_PATH" ]; then task_path=(--eval-task-path "$EVAL_TASK_PATH"); fi
mkdir -p "$OUT"

# 1. Harden. What is there already is kept, here and below, so that the script goes on where it was stopped.
for method in $METHODS; do
  settings=()
  if [ "$method" = factors ]; then settings=(--alpha "$ALPHA" --top-k "$TOP_K" "${layers[@]}"); fi
  [ -d "$OUT/$method" ] || specdef harden "$MODEL" --method "$method" "${settings[@]}" --resume --out "$OUT/$method"
done

# 2. Accuracy at release: what hardening cost.
models=("$MODEL")
for method in $METHODS; do models+=("$OUT/$method"); done
[ -f "$OUT/released.json" ] ||
  "$PYTHON" "$here/accuracy.py" "${models[@]}" "${released[@]}" "${task_path[@]}" --out "$OUT/released.json"

# 3. Attack, the original beside it on the same budget: at the paper's rates, then over the sweep.
for method in $METHODS; do
  attack=(
    attack "$OUT/$method" --control "$MODEL" --dataset "$DATASET" --text-column "$TEXT_COLUMN" --runs "$OUT/runs"
    --steps "$STEPS" --batch-size "$BATCH_SIZE" --sequence-length "$SEQUENCE_LENGTH" --jobs "$JOBS"
    "${tasks[@]}" "${task_path[@]}"
  )
  specdef "${attack[@]}" --recipe full "${rates[@]}" --dtype "$PAPER_DTYPE" --out "$OUT/$method-paper"
  specdef "${attack[@]}" --suite "$SUITE" --dtype "$DTYPE" --out "$OUT/$method-sweep"
done

# 4. Certify, with the sweep as the attacks that were tried. A claim that fails ends the script with 1, after the rest.
failed=0
for method in $METHODS; do
  # shellcheck disable=SC2086  # options are words
  specdef certify "$OUT/$method" --base "$MODEL" --attacks "$OUT/$method-sweep/report.json" $CERTIFY \
    --out "$OUT/$method-certificate" || failed=1
done

# 5. Tables.
paper=() sweep=()
for method in $METHODS; do
  paper+=("$OUT/$method-paper/report.json") sweep+=("$OUT/$method-sweep/report.json")
done
{
  "$PYTHON" "$here/llama_wmdp.py" --released "$OUT/released.json" --paper "${paper[@]}" --sweep "${sweep[@]}"
  printf '\n## Progress as a share of the original'\''s, each at its best rate\n\n'
  "$PYTHON" -m specdef_cli compare "${sweep[@]}" --markdown
} | tee "$OUT/tables.md"
exit $failed
