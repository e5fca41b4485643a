"""Megatron-LM's flags as a table: what each sets here, which mean nothing here, and which cannot be had.

Names, kinds and choices are those of megatron/training/arguments.py of Megatron-LM core (late 2025), with aliases of
older scripts. What a flag sets is a key that `megatron_model.py` and `megatron_order.py` read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Flag:
    """A flag that is taken: `kind` of its value (switch: none), and the `key` it sets, a switch to `value`.

    `words` are the values it may have -> what they set. Of `several` words each is a value, in order.
    A number is from 0 to `most`.
    """

    key: str
    kind: type | None = None
    value: Any = True
    words: Mapping[str, Any] = field(default_factory=dict)
    several: bool = False
    most: float = 1e18


def _whole(key: str, most: float = Flag.most) -> Flag:
    return Flag(key, int, most=most)


def _number(key: str) -> Flag:
    return Flag(key, float)


def _text(key: str, several: bool = False) -> Flag:
    return Flag(key, str, several=several)


def _word(key: str, *same: str, **words: Any) -> Flag:
    return Flag(key, str, words=dict.fromkeys(same) | {word: word for word in same} | words)


def _switch(key: str, value: Any = True) -> Flag:
    return Flag(key, value=value)


_COMM_STYLES = {"p2p": "ring", "a2a": "all-to-all", "allgather": "ring", "all_gather": "ring"}
_SHARDING = {"no_shard": 0, "optim": 1, "optim_grads": 2, "optim_grads_params": 3}
_TOKENIZERS = ("HuggingFaceTokenizer", "NullTokenizer", "GPT2BPETokenizer")

TAKEN: dict[str, Flag] = {
    # ---- the model
    "--num-layers": _whole("layers"),
    "--hidden-size": _whole("hidden_size"),
    "--ffn-hidden-size": _whole("ffn_hidden_size"),
    "--num-attention-heads": _whole("heads"),
    "--kv-channels": _whole("head_dim"),
    "--group-query-attention": _switch("grouped_queries"),
    "--num-query-groups": _whole("kv_heads"),
    "--max-position-embeddings": _whole("max_positions"),
    "--position-embedding-type": _word("positions", "rope", learned_absolute="learned"),
    "--use-rotary-position-embeddings": _switch("positions", "rope"),
    "--rotary-base": _whole("rope_theta"),
    "--rotary-percent": _number("rotary_fraction"),
    "--use-rope-scaling": _switch("rope_scaling"),
    "--rope-scaling-factor": _number("rope_scaling_factor"),
    "--rotary-seq-len-interpolation-factor": _whole("linear_stretch"),
    "--rope-type": _word("rope_type", "rope", "yarn"),
    "--rotary-scaling-factor": _number("yarn_factor"),
    "--normalization": _word("norm", LayerNorm="layernorm", RMSNorm="rmsnorm"),
    "--norm-epsilon": _number("norm_epsilon"),
    "--layernorm-epsilon": _number("norm_epsilon"),
    "--qk-layernorm": _switch("qk_norm"),
    "--swiglu": _switch("swiglu"),
    "--no-bias-gelu-fusion": _switch("exact_gelu"),
    "--disable-bias-linear": _switch("no_bias"),
    "--add-qkv-bias": _switch("qkv_bias"),
    "--untie-embeddings-and-output-weights": _switch("untied"),
    "--make-vocab-size-divisible-by": _whole("vocab_multiple"),
    "--vocab-size": _whole("vocab_size"),
    "--padded-vocab-size": _whole("padded_vocab_size"),
    "--hidden-dropout": _number("hidden_dropout"),
    "--attention-dropout": _number("attention_dropout"),
    "--init-method-std": _number("init_std"),
    "--multi-latent-attention": _switch("latent"),
    "--q-lora-rank": _whole("q_lora_rank"),
    "--kv-lora-rank": _whole("kv_lora_rank"),
    "--qk-head-dim": _whole("qk_head_dim"),
    "--qk-pos-emb-head-dim": _whole("qk_rope_head_dim"),
    "--v-head-dim": _whole("v_head_dim"),
    # ---- experts
    "--num-experts": _whole("experts"),
    "--moe-router-topk": _whole("top_k"),
    "--moe-ffn-hidden-size": _whole("expert_ffn"),
    "--moe-shared-expert-intermediate-size": _whole("shared_ffn"),
    "--moe-layer-freq": _text("expert_layers"),
    "--moe-router-score-function": _word("router_score", "softmax", "sigmoid"),
    "--moe-router-pre-softmax": _switch("pre_softmax"),
    "--moe-router-topk-scaling-factor": _number("router_scale"),
    "--moe-router-num-groups": _whole("groups"),
    "--moe-router-group-topk": _whole("top_groups"),
    "--moe-router-enable-expert-bias": _switch("selection_bias"),
    "--moe-router-bias-update-rate": _number("bias_rate"),
    "--moe-router-load-balancing-type": _word("balancing", "aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "--moe-aux-loss-coeff": _number("balance_loss"),
    # ---- the layout
    "--tensor-model-parallel-size": _whole("tp"),
    "--pipeline-model-parallel-size": _whole("pp"),
    "--context-parallel-size": _whole("cp"),
    "--cp-comm-type": Flag("cp_style", str, words=_COMM_STYLES),
    "--expert-model-parallel-size": _whole("ep"),
    "--expert-tensor-parallel-size": _whole("etp"),
    "--num-layers-per-virtual-pipeline-stage": _whole("chunk_layers"),
    "--num-virtual-stages-per-pipeline-rank": _whole("virtual_stages"),
    "--sequence-parallel": _switch("sequence_parallel"),
    "--use-distributed-optimizer": _switch("zero", 1),
    "--use-torch-fsdp2": _switch("torch_fsdp"),
    "--torch-fsdp2-no-reshard-after-forward": _switch("keep_gathered"),
    "--use-megatron-fsdp": _switch("megatron_fsdp"),
    "--data-parallel-sharding-strategy": Flag("sharding", str, words=_SHARDING),
    "--num-distributed-optimizer-instances": _whole("replicas"),
    "--micro-batch-size": _whole("micro_batch"),
    "--recompute-granularity": _word("recompute", "full", "selective"),
    "--recompute-activations": _switch("recompute", "selective"),
    "--recompute-method": _word("recompute_method", "uniform", "block"),
    "--recompute-num-layers": _whole("recompute_layers"),
    # ---- batch and precision
    "--global-batch-size": _whole("global_batch"),
    "--seq-length": _whole("sequence"),
    "--bf16": _switch("bf16"),
    "--fp16": _switch("fp16"),
    "--loss-scale": _number("loss_scale"),
    "--initial-loss-scale": _number("initial_loss_scale"),
    "--min-loss-scale": _number("min_loss_scale"),
    "--loss-scale-window": _number("loss_scale_window"),
    "--hysteresis": _whole("hysteresis"),
    # ---- optimization
    "--train-iters": _whole("steps"),
    "--train-samples": _whole("train_samples"),
    "--lr": _number("learning_rate"),
    "--min-lr": _number("min_learning_rate"),
    "--lr-decay-style": _word("shape", "constant", "linear", "cosine", "inverse-square-root", WSD="wsd"),
    "--lr-decay-iters": _whole("decay_steps"),
    "--lr-decay-samples": _whole("decay_samples"),
    "--lr-wsd-decay-style": _word("cooldown", "exponential", "linear", "cosine", minus_sqrt="minus-sqrt"),
    "--lr-wsd-decay-iters": _whole("cooldown_steps"),
    "--lr-wsd-decay-samples": _whole("cooldown_samples"),
    "--lr-warmup-iters": _whole("warmup_steps"),
    "--lr-warmup-samples": _whole("warmup_samples"),
    "--lr-warmup-fraction": _number("warmup_share"),
    "--lr-warmup-init": _number("warmup_from"),
    "--optimizer": _word("optimizer", "adam"),
    "--weight-decay": _number("weight_decay"),
    "--weight-decay-incr-style": _word("decay_style", "constant"),
    "--clip-grad": _number("clip_norm"),
    "--adam-beta1": _number("beta1"),
    "--adam-beta2": _number("beta2"),
    "--adam-eps": _number("epsilon"),
    "--seed": _whole("seed", most=2**32 - 1),  # what numpy's RandomState takes
    # ---- data
    "--data-path": _text("paths", several=True),
    "--split": _text("split"),
    "--data-cache-path": _text("cache"),
    "--mock-data": _switch("mock_data"),
    "--reset-position-ids": _switch("reset_positions"),
    "--reset-attention-mask": _switch("reset_attention"),
    "--eod-mask-loss": _switch("mask_loss"),
    "--tokenizer-type": _word("tokenizer_type", *_TOKENIZERS, HFTokenizer="HuggingFaceTokenizer"),
    "--tokenizer-model": _text("tokenizer"),
    "--vocab-file": _text("vocab_file"),
    # ---- the run
    "--save": _text("save"),
    "--load": _text("load"),
    "--save-interval": _whole("checkpoint_every"),
    "--async-save": _switch("async_checkpoint"),
    "--exit-duration-in-mins": _whole("exit_minutes"),
    "--log-interval": _whole("log_every"),
    "--eval-interval": _whole("validation_every"),
    "--eval-iters": _whole("validation_batches"),
    "--distributed-timeout-minutes": _whole("timeout_minutes", most=365 * 1440),
    "--wandb-project": _text("wandb"),
    "--profile": _switch("profile"),
    "--profile-step-start": _whole("profile_first"),
    "--profile-step-end": _whole("profile_end"),
}

# Flags that change nothing of what is computed here, by the reason.
_IGNORED = {
    "what is overlapped with what is the runtime's own": """overlap-grad-reduce overlap-param-gather
        overlap-param-gather-with-optimizer-step no-align-grad-reduce no-align-param-gather tp-comm-overlap
        tp-comm-overlap-cfg tp-comm-overlap-rs-dgrad disable-tp-comm-overlap-ag disable-tp-comm-overlap-rs
        disable-tp-comm-bulk-dgrad disable-tp-comm-bulk-wgrad disable-tp-comm-split-ag disable-tp-comm-split-rs
        tp-comm-bootstrap-backend no-overlap-p2p-communication overlap-p2p-communication-warmup-flush
        moe-shared-expert-overlap overlap-moe-expert-parallel-comm delay-wgrad-compute defer-embedding-wgrad-compute
        wgrad-deferral-limit no-async-tensor-model-parallel-allreduce""",
    "buckets and buffers are FSDP2's": """ddp-num-buckets ddp-bucket-size ddp-pad-buckets-for-high-nccl-busbw
        ddp-reduce-scatter-with-fp32-accumulation ddp-average-in-collective no-gradient-reduce-div-fusion
        fsdp-double-buffer suggested-communication-unit-size use-nccl-ub disable-symmetric-registration use-sharp
        sharp-enabled-group no-scatter-gather-tensors-in-pipeline use-ring-exchange-p2p
        pipeline-model-parallel-comm-backend nccl-communicator-config-path high-priority-stream-groups""",
    "kernels are torch's, or compiled": """use-flash-attn attention-backend transformer-impl use-mcore-models
        use-legacy-models no-masked-softmax-fusion no-bias-swiglu-fusion no-bias-dropout-fusion no-rope-fusion
        cross-entropy-loss-fusion cross-entropy-fusion-impl no-persist-layer-norm no-gradient-accumulation-fusion
        use-te-activation-func moe-grouped-gemm moe-use-legacy-grouped-gemm moe-permute-fusion moe-router-fusion
        moe-token-dispatcher-type moe-enable-deepep moe-deepep-num-sms enable-cuda-graph external-cuda-graph
        cuda-graph-impl cuda-graph-scope cuda-graph-warmup-steps te-rng-tracker no-clone-scatter-output-in-embedding
        spec enable-experimental""",
    "weights, gradients' sums, moments, router and loss are fp32": """accumulate-allreduce-grads-in-fp32
        attention-softmax-in-fp32 moe-router-dtype use-precision-aware-optimizer
        disable-bf16-reduced-precision-matmul""",
    "the planner says which layers a stage holds": """decoder-first-pipeline-num-layers
        decoder-last-pipeline-num-layers pipeline-model-parallel-layout account-for-embedding-in-pipeline-split
        account-for-loss-in-pipeline-split microbatch-group-size-per-virtual-pipeline-stage""",
    "recomputed is what the planner's mode says": "recompute-modules distribute-saved-activations moe-layer-recompute",
    "ranks always count tp, cp, dp, pp": "use-tp-pp-dp-mapping",
    "the run folder has TensorBoard events, metrics.jsonl and train.log": """tensorboard-dir tensorboard-log-interval
        tensorboard-queue-size log-params-norm log-num-zeros-in-grad log-throughput log-progress log-energy
        log-timers-to-tensorboard no-log-loss-scale-to-tensorboard log-validation-ppl-to-tensorboard
        log-memory-to-tensorboard log-world-size-to-tensorboard timing-log-level timing-log-option
        no-barrier-with-level-1-timing logging-level moe-per-layer-logging wandb-exp-name wandb-entity wandb-save-dir
        no-one-logger one-logger-project one-logger-run-name one-logger-async app-tag-run-name app-tag-run-version
        config-logger-dir log-straggler disable-straggler-on-startup straggler-ctrlr-port straggler-minmax-count""",
    "all ranks are traced, by torch's profiler": "use-pytorch-profiler profile-ranks",
    "steps that are not finite are always left out": """no-check-for-nan-in-loss-and-grad check-for-nan-in-loss-and-grad
        rerun-mode error-injection-rate error-injection-type""",
    "the data loader is our own": """num-workers dataloader-type no-create-attention-mask-in-dataloader
        no-mmap-bin-files num-dataset-builder-threads mid-level-dataset-surplus trust-remote-code legacy-tokenizer
        merge-file disable-msc""",
    "processes, memory and their collection are torch's": """distributed-backend local-rank lazy-mpu-init manual-gc
        manual-gc-interval no-manual-gc-eval empty-unused-memory-level use-cpu-initialization
        init-model-with-meta-device disable-gloo-process-groups distributed-timeout-seconds-after-init
        train-sync-interval record-memory-history memory-snapshot-path deterministic-mode no-initialization""",
    "checkpoints have one format, whole and by name, and load under any layout": """ckpt-format dist-ckpt-format
        use-dist-ckpt auto-detect-ckpt-format ckpt-fully-parallel-save no-ckpt-fully-parallel-save
        ckpt-fully-parallel-load ckpt-assume-constant-structure dist-ckpt-strictness dist-ckpt-save-pre-mcore-014
        dist-ckpt-optim-fully-reshardable distrib-optim-fully-reshardable-mem-efficient use-persistent-ckpt-worker
        no-save-rng no-load-rng exit-signal-handler override-opt_param-scheduler
        override-opt-param-scheduler use-checkpoint-opt_param-scheduler use-checkpoint-opt-param-scheduler""",
}
# Flags without which something else would be trained, by what is lacking. A name that ends in * stands for all that
# begin so.
_REFUSED = {
    "is not trained here": """squared-relu quick-geglu openai-gelu activation-func-clamp-value glu-linear-offset
        use-fused-weighted-squared-relu apply-layernorm-1p apply-residual-connection-post-layernorm
        no-position-embedding relative-attention-num-buckets relative-attention-max-distance rotary-interleaved
        no-rope-freq mrope-section window-size window-attn-skip-freq softmax-type qk-l2-norm mtp-num-layers
        mtp-loss-scaling-factor apply-query-key-layer-scaling fp32-residual-connection fp16-lm-cross-entropy mscale
        mscale-all-dim moe-expert-capacity-factor moe-pad-expert-input-to-capacity moe-token-drop-policy
        moe-apply-probs-on-input moe-z-loss-coeff moe-input-jitter-eps moe-router-force-load-balancing
        moe-use-upcycling moe-upcycling-granularity moe-extended-tp heterogeneous-* hybrid-* mamba-*
        is-hybrid-model""",
    "is a precision that is not trained here": """fp8-* no-fp8-wgrad fp4-* first-last-layers-bf16
        num-layers-at-start-in-bf16 num-layers-at-end-in-bf16 grad-reduce-in-bf16 main-grads-dtype main-params-dtype
        exp-avg-dtype exp-avg-sq-dtype moe-router-padding-for-fp8""",
    "is not done here, and would change the numbers": """rampup-batch-size decrease-batch-size-if-needed decoupled-lr
        decoupled-min-lr start-weight-decay end-weight-decay sgd-momentum muon-* embedding-init-method-std
        init-method-xavier-uniform data-parallel-random-init calculate-per-token-loss
        iterations-to-skip train-data-path valid-data-path test-data-path
        data-args-path per-split-data-args-path full-validation multiple-validation-sets""",
    "is not done here": """optimizer-cpu-offload optimizer-offload-fraction cpu-offloading-num-layers
        hierarchical-context-parallel-sizes enable-full-sharding-in-hsdp exit-interval
        save-retain-interval no-save-optim no-load-optim finetune pretrained-checkpoint ckpt-step use-checkpoint-args
        use-mp-args-from-checkpoint-args load-main-params-from-ckpt non-persistent-* ckpt-convert-* replication*
        inprocess-* enable-ft-package calc-ft-timeouts adlr-* run-workload-inspector-server skip-train test-mode
        check-weight-hash-across-dp-replicas-interval yaml-cfg""",
    "is of another kind of training": """encoder-* decoder-seq-length retro-* vision-* dino-* swin-* biencoder-* ict-*
        bert-* retriever-* rl-* grpo-* langrl-* perform-rl-step sft sft-* inference-* mask-prob short-seq-prob
        img-h img-w num-classes num-channels patch-dim""",
    "is an old name": "batch-size model-parallel-size warmup checkpoint-activations",
}

IGNORED: dict[str, str] = {f"--{name}": reason for reason, names in _IGNORED.items() for name in names.split()}
_PATTERNS: dict[str, str] = {f"--{name}": reason for reason, names in _REFUSED.items() for name in names.split()}
_PREFIXES = {name[:-1]: reason for name, reason in _PATTERNS.items() if name.endswith("*")}
REFUSED: dict[str, str] = {name: reason for name, reason in _PATTERNS.items() if not name.endswith("*")}


def why_refused(flag: str) -> str | None:
    """What is lacking, of a flag that cannot be had; None for all others."""
    if flag in TAKEN or flag in IGNORED:
        return None
    if flag in REFUSED:
        return REFUSED[flag]
    return next((reason for prefix, reason in _PREFIXES.items() if flag.startswith(prefix)), None)
