"""The model that Megatron-LM's flags describe, as a ModelSpec."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

from profiles.experts_spec import Experts
from profiles.input_error import InputError
from profiles.model import ModelSpec
from profiles.store import Reader, load_json

from .megatron_command import Given

_WEIGHT_STD = 0.02  # with which the runtime draws its matrices, and Megatron-LM's default
# Llama 3's (arXiv 2407.21783), which --use-rope-scaling has but for the factor.
_ROPE_SCALING = {"low_frequency_factor": 1.0, "high_frequency_factor": 4.0, "original_max_positions": 8192}
# Keys of a model whose flag has another key here.
_KEYS = {
    "experts.number": "experts",
    "experts.top_k": "top_k",
    "experts.ffn_hidden_size": "expert_ffn",
    "experts.groups": "groups",
    "experts.top_groups": "top_groups",
}


def model_of(given: Given, vocabulary_of: Callable[[str], int]) -> ModelSpec:
    """The model, with Megatron-LM's defaults where its flags are left out.

    `vocabulary_of` says how many ids the tokenizer at a path has.

    Raises:
        InputError: a flag is missing, or contradicts another, or asks for what is not trained here.
    """
    _check(given)
    layers, hidden = given.required("layers", "--num-layers"), given.required("hidden_size", "--hidden-size")
    heads = given.required("heads", "--num-attention-heads")
    bias, gated = "no_bias" not in given, "swiglu" in given
    # --swiglu's usual width: arXiv 2002.05202, section 3, 2/3 of 4 h, in Megatron-LM rounded down to 64.
    ffn = given.get("ffn_hidden_size") or (int(4 * hidden * 2 / 3) // 64 * 64 if gated else 4 * hidden)
    # Its fused bias and GELU computes the tanh form, and is the default.
    fused = bias and "exact_gelu" not in given
    plain: dict[str, Any] = {
        "name": f"megatron-{layers}x{hidden}",
        "family": "megatron",
        "layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "heads": heads,
        "kv_heads": given.get("kv_heads", 1) if "grouped_queries" in given else heads,
        "vocab_size": _vocabulary(given, vocabulary_of),
        "max_positions": given.required("max_positions", "--max-position-embeddings"),
        "norm": given.get("norm", "layernorm"),
        "norm_epsilon": given.get("norm_epsilon", 1e-5),
        "activation": "swiglu" if gated else "gelu_tanh" if fused else "gelu",
        "positions": given.get("positions", "learned"),
        "rope_theta": float(given.get("rope_theta", 10000)),
        "rotary_fraction": given.get("rotary_fraction", 1.0) if given.get("positions") == "rope" else 1.0,
        "qkv_bias": bias or "qkv_bias" in given,
        "attention_output_bias": bias,
        "mlp_bias": bias,
        "tied_embeddings": "untied" not in given,
        "qk_norm": "qk_norm" in given,
    }
    if "head_dim" in given:
        plain["head_dim"] = given.get("head_dim")
    plain |= _positions(given) | _latent(given, heads)
    if "experts" in given:
        plain["experts"] = _experts(given, layers, ffn, bias)
        if plain["experts"]["dense_layers"] == 0 and plain["experts"]["every"] == 1:
            plain["ffn_hidden_size"] = plain["experts"]["ffn_hidden_size"]
    try:
        return ModelSpec.from_dict(Reader(plain, source="the model of these flags"))
    except InputError as error:
        key = error.where.rpartition(": ")[2]
        flag = given.flags.get(_KEYS.get(key, key))
        raise InputError(
            f"{flag or key} cannot be used", where=flag or error.where, expected=error.expected, got=error.got
        ) from None


def _check(given: Given) -> None:
    for key, flag in (("hidden_dropout", "--hidden-dropout"), ("attention_dropout", "--attention-dropout")):
        if given.get(key, 0.1) != 0.0:
            raise InputError(
                "dropout is not trained here",
                where=flag,
                expected=f"{flag} 0",
                got=f"{given.get(key)}" if key in given else "nothing, and Megatron-LM's default of 0.1",
                hint=f"add {flag} 0",
            )
    if given.get("init_std", _WEIGHT_STD) != _WEIGHT_STD:
        raise given.fail("init_std", "weights are drawn with another deviation here", f"{_WEIGHT_STD}")
    if "kv_heads" in given and "grouped_queries" not in given:
        raise given.fail(
            "kv_heads", "--num-query-groups means nothing without grouped queries", "--group-query-attention beside it"
        )
    if "qk_norm" in given and given.get("norm", "layernorm") != "rmsnorm":
        raise given.fail("qk_norm", "queries and keys are normed by RMSNorm here", "--normalization RMSNorm")
    rotary = ("rope_theta", "rotary_fraction", "rope_scaling", "linear_stretch")
    for key in rotary if given.get("positions") != "rope" else ():
        if key in given:
            raise given.fail(key, f"{given.flags[key]} is of rotary positions", "--position-embedding-type rope")
    for key in ("top_k", "expert_ffn", "shared_ffn", "expert_layers", "groups", "top_groups", "selection_bias"):
        if key in given and "experts" not in given:
            raise given.fail(key, f"{given.flags[key]} is of experts", "--num-experts beside it")


def _positions(given: Given) -> dict[str, Any]:
    given.exclusive("rope_scaling", "linear_stretch")
    if "rope_scaling" in given:
        return {"rope_scaling": {"factor": given.get("rope_scaling_factor", 8.0), **_ROPE_SCALING}}
    if "linear_stretch" in given:
        return {"rope_stretch": {"kind": "linear", "factor": float(given.get("linear_stretch"))}}
    factor = given.get("yarn_factor", 1.0)  # by which YaRN stretches nothing
    if given.get("rope_type", "yarn" if "latent" in given else "rope") == "yarn" and factor != 1.0:
        return {"rope_stretch": {"kind": "yarn", "factor": factor}}
    return {}


def _latent(given: Given, heads: int) -> dict[str, Any]:
    if "latent" not in given:
        return {}
    if "qk_norm" not in given:
        raise given.fail("latent", "latents are normed here", "--qk-layernorm beside it")
    nope, rope = given.get("qk_head_dim", 128), given.get("qk_rope_head_dim", 64)
    latent = {
        "kv_lora_rank": given.get("kv_lora_rank", 32),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": given.get("v_head_dim", 128),
        "q_lora_rank": given.get("q_lora_rank"),
    }
    return {"latent_attention": latent, "qk_norm": False, "kv_heads": heads, "head_dim": nope + rope}


def _experts(given: Given, layers: int, ffn: int, bias: bool) -> dict[str, Any]:
    number, top_k = given.get("experts"), given.get("top_k", 2)
    sigmoid, biased = given.get("router_score") == "sigmoid", "selection_bias" in given
    groups, top_groups = given.get("groups", 1), given.get("top_groups", 1)
    # Megatron-LM's group_limited_topk ranks groups by their best top_k // top_groups experts.
    best = 2 if biased else 1
    if groups > 1 and top_k // max(top_groups, 1) != best:
        raise given.fail(
            "groups", f"groups are ranked by their best {best} here", f"a --moe-router-topk of {best} a chosen group"
        )
    if given.get("balancing", "aux_loss") in ("aux_loss", "global_aux_loss") and given.get("balance_loss", 0.0):
        given.remarks.append("the balance loss is taken of each sequence, as seq_aux_loss has it")
    dense, every = _expert_layers(given, layers)
    shared = given.get("shared_ffn", 0)
    return {
        "number": number,
        "top_k": top_k,
        "ffn_hidden_size": given.get("expert_ffn") or ffn,
        "shared": 1 if shared else 0,
        "shared_ffn_hidden_size": shared or None,
        "dense_layers": dense,
        "every": every,
        "router_score": "sigmoid" if sigmoid else "softmax",
        "expert_bias": bias,
        "selection_bias": biased,
        "normalize_top_k": sigmoid or "pre_softmax" not in given,
        "router_scale": given.get("router_scale", 1.0),
        "groups": groups,
        "top_groups": top_groups,
    }


def _expert_layers(given: Given, layers: int) -> tuple[int, int]:
    """(first dense layers, of the others every n-th has experts) of --moe-layer-freq: N, or a list's expression."""
    text = given.get("expert_layers", "1")
    try:
        pattern = _list(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, TypeError):
        raise given.fail("expert_layers", f"{text!r} is no pattern of layers", "N, or as ([0]*1+[1]*23)") from None
    wanted = [index % pattern == 0 for index in range(layers)] if isinstance(pattern, int) else list(map(bool, pattern))
    for dense in range(layers):
        for every in range(1, layers - dense + 1):
            spec = Experts(number=2, top_k=1, ffn_hidden_size=1, dense_layers=dense, every=every)
            if [spec.in_layer(index) for index in range(layers)] == wanted:
                return dense, every
    raise given.fail(
        "expert_layers",
        "the pattern of layers cannot be expressed",
        f"{layers} layers, dense ones first and then experts in every n-th",
    )


