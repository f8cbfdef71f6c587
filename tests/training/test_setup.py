"""What a model does not support is refused before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lorakit.errors import UserError
from lorakit.training.run import train
from tests.families import tiny
from tests.training.runs import recipe_for


def test_a_model_without_gradient_checkpointing(tiny_bert: Path, tmp_path: Path) -> None:
    model = tiny("albert", vocab_size=300, num_labels=2, max_position_embeddings=128)
    assert not model.supports_gradient_checkpointing
    model.save_pretrained(tmp_path / "albert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_bert / name, tmp_path / "albert")
    recipe = recipe_for(
        tmp_path, tmp_path / "albert", "glue/sst2", train__gradient_checkpointing=True
    )
    with pytest.raises(
        UserError, match=r"gradient_checkpointing = true: AlbertFor.*allowed: false"
    ):
        train(recipe)
    assert not (tmp_path / "run").exists()
