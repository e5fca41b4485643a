"""Bytes of the head on the last stage: what its norm and its loss keep for the backward, and what only passes."""

from __future__ import annotations

from profiles.model import ModelSpec
from profiles.software import Software

from .activation_bytes import ActivationModel
from .job import TrainingJob
from .layout import LOSS_TOKENS, Layout
from .local_shapes import local_tokens, outside_tokens, predicted_by_head
from .memory_bytes import MemoryBytes

_FP32_BYTES = 4


def reduces_each_microbatch(layout: Layout, job: TrainingJob) -> bool:
    """Whether FSDP2 reduces the gradients of every microbatch, not their sums after the last."""
    return layout.pp == 1 and (layout.zero >= 2 or layout.microbatches(job.global_batch) == 1)


class HeadMemory:
    """Prices the head of one model as one trainer runs it.

    [Note: When the head's bytes are there]
    There are two moments at which a last stage may be fullest: in the head, and when the backward of its last layer
    begins. What only the first has is passing. Where the head's backward follows its forward at once, what it keeps
    between them passes too; where others come between, each microbatch in flight holds it.
    """

    def __init__(self, model: ModelSpec, job: TrainingJob, software: Software, activations: ActivationModel) -> None:
        self._model, self._job, self._software, self._activations = model, job, software, activations
        self._element_bytes = activations.element_bytes

    def bytes_of(self, layout: Layout) -> tuple[MemoryBytes, MemoryBytes, float]:
        """(held by each microbatch in flight, held between the halves of a split backward, passing)."""
        if self._software.loss_in_pieces:
            return self._pieces(layout)
        held, passing = self._whole(layout)
        return held, held, passing

    # ---- logits as a whole -----------------------------------------------------------------------------

    def _whole(self, layout: Layout) -> tuple[MemoryBytes, float]:
        """Last norm, and the logits: as computed, and as log-probabilities in fp32; their gradients on the way back.

        The logits as computed live as long as the training loop names them, through the backward. A fused cross-entropy
        keeps the logits alone, in their own precision; Megatron's the fp32 softmax alone.
        """
        tokens = local_tokens(layout, self._job.sequence)
        logits = self._element_bytes * tokens * self._rows(layout)
        log_probabilities = _FP32_BYTES * tokens * self._rows(layout)
        if self._software.on_fsdp:
            stays, kept = logits, logits + log_probabilities
            # Beside each other: the gradient of the log-probabilities and of the widened logits, and a third of
            # this size in `loss_parallel` (torch 2.13, `_nll_loss_and_log_softmax_backward`).
            gradients = (3 if layout.tp > 1 else 2) * log_probabilities
        else:
            stays, kept = 0.0, log_probabilities if self._software.logits == "fp32" else logits
            gradients = kept
        norm, share = self._activations.norm(layout), self._held_share(layout)
        held = MemoryBytes(activations=share * norm, logits=stays + share * (kept - stays))
        return held, (norm + kept - stays if share < 1 else 0.0) + gradients

    def _held_share(self, layout: Layout) -> float:
        """Of what the head keeps for its backward, how much counts as held by each microbatch in flight.

        One microbatch's is freed before any layer's backward begins, so it counts as passing. The last stage has one
        in flight without a pipeline, under 1F1B, interleaved or not, and under the zero-bubble schedules, all M where
        all forwards come first. DualPipeV runs other backwards between.
        """
        if layout.pp == 1 or layout.schedule in ("1f1b", "interleaved-1f1b", "zb1p", "zbv"):
            return 0.0
        if layout.forwards_first:
            return 1.0 - 1.0 / layout.microbatches(self._job.global_batch)
        return 1.0

    # ---- the loss in pieces ----------------------------------------------------------------------------

    def _pieces(self, layout: Layout) -> tuple[MemoryBytes, MemoryBytes, float]:
        """[Note: Loss in pieces] in bytes; n tokens a piece, T in all, V rows, width h, e bytes an element.

        A piece has the logits widened and their log-softmax, 8nV, then its gradients in place and, if e < 4, narrowed.
        The gradient of the hidden states, eTh, is there from the first piece on. That of the weight is one product of
        eVh, or where pieces add up their sum of 4Vh, besides which a product of 16 bits stands before it is added.
        """
        e, hidden, rows = self._element_bytes, self._model.hidden_size, self._rows(layout)
        tokens = predicted_by_head(layout, self._model, self._job.sequence, self._software)
        piece, later = min(tokens, LOSS_TOKENS) * rows, min(max(0.0, tokens - LOSS_TOKENS), LOSS_TOKENS) * rows
        matrix, several, narrow = float(rows * hidden), tokens > LOSS_TOKENS, e < _FP32_BYTES
        (norm, beside), of_hidden = self._before_loss(layout, tokens), e * tokens * hidden
        kept = (_FP32_BYTES if several else e) * matrix
        product = kept + (e * matrix if several and narrow else 0.0)
        widened, narrowed = 2 * _FP32_BYTES, (_FP32_BYTES + (e if narrow else 0)) * piece
        if layout.logits_again(layout.microbatches(self._job.global_batch)):
            # The sum of the weight's gradients is counted, and there is none before the first backward.
            share, normalisers, summed = self._held_share(layout), _FP32_BYTES * tokens, _FP32_BYTES * matrix
            held = MemoryBytes(activations=share * norm, logits=share * normalisers)
            most = max(beside + widened * piece - summed, of_hidden + narrowed + max(0.0, product - summed))
            return held, held, norm + normalisers + most
        summed_later = widened * later + (kept if several else 0.0)
        most = beside + of_hidden + max(widened * piece, summed_later, narrowed + product)
        after = self._weight_gradient_after(layout, matrix)
        if self._held_share(layout):
            held = MemoryBytes(activations=norm, logits=of_hidden + kept)
            return held, held, most - of_hidden - kept
        held, between = MemoryBytes(logits=after), MemoryBytes(activations=norm, logits=of_hidden + kept)
        # A split backward goes on to the moment between its halves, which has all but what passes in the head.
        passing = max(0.0, most - of_hidden - kept) if layout.splits_backward else norm + most - after
        return held, between, passing

    def _before_loss(self, layout: Layout, tokens: float) -> tuple[float, float]:
        """What the head keeps of what comes before its loss, and what is there until its forward is over besides.

        A last norm keeps its input, and the loss its own. Where that is of the predicted tokens alone, all that the
        head was given is there meanwhile, and under sequence parallelism once more as a whole. A transform keeps what
        goes into its product, its activation and its norm.
        """
        model = self._model
        if not (model.bidirectional and self._software.head_of_predicted):
            return self._activations.norm(layout), 0.0
        stream = outside_tokens(layout, self._job.sequence)
        kept = (stream if model.norm_placement == "pre" else 0.0) + tokens * (4 if model.output_transform else 1)
        given = stream + (local_tokens(layout, self._job.sequence) if layout.sequence_parallel else 0.0)
        return self._element_bytes * model.hidden_size * kept, self._element_bytes * model.hidden_size * given

    def _weight_gradient_after(self, layout: Layout, matrix: float) -> float:
        """The weight's gradient of the microbatch, from the head's backward to the end of that of all layers.

        Where it can be added to the sum at once it is: in fp32 from the second microbatch on, unless the sum is reduced
        every time. FSDP2 widens and adds those of its root group when its backward is over. A tied matrix has two
        gradients, which autograd adds to each other first.
        """
        tied = self._model.tied_embeddings and layout.pp == 1
        at_once = self._element_bytes == _FP32_BYTES and not reduces_each_microbatch(layout, self._job) and not tied
        return 0.0 if at_once else self._element_bytes * matrix

    def _rows(self, layout: Layout) -> int:
        return -(-self._model.vocab_size // layout.tp)
