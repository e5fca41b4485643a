"""Logits of every family against transformers' own, from the folder that transformers writes alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hf_folders import CONFIGS, make_model, read_whole, require_same_logits


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name: str, tmp_path: Path) -> None:
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path)
    require_same_logits(read_whole(tmp_path), theirs)
