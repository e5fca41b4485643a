"""Masked rows: how many tokens, which ones, what becomes of them, and what the mask token is."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from planner.job import TrainingJob
from planner.layout import Layout
from planner.plan import Plan
from planner.rules import RuleContext, violations
from profiles.input_error import InputError
from profiles.masked_language import head_tokens, predicted_tokens
from runtime.data.data_options import DataOptions
from runtime.data.indexed_dataset import IndexedWriter
from runtime.data.masked_tokens import Masking
from runtime.data.open_tokens import open_tokens
from runtime.data.token_source import NO_TARGET, TokenSource
from tests.plans import make_plan, tiny_bert, tiny_llama

MASK, WORDS = 1000, 900
MASKING = Masking(number=19, mask=MASK, vocabulary=WORDS, seed=3)


def plan_for(vocabulary: int, sequence: int = 40) -> Plan:
    job = TrainingJob(global_batch=4, sequence=sequence, precision="fp32")
    return make_plan(tiny_bert(vocab_size=vocabulary), Layout(), job)


def opened(*paths: str, vocabulary: int = 300, tokenizer: str | None = None) -> TokenSource:
    options = DataOptions(paths=paths, tokenizer=tokenizer)
    return open_tokens(options, plan_for(vocabulary), steps=3, validation_batches=1, seed=5)


def tokenizer(folder: Path, mask: str | None, **said: object) -> str:
    """A folder with a tokenizer of 20 words, the mask token the last but one."""
    folder.mkdir()
    words = [f"w{i}" for i in range(18)] + [mask or "w18", "w19"]
    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return str(folder)


def dataset(prefix: Path) -> str:
    with IndexedWriter(str(prefix), np.dtype(np.uint16)) as writer:
        writer.add(np.tile(np.arange(18), 100), np.full(100, 18))
    return str(prefix)


# ---- the rows ----------------------------------------------------------------------------------------------


def test_every_row_has_as_many_targets_which_are_its_own_tokens() -> None:
    ids = np.random.default_rng(0).integers(0, WORDS, (50, 129))
    inputs, targets = np.moveaxis(MASKING.batch(ids, 0, 1), 1, 0)
    chosen = targets != NO_TARGET
    assert (chosen.sum(axis=1) == 19).all()
    assert np.array_equal(targets[chosen], ids[:, :-1][chosen])
    assert np.array_equal(inputs[~chosen], ids[:, :-1][~chosen])
    assert inputs.dtype == targets.dtype == np.int64


def test_of_the_chosen_80_percent_are_hidden_10_are_others_and_10_stay() -> None:
    ids = np.random.default_rng(0).integers(0, WORDS, (2000, 129))
    inputs, targets = np.moveaxis(MASKING.batch(ids, 0, 1), 1, 0)
    chosen = targets != NO_TARGET
    given, wanted = inputs[chosen], targets[chosen]
    number = chosen.sum()
    for share, of in ((0.8, given == MASK), (0.1, given == wanted), (0.1, (given != MASK) & (given != wanted))):
        # 5 standard deviations; of the other tokens one in 900 is by chance the one that was there.
        assert of.sum() / number == pytest.approx(share, abs=5 * (share * (1 - share) / number) ** 0.5 + 1e-3)
    # Each place is chosen as often: 2000 rows, 19 of 128.
    often = chosen.sum(axis=0)
    assert often.mean() == pytest.approx(2000 * 19 / 128)
    assert often.std() == pytest.approx((2000 * 19 / 128 * (1 - 19 / 128)) ** 0.5, rel=0.25)
    others = given[(given != MASK) & (given != wanted)]
    assert others.min() < 30
    assert WORDS - 30 < others.max() < WORDS


def test_a_row_is_the_same_whoever_asks_and_another_in_each_step_row_seed_and_stream() -> None:
    ids = np.tile(np.arange(129), (6, 1))
    whole = MASKING.batch(ids, 0, 4)
    rows = np.array([5, 1])
    assert np.array_equal(MASKING.batch(ids[rows], 0, 4, rows), whole[rows])
    others = (
        MASKING.batch(ids, 0, 5),
        MASKING.batch(ids, 1, 4),
        Masking(number=19, mask=MASK, vocabulary=WORDS, seed=4).batch(ids, 0, 4),
    )
    everything = [row.tobytes() for batch in (whole, *others) for row in batch]
    assert len(set(everything)) == len(everything)


def test_how_many_are_predicted_is_a_matter_of_the_sequence_alone() -> None:
    bert, llama = tiny_bert(), tiny_llama()
    assert [predicted_tokens(bert, sequence) for sequence in (1, 16, 128, 512)] == [1, 2, 19, 77]
    assert predicted_tokens(llama, 512) == 512
    # Of 8 ranks one may have all, or all that it holds.
    assert [head_tokens(bert, 512, cp) for cp in (1, 2, 4, 8)] == [77, 77, 77, 64]
    assert head_tokens(llama, 512, 4) == 128


# ---- what is opened ------------------------------------------------------------------------------------------


def test_bytes_are_masked_by_the_last_id_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("all that is written here is plain text. " * 100)
    tokens = opened(str(tmp_path / "a.txt"))
    batch = tokens.batch(1, 4)
    assert batch.shape == (4, 2, 40)
    assert batch[:, 0].max() == 299
    assert ((batch[:, 1] != NO_TARGET).sum(axis=1) == 6).all()
    assert np.array_equal(tokens.batch(1, 4, np.array([2, 0])), batch[[2, 0]])
    assert not np.array_equal(tokens.validation_batch(1, 4), batch)
    assert (tokens.unit, tokens.baseline_loss(), tokens.vocabulary) == ("masked byte", None, 300)
    assert tokens.order.endswith("seed 5, 6 of each masked by 299, seed 5")


def test_bytes_that_were_prepared_are_masked_so_too(tmp_path: Path) -> None:
    batch = opened(dataset(tmp_path / "a"), tokenizer="bytes").batch(1, 4)
    assert batch[:, 0].max() == 299
    assert np.unique(batch[:, 0][(batch[:, 0] != batch[:, 1]) & (batch[:, 1] != NO_TARGET)]).max() == 299


@pytest.mark.parametrize("vocabulary", [200, 256])
def test_a_model_without_an_id_beside_the_bytes_is_refused(tmp_path: Path, vocabulary: int) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    with pytest.raises(InputError) as caught:
        opened(str(tmp_path / "a.txt"), vocabulary=vocabulary)
    assert caught.value.where == "plan: model.vocab_size"


@pytest.mark.parametrize(
    ("mask", "said"),
    [("[MASK]", {}), ("<mask>", {"mask_token": "<mask>"}), ("<m>", {"mask_token": {"content": "<m>"}})],
)
def test_the_mask_token_is_the_tokenizers(tmp_path: Path, mask: str, said: dict[str, object]) -> None:
    tokens = opened(dataset(tmp_path / "a"), tokenizer=tokenizer(tmp_path / "t", mask, **said))
    batch = tokens.batch(1, 4)
    hidden = (batch[:, 1] != NO_TARGET) & (batch[:, 0] == 18)
    assert hidden.sum() > 12  # of 24
    assert batch[:, 0].max() <= 19  # and not up to the model's 299: what no word is, no row has


def test_indexed_data_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    path = dataset(tmp_path / "a")
    with pytest.raises(InputError, match="which id masks them is not known") as caught:
        opened(path)
    assert caught.value.where == "--tokenizer"
    with pytest.raises(InputError, match="the tokenizer has no mask token") as caught:
        opened(path, tokenizer=tokenizer(tmp_path / "t", None))
    assert "the token [MASK]" in caught.value.expected


def test_next_sentence_prediction_is_refused_by_name() -> None:
    model = tiny_bert(next_sentence_head=True)
    job = TrainingJob(global_batch=4, sequence=16, precision="fp32")
    assert violations(Layout(), RuleContext(model, job, 1)) == (
        "tiny-bert: the meshwright runtime does not train next-sentence head today; megatron can",
    )