def _list(node: ast.AST) -> Any:
    """A whole number, or a list of them made by + and *; nothing else is evaluated."""
    match node:
        case ast.Constant(value=int() as value) if 0 <= value < 10_000:
            return value
        case ast.List(elts=elements):
            return [_list(element) for element in elements]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _list(left) + _list(right)
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            times, what = sorted((_list(left), _list(right)), key=lambda side: isinstance(side, list))
            if isinstance(what, list) and len(what) * times > 10_000:
                raise ValueError(node)
            return what * times
    raise ValueError(node)


def _vocabulary(given: Given, vocabulary_of: Callable[[str], int]) -> int:
    """Rows of the embedding, padded as Megatron-LM pads them: to a multiple of 128 · tp, tp as far as it is given."""
    if "padded_vocab_size" in given:
        return given.get("padded_vocab_size")
    if "vocab_size" in given:
        # NullTokenizer appends an id for the end of a document.
        size = given.get("vocab_size") + (given.get("tokenizer_type") == "NullTokenizer")
    elif given.get("tokenizer_type") == "GPT2BPETokenizer" and "vocab_file" in given:
        size = len(load_json(Path(given.get("vocab_file")), "vocabulary"))
    elif "tokenizer" in given:
        size = vocabulary_of(given.get("tokenizer"))
    else:
        raise InputError(
            "nothing says how many tokens there are",
            where="--vocab-size",
            expected="--tokenizer-type HFTokenizer --tokenizer-model FOLDER, or --vocab-size",
            got="neither",
        )
    multiple = given.get("vocab_multiple", 128) * given.get("tp", 1)
    return -(-size // max(multiple, 1)) * max(multiple, 1)
