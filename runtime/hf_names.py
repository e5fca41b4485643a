"""Our parameters in Hugging Face files: names, and matrices that are fused, transposed or one an expert there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

Box = tuple[slice, ...]  # a part of a tensor: for each dim where it begins and ends


@dataclass(frozen=True)
class Place:
    """Where a parameter of ours, or one expert of a stack of them, stands in a Hugging Face file.

    `shape` is that of the file's whole tensor `tensor`. Ours, [outputs, inputs] or [outputs], begins at output `first`
    of it, since several of ours may be side by side in one, and has each `every`-th from there on; `transposed`: it is
    stored [inputs, outputs]. `expert` is which of the file's stack, if it is stacked there too.
    """

    tensor: str
    shape: tuple[int, ...]
    first: int = 0
    transposed: bool = False
    every: int = 1
    expert: int | None = None

    def box(self, ours: Box) -> Box:
        """Which part of the file's tensor holds the part `ours` of our parameter.

        >>> Place("c_attn.weight", (32, 96), first=32, transposed=True).box((slice(0, 16), slice(0, 32)))
        (slice(0, 32, None), slice(32, 48, None))
        """
        outputs, *inputs = ours
        first, end = (self.first + self.every * output for output in (outputs.start, outputs.stop))
        moved = slice(first, end) if self.every == 1 else slice(first, end - self.every + 1, self.every)
        stacked = () if self.expert is None else (slice(self.expert, self.expert + 1),)
        return (*stacked, *inputs, moved) if self.transposed else (*stacked, moved, *inputs)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """Names there of our modules. `fused` are our linears that stand side by side in one, in the order they do;
    `conv1d` has the linears stored [inputs, outputs]; `bare` are modules whose one tensor goes by the module's name.
    `ignored` are tensors in files that are no parameters."""

    top: Mapping[str, str]
    block: str
    modules: Mapping[str, str]
    expert: str = ""
    expert_matrices: Mapping[str, str] = field(default_factory=dict)
    # Where all experts are one tensor [experts, inputs, outputs]: its name, the first output of ours, and how many from
    # one to the next.
    stacks: Mapping[str, tuple[str, int, int]] = field(default_factory=dict)
    selection_bias: str = ""
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    conv1d: bool = False
    bare: tuple[str, ...] = ()
    ignored: str = r".*\.rotary_emb\.inv_freq"  # in files from before transformers 4.32
    head: str = "lm_head.weight"
    renamed: Mapping[str, str] = field(default_factory=dict)  # ends of names in old files, and what they are now


_LLAMA = _Family(
    top={
        "embedding.tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "head.weight": "lm_head.weight",
    },
    block="model.layers.",
    modules={
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "attention.q_norm": "self_attn.q_norm",
        "attention.k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp.w1": "mlp.gate_proj",
        "mlp.w3": "mlp.up_proj",
        "mlp.w2": "mlp.down_proj",
        "mlp.router": "mlp.gate",
    },
    expert="mlp.experts",
    expert_matrices={"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"},
)
_MIXTRAL = _Family(
    top=_LLAMA.top,
    block=_LLAMA.block,
    modules={**_LLAMA.modules, "mlp.router": "block_sparse_moe.gate"},
    expert="block_sparse_moe.experts",
    expert_matrices={"w1": "w1", "w3": "w3", "w2": "w2"},
)
_DEEPSEEK = _Family(
    top=_LLAMA.top,
    block=_LLAMA.block,
    modules={
        **_LLAMA.modules,
        "attention.wq_a": "self_attn.q_a_proj",
        "attention.q_norm": "self_attn.q_a_layernorm",
        "attention.wq_b": "self_attn.q_b_proj",
        "attention.wkv_a": "self_attn.kv_a_proj_with_mqa",
        "attention.kv_norm": "self_attn.kv_a_layernorm",
        "attention.wkv_b": "self_attn.kv_b_proj",
        "mlp.shared.w1": "mlp.shared_experts.gate_proj",
        "mlp.shared.w3": "mlp.shared_experts.up_proj",
        "mlp.shared.w2": "mlp.shared_experts.down_proj",
    },
    expert=_LLAMA.expert,
    expert_matrices=_LLAMA.expert_matrices,
    selection_bias="mlp.gate.e_score_correction_bias",
)
_GPT_OSS = _Family(
    top=_LLAMA.top,
    block=_LLAMA.block,
    modules={**_LLAMA.modules, "attention.sinks": "self_attn.sinks", "mlp.router": "mlp.router"},
    expert="mlp.experts",
    stacks={"w1": ("gate_up_proj", 0, 2), "w3": ("gate_up_proj", 1, 2), "w2": ("down_proj", 0, 1)},
    bare=("self_attn.sinks",),
)
_GPT2 = _Family(
    top={
        "embedding.tokens.weight": "transformer.wte.weight",
        "embedding.positions.weight": "transformer.wpe.weight",
        "norm.weight": "transformer.ln_f.weight",
        "norm.bias": "transformer.ln_f.bias",
        "head.weight": "lm_head.weight",
    },
    block="transformer.h.",
    modules={
        "attention_norm": "ln_1",
        "attention.wq": "attn.c_attn",
        "attention.wk": "attn.c_attn",
        "attention.wv": "attn.c_attn",
        "attention.wo": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.w1": "mlp.c_fc",
        "mlp.w2": "mlp.c_proj",
    },
    fused={"attn.c_attn": ("attention.wq", "attention.wk", "attention.wv")},
    conv1d=True,
    ignored=r".*\.attn\.(masked_)?bias",  # the causal mask
)
_BERT = _Family(
    top={
        "embedding.tokens.weight": "bert.embeddings.word_embeddings.weight",
        "embedding.positions.weight": "bert.embeddings.position_embeddings.weight",
        "embedding.token_types.weight": "bert.embeddings.token_type_embeddings.weight",
        "embedding.norm.weight": "bert.embeddings.LayerNorm.weight",
        "embedding.norm.bias": "bert.embeddings.LayerNorm.bias",
        "norm.weight": "bert.encoder.ln.weight",
        "norm.bias": "bert.encoder.ln.bias",
        "head.transform.weight": "cls.predictions.transform.dense.weight",
        "head.transform.bias": "cls.predictions.transform.dense.bias",
        "head.transform.norm.weight": "cls.predictions.transform.LayerNorm.weight",
        "head.transform.norm.bias": "cls.predictions.transform.LayerNorm.bias",
        "head.weight": "cls.predictions.decoder.weight",
        "head.bias": "cls.predictions.bias",
    },
    block="bert.encoder.layer.",
    modules={
        "attention.wq": "attention.self.query",
        "attention.wk": "attention.self.key",
        "attention.wv": "attention.self.value",
        "attention.wo": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.w1": "intermediate.dense",
        "mlp.w2": "output.dense",
        "mlp_norm": "output.LayerNorm",
    },
    # Positions counted out; the pooler and the head of next-sentence prediction, which a masked language model has not.
    ignored=r"bert\.embeddings\.position_ids|bert\.pooler\..*|cls\.seq_relationship\..*",
    head="cls.predictions.decoder.weight",
    renamed={".gamma": ".weight", ".beta": ".bias", "predictions.decoder.bias": "predictions.bias"},
)
_MEGATRON_BERT = replace(_BERT, modules={**_BERT.modules, "attention_norm": "attention.ln", "mlp_norm": "ln"})
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "qwen3_moe"), _LLAMA),
    "mixtral": _MIXTRAL,
    **dict.fromkeys(("deepseek_v2", "deepseek_v3"), _DEEPSEEK),
    "gpt_oss": _GPT_OSS,
    "gpt2": _GPT2,
    "bert": _BERT,
    "megatron-bert": _MEGATRON_BERT,
}
FAMILIES = tuple(_FAMILIES)

_MODULE = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_STACK = re.compile(r"blocks\.(\d+)\.mlp\.experts\.(w[123])(_bias)?")
_SELECTION_BIAS = re.compile(r"blocks\.(\d+)\.mlp\.router\.selection_bias")


def places_of(family: str, name: str, shape: Sequence[int]) -> tuple[Place, ...]:
    """Where the parameter or buffer `name` of this whole shape stands in files of one of FAMILIES.

    One place; of a stack of experts [experts, outputs, inputs] one for each expert, in order.
    """
    names, shape = _FAMILIES[family], tuple(shape)
    if match := _STACK.fullmatch(name):
        block, matrix, bias = match.groups()
        start = f"{names.block}{block}.{names.expert}."
        if names.stacks:
            return _in_stack(names, start, matrix, bias or "", shape)
        assert bias is None, f"{family} has no biases of experts"
        end = f".{names.expert_matrices[matrix]}.weight"
        return tuple(Place(f"{start}{expert}{end}", shape[1:]) for expert in range(shape[0]))
    if match := _SELECTION_BIAS.fullmatch(name):
        return (Place(f"{names.block}{match.group(1)}.{names.selection_bias}", shape),)
    match = _MODULE.fullmatch(name)
    if match is None:
        return (Place(names.top[name], shape),)
    block, ours, kind = match.groups()
    theirs = names.modules[ours]
    if theirs in names.bare:
        return (Place(f"{names.block}{block}.{theirs}", shape),)
    side_by_side = names.fused.get(theirs, (ours,))
    whole = (shape[0] * len(side_by_side), *shape[1:])
    transposed = names.conv1d and len(shape) == 2
    return (
        Place(
            f"{names.block}{block}.{theirs}.{kind}",
            whole[::-1] if transposed else whole,
            first=shape[0] * side_by_side.index(ours),
            transposed=transposed,
        ),
    )


def _in_stack(names: _Family, start: str, matrix: str, bias: str, shape: tuple[int, ...]) -> tuple[Place, ...]:
    """Of each expert of our stack, where it stands in theirs."""
    theirs, first, every = names.stacks[matrix]
    number, outputs, *inputs = shape
    whole = (number, *inputs, outputs * every)
    where = {"first": first, "every": every, "transposed": not bias}
    return tuple(Place(f"{start}{theirs}{bias}", whole, expert=expert, **where) for expert in range(number))


def is_no_parameter(family: str, tensor: str) -> bool:
    """Whether a tensor of that name, which old files hold, can be left out: what it says follows from the config."""
    return re.fullmatch(_FAMILIES[family].ignored, tensor) is not None


def head_of(family: str) -> str:
    """The tensor of the output matrix, which files of a tied one may hold too."""
    return _FAMILIES[family].head


def full_name(family: str, tensor: str) -> str:
    """The tensor's name in a model with a head: files of the bare one leave out `transformer.` (the released GPT-2).

    Old names are made new ones, such as the norms' `gamma` and `beta` of the released BERT.
    """
    names = _FAMILIES[family]
    for old, new in names.renamed.items():
        tensor = tensor.removesuffix(old) + new if tensor.endswith(old) else tensor
    top, head = (name.partition(".")[0] + "." for name in (names.block, names.head))
    return tensor if tensor.startswith((top, head)) else top + tensor
