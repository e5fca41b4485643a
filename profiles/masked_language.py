"""Masked language models: how many tokens of a sequence are predicted, and at how many a rank's head looks.

[Note: Masked language model]
A model whose attention is bidirectional learns to fill in tokens that it does not see (arXiv 1810.04805, section 3.1).
Of each sequence of s tokens round(0.15 s) are predicted, a number that is fixed: each with probability 0.15, as in the
paper, would give microbatches and ranks different numbers of them, and the loss of a step its mean over the whole
batch only after one more sum. So every row has as many targets, a step has global_batch times that, by which each rank
divides its sum, and no layout changes what is trained. The head looks at these tokens alone, always in tensors of the
same shapes. A cp rank has more or fewer of them; its head has room for all, and what is left over counts for nothing.

Of the tokens that are predicted 80 % are replaced by the mask token, 10 % by any token, 10 % stay. Which, is drawn
anew for each row of each step (runtime/data/masked_tokens.py). A sequence is packed text without padding, and all of
it of the first type: there is no next-sentence prediction (Megatron-LM's --bert-no-binary-head), which needs pairs.
"""

from __future__ import annotations

from .model import ModelSpec

MASKED_SHARE = 0.15


def predicted_tokens(model: ModelSpec, sequence: int) -> int:
    """Tokens of a sequence that have a target: of a causal model all."""
    return max(1, round(MASKED_SHARE * sequence)) if model.bidirectional else sequence


def head_tokens(model: ModelSpec, sequence: int, cp: int) -> float:
    """Tokens of a sequence at which the head of one cp rank looks: those predicted, all of which it may have."""
    return min(predicted_tokens(model, sequence), sequence / cp)
