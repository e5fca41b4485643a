"""Megatron-LM's flags: what they set, what is left out aloud, and every way to get them wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import cli
from planner.megatron_flags import IGNORED, REFUSED, TAKEN, why_refused
from planner.megatron_order import MegatronOrder, read_command
from planner.megatron_packing import PackingWishes
from profiles.catalogue import resolve_model
from profiles.input_error import InputError

NO_DROPOUT = "--hidden-dropout 0 --attention-dropout 0.0 "
LLAMA = NO_DROPOUT + (
    "--num-layers 32 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention "
    "--num-query-groups 8 --max-position-embeddings 8192 --position-embedding-type rope --rotary-base 500000 "
    "--normalization RMSNorm --swiglu --untie-embeddings-and-output-weights --disable-bias-linear --seq-length 4096 "
    "--global-batch-size 64 --tokenizer-type NullTokenizer --vocab-size 128255 --bf16 "
)
GPT = NO_DROPOUT + (
    "--num-layers 24 --hidden-size 1024 --num-attention-heads 16 --max-position-embeddings 1024 --seq-length 1024 "
    "--global-batch-size 8 --padded-vocab-size 50257 "
)

USUAL = (  # as scripts have it, dropout left at its default
    "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --num-layers 32 --hidden-size 4096 "
    "--num-attention-heads 32 --seq-length 4096 --max-position-embeddings 4096 --micro-batch-size 1 "
    "--global-batch-size 64 --lr 1.5e-4 --min-lr 1.5e-5 --lr-decay-style cosine --train-iters 500 --bf16 "
    "--data-path X_text_document --tokenizer-type HFTokenizer --tokenizer-model folder --save run --save-interval 100 "
    "--log-interval 10 "
)


def read(text: str, vocabulary: int = 1000) -> MegatronOrder:
    return read_command(text.split(), lambda _: vocabulary)


def check_all(text: str) -> None:
    order = read(text)
    order.pins(8)
    order.run.require_trainable()


def said(text: str) -> str:
    with pytest.raises(InputError) as error:
        check_all(text)
    return str(error.value)


# ---- the table -------------------------------------------------------------------------------------------------


def test_a_flag_is_taken_ignored_or_refused_and_only_one_of_them() -> None:
    assert not set(TAKEN) & set(IGNORED)
    assert not set(TAKEN) & set(REFUSED)
    assert not set(IGNORED) & set(REFUSED)
    assert [flag for flag in (*TAKEN, *IGNORED) if why_refused(flag) is not None] == []
    assert why_refused("--inference-max-seq-length") == "is of another kind of training"
    assert len(TAKEN) > 100


# ---- models ----------------------------------------------------------------------------------------------------


def test_the_flags_of_a_llama_are_the_catalogues_model() -> None:
    known = resolve_model("llama3-8b")
    assert read(LLAMA).model == replace(known, name="megatron-32x4096", family="megatron")


def test_defaults_are_megatrons_gpt() -> None:
    known = resolve_model("gpt2-medium")
    found = read(GPT).model
    assert found == replace(known, name="megatron-24x1024", family="megatron")
    assert found.activation == "gelu_tanh"  # the fused bias and GELU
    assert read(GPT + "--no-bias-gelu-fusion").model.activation == "gelu"
    assert read(GPT + "--swiglu").model.ffn_hidden_size == 2688  # 2/3 of 4096, a multiple of 64


def test_the_vocabulary_is_padded_for_tp() -> None:
    flags = GPT.replace("--padded-vocab-size 50257", "--tokenizer-type HFTokenizer --tokenizer-model folder")
    assert read(flags, 50257).model.vocab_size == 50304
    assert read(flags + " --tensor-model-parallel-size 8", 50257).model.vocab_size == 51200
    assert read(flags + " --make-vocab-size-divisible-by 1", 50257).model.vocab_size == 50257


def test_the_flags_of_mixtral_and_deepseek_are_the_catalogues_experts() -> None:
    mixtral = read(LLAMA + "--num-experts 8 --moe-router-topk 2 --moe-grouped-gemm").model
    assert mixtral.experts == resolve_model("mixtral-8x7b").experts
    assert mixtral.ffn_hidden_size == 14336
    deepseek = read(
        NO_DROPOUT + "--num-layers 61 --hidden-size 7168 --ffn-hidden-size 18432 --num-attention-heads 128 --swiglu "
        "--disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-6 --position-embedding-type rope "
        "--max-position-embeddings 163840 --untie-embeddings-and-output-weights --multi-latent-attention "
        "--qk-layernorm --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 --qk-pos-emb-head-dim 64 "
        "--v-head-dim 128 --num-experts 256 --moe-router-topk 8 --moe-ffn-hidden-size 2048 "
        "--moe-shared-expert-intermediate-size 2048 --moe-layer-freq ([0]*3+[1]*58) "
        "--moe-router-score-function sigmoid --moe-router-topk-scaling-factor 2.5 --moe-router-num-groups 8 "
        "--moe-router-group-topk 4 --moe-router-enable-expert-bias --padded-vocab-size 129280 --seq-length 4096 "
        "--global-batch-size 64"
    ).model
    known = resolve_model("deepseek-v3")
    assert deepseek.experts is not None
    assert known.experts is not None
    assert replace(deepseek.experts, shared_ffn_hidden_size=None) == replace(known.experts, shared_ffn_hidden_size=None)
    assert deepseek.latent_attention == known.latent_attention
    assert deepseek.parameters == known.parameters


# ---- layout ----------------------------------------------------------------------------------------------------


def pins(flags: str, devices: int = 16) -> tuple[set[str], tuple[str, ...]]:
    found, remarks = read(LLAMA + flags).pins(devices)
    return set(found), remarks


def test_what_is_left_open_is_not_pinned() -> None:
    assert pins("") == (set(), ())
    found, remarks = pins("--tensor-model-parallel-size 4 --sequence-parallel --use-distributed-optimizer")
    assert (found, remarks) == ({"tp=4", "sequence_parallel=true", "zero=1"}, ())
    found, remarks = pins("--sequence-parallel --micro-batch-size 2")
    assert found == {"micro_batch=2"}
    assert remarks == ("--sequence-parallel ignored: tp is left to the planner, and so is it",)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 2", {"virtual_stages=4"}),
        ("--pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 2", {"virtual_stages=2"}),
        ("--pipeline-model-parallel-size 4 --num-layers-per-virtual-pipeline-stage 8", {"virtual_stages=1"}),
    ],
)
def test_chunks(flags: str, expected: set[str]) -> None:
    interleaved = set() if expected == {"virtual_stages=1"} else {"schedule=interleaved-1f1b"}
    assert pins(flags)[0] == {"pp=4"} | expected | interleaved


def test_sharding() -> None:
    whole = "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 2 --context-parallel-size 1 "
    assert "zero=0" in pins(whole + "--use-distributed-optimizer", devices=8)[0]  # dp is 1
    copies = pins(whole + "--use-distributed-optimizer --num-distributed-optimizer-instances 2", devices=32)[0]
    assert {"zero=1", "dp_shard=2"} <= copies
    assert pins("--use-torch-fsdp2")[0] == {"zero=3"}
    assert pins("--use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward")[0] == {"zero=2"}
    assert pins("--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params")[0] == {"zero=3"}


def test_recomputation() -> None:
    assert pins("--recompute-activations")[0] == {"recompute=selective"}
    found, remarks = pins("--recompute-granularity full --recompute-method block --recompute-num-layers 2")
    assert found == {"recompute=none|full"}
    assert remarks == ("--recompute-num-layers 2 ignored: the planner says how many layers of a stage recompute",)


def test_context_and_experts() -> None:
    found = pins("--context-parallel-size 2 --cp-comm-type a2a --num-experts 8 --expert-model-parallel-size 4")[0]
    assert found == {"cp=2", "cp_style=all-to-all", "ep=4"}


def test_a_usual_command_is_taken_as_it_stands() -> None:
    assert "dropout is not trained here" in said(USUAL)
    order = read(USUAL + NO_DROPOUT)
    model, run = order.model, order.run
    assert order.remarks == ()
    assert order.pins(16) == (("tp=4", "pp=2", "micro_batch=1"), ())
    assert (model.layers, model.hidden_size, model.heads, model.max_positions) == (32, 4096, 32, 4096)
    assert (order.sequence, order.global_batch, order.precision) == (4096, 64, "bf16")
    assert (run.learning_rate, run.min_learning_rate, run.shape, run.steps) == (1.5e-4, 1.5e-5, "cosine", 500)
    assert (run.paths, run.tokenizer, run.save) == (("X_text_document",), "folder", "run")
    assert (run.checkpoint_every, run.log_every) == (100, 10)


# ---- the run ---------------------------------------------------------------------------------------------------


def test_a_run_has_megatrons_defaults() -> None:
    run = read(LLAMA + "--lr 1e-3 --train-iters 100").run
    run.require_trainable()
    assert (run.shape, run.min_learning_rate, run.warmup_steps, run.decay_steps) == ("linear", 0.0, 0, None)
    assert (run.weight_decay, run.clip_norm, run.betas, run.epsilon, run.seed) == (0.01, 1.0, (0.9, 0.999), 1e-8, 1234)
    assert (run.log_every, run.validation_every, run.validation_batches) == (100, 1000, 100)
    assert (run.timeout_seconds, run.checkpoint_every, run.profile_steps, run.wandb) == (600.0, 0, None, None)


def test_a_loss_scale_is_of_fp16() -> None:
    fp16 = LLAMA.replace("--bf16", "--fp16")
    order = read(fp16 + "--loss-scale 0 --initial-loss-scale 65536 --loss-scale-window 500 --hysteresis 4")
    run = order.run
    assert (order.precision, run.loss_scale, run.initial_loss_scale, run.min_loss_scale) == ("fp16", None, 65536, 1)
    assert (run.loss_scale_window, run.hysteresis) == (500, 4)
    assert not any("fp16" in remark for remark in order.remarks)
    run = read(fp16 + "--loss-scale 1024").run
    assert (run.loss_scale, run.initial_loss_scale, run.loss_scale_window, run.hysteresis) == (1024, 2**32, 1000, 2)
    said = "--loss-scale ignored: it is of fp16, and other precisions have no loss scale"
    assert said in read(LLAMA + "--loss-scale 1024").remarks


def test_samples_shares_and_windows() -> None:
    run = read(
        LLAMA + "--lr=1e-3 --train-samples 6400 --lr-warmup-fraction 0.1 --lr-decay-samples 5120 --clip-grad 0 "
        "--lr-decay-style WSD --lr-wsd-decay-iters 20 --lr-wsd-decay-style minus_sqrt --profile "
        "--profile-step-start 4 --data-path 0.3 a 0.7 b --split 90,5,5 --tokenizer-model folder --eval-iters 0"
    ).run
    assert (run.steps, run.decay_steps, run.warmup_steps) == (100, 80, 8)
    assert (run.shape, run.cooldown, run.cooldown_steps, run.clip_norm) == ("wsd", "minus-sqrt", 20, None)
    assert run.profile_steps == (5, 12)
    assert (run.paths, run.split, run.tokenizer) == (("0.3", "a", "0.7", "b"), "90,5,5", None)  # of NullTokenizer


def test_without_data_there_is_text() -> None:
    order = read(LLAMA + "--mock-data --split 99,1,0 --data-cache-path cache")
    assert (order.run.paths, order.run.split, order.run.cache) == ((), None, None)
    assert order.remarks == ("no --data-path: trained on the text of Python's library, as bytes",)


def test_what_means_nothing_here_is_said() -> None:
    remarks = read(LLAMA + "--use-flash-attn --transformer-impl local --num-workers 2").remarks
    assert remarks[:2] == (
        "--use-flash-attn, --transformer-impl ignored: kernels are torch's, or compiled",
        "--num-workers ignored: the data loader is our own",
    )


# ---- what is wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (LLAMA + "--tensor-model-paralel-size 2", "try: is --tensor-model-parallel-size meant?"),
        (LLAMA + "--xyzzy", "--xyzzy is no flag of Megatron-LM's that is known here"),
        (LLAMA + "--fp8-format hybrid", "--fp8-format is a precision that is not trained here"),
        (LLAMA + "--rampup-batch-size 16 8 300", "--rampup-batch-size is not done here, and would change the numbers"),
        (LLAMA + "--fp16", "--bf16 and --fp16 contradict each other"),
        (
            LLAMA + "--num-layers 16",
            "--num-layers contradicts itself; where: --num-layers; expected: one value; got: 32",
        ),
        (LLAMA + "--norm-epsilon 1e-6 --layernorm-epsilon 1e-5", "--layernorm-epsilon contradicts --norm-epsilon"),
        (LLAMA + "--num-layers", "--num-layers takes one value"),
        (LLAMA + "--swiglu yes", "--swiglu takes no value"),
        (LLAMA + "--lr fast", "--lr cannot be 'fast'; where: --lr; expected: a number >= 0; got: fast"),
        (LLAMA + "--lr nan", "--lr cannot be 'nan'"),
        (LLAMA + "--seed 4294967296", "expected: a whole number >= 0 and <= 4294967295; got: 4294967296"),
        (LLAMA + "--lr-decay-style cosin", "try: is cosine meant?"),
        ("8 --num-layers 2", "'8' stands before any flag"),
        (LLAMA.replace("--seq-length 4096", "--seq-length 9000"), "sequences are longer than positions reach"),
        (LLAMA.replace("--hidden-dropout 0", ""), "try: add --hidden-dropout 0"),
        (LLAMA.replace("--hidden-dropout 0", "--hidden-dropout 0.1"), "dropout is not trained here"),
        (LLAMA.replace("--group-query-attention", ""), "--num-query-groups means nothing without grouped queries"),
        (LLAMA.replace("--num-query-groups 8", "--num-query-groups 5"), "where: --num-query-groups"),
        (LLAMA.replace("--global-batch-size 64", ""), "--global-batch-size is missing"),
        (LLAMA.replace("--vocab-size 128255", ""), "nothing says how many tokens there are"),
        (LLAMA + "--lr-warmup-iters 3 --lr-warmup-fraction 0.1", "contradict each other"),
        (LLAMA + "--num-layers-per-virtual-pipeline-stage 4", "chunks are of a pipeline"),
        (
            LLAMA + "--pipeline-model-parallel-size 8 --num-layers-per-virtual-pipeline-stage 3",
            "expected: a divisor of 32 layers / pp=8",
        ),
        (LLAMA + "--recompute-method block", "nothing is recomputed"),
        (LLAMA + "--moe-router-topk 2", "--moe-router-topk is of experts"),
        (LLAMA + "--num-experts 4 --moe-layer-freq [1]*9**9", "is no pattern of layers"),
        (LLAMA + "--num-experts 4 --moe-layer-freq ([1]*16+[0]*16)", "the pattern of layers cannot be expressed"),
        (GPT + "--qk-layernorm", "queries and keys are normed by RMSNorm here"),
        (
            LLAMA.replace("NullTokenizer", "GPT2BPETokenizer") + "--reset-attention-mask --data-path a",
            "nothing says which token ends a document; where: --reset-attention-mask",
        ),
        (LLAMA + "--save a --load b", "a run goes on in its own folder"),
        (LLAMA + "--train-iters 10", "--lr is missing"),
        (LLAMA + "--lr 1e-4 --min-lr 1e-3 --train-iters 10", "the least learning rate is above the peak"),
    ],
)
def test_a_wrong_command_is_told_in_words(flags: str, expected: str) -> None:
    assert expected in said(flags)


def test_ends_of_documents_change_what_the_flags_say() -> None:
    assert read(LLAMA).run.packing == PackingWishes()
    all_three = "--reset-position-ids --reset-attention-mask --eod-mask-loss "
    text = read(LLAMA + all_three)
    assert text.run.packing == PackingWishes(reset_positions=True, reset_attention=True, mask_loss=True)
    assert any("--calculate-per-token-loss" in remark for remark in text.remarks)
    assert read(LLAMA + all_three + "--data-path a").run.packing.eod == "128255"  # NullTokenizer's own id
    tokenizer = LLAMA.replace("NullTokenizer", "HFTokenizer --tokenizer-model folder")
    assert read(tokenizer + "--reset-attention-mask --data-path a").run.packing == PackingWishes(reset_attention=True)
    # RoPE looks no position up, learned positions do.
    alone = read(LLAMA + "--reset-position-ids")
    assert alone.run.packing == PackingWishes()
    assert any(remark.startswith("--reset-position-ids ignored") for remark in alone.remarks)
    assert read(GPT + "--reset-position-ids").run.packing == PackingWishes(reset_positions=True)


def test_the_end_of_gpt2s_documents_is_in_its_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 0, "<|endoftext|>": 7}')
    flags = GPT + f"--tokenizer-type GPT2BPETokenizer --vocab-file {tmp_path}/vocab.json --data-path a --eod-mask-loss"
    assert read(flags).run.packing == PackingWishes(mask_loss=True, eod="7")


# ---- the verb --------------------------------------------------------------------------------------------------


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["cli.py", "megatron", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0)


def test_a_command_is_planned_as_its_flags_say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (LLAMA + "--tensor-model-parallel-size 4 --pipeline-model-parallel-size 1 --sequence-parallel").split()
    code = run(["--cluster", "dgx-h100:1", "--plan-only", *words, "--use-distributed-optimizer"], monkeypatch)
    printed = capsys.readouterr()
    assert code == 0
    assert "tp4·sp dp2 zero1" in printed.out
    assert "taken from the flags: tp=4, pp=1, sequence_parallel=true, zero=1" in " ".join(printed.err.split())
    assert "within documents" not in printed.out
    assert run(["--cluster", "dgx-h100:1", "--plan-only", *words, "--reset-attention-mask"], monkeypatch) == 0
    assert "attention stays within documents, all of" in capsys.readouterr().out
    absent = ["--reset-attention-mask", "--data-path", "/no/such/data"]
    assert run(["--cluster", "dgx-h100:1", "--plan-only", *words, *absent], monkeypatch) == 0
    assert "attention is priced in full, as if no document ended" in " ".join(capsys.readouterr().err.split())


def test_what_train_finds_is_told_by_megatrons_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = "--num-layers 1 --hidden-size 16 --num-attention-heads 2 --max-position-embeddings 16 --seq-length 16"
    words = [*NO_DROPOUT.split(), *flags.split(), "--global-batch-size", "2", "--padded-vocab-size", "256"]
    plan = str(tmp_path / "plan.yaml")
    assert run(["--cluster", "dgx-h100:1", "--devices", "1", "--plan-only", "-o", plan, *words], monkeypatch) == 0
    trained = ["--plan", plan, *words, "--train-iters", "1", "--lr", "1", "--save", str(tmp_path / "run")]
    capsys.readouterr()
    assert run([*trained, "--data-path", "/no/such/data"], monkeypatch) == 2
    assert "where     --data-path /no/such/data" in capsys.readouterr().err


def test_wrong_flags_end_with_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--plan-only", "--num-layer", "3"], monkeypatch) == 2
    assert "is --num-layers meant?" in capsys.readouterr().err
    assert run([*LLAMA.split(), "--train-iters", "5", "--lr", "1", "--json"], monkeypatch) == 2
    assert "--json goes with --plan-only" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run([*LLAMA.split(), "--train-iters", "5", "--lr", "1"], monkeypatch) == 2
    assert "all ranks must be told the same plan" in capsys.readouterr().err
