from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorakit.evaluation.sampling import NoRepeatNgrams, SampleToken, uniform_numbers

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_generated_ngram_occurs_twice(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    start, vocabulary = 3, 5
    bar = NoRepeatNgrams(size, start)
    for length in range(12):
        ids = torch.randint(0, vocabulary, (6, start + length), generator=generator)
        scores = torch.randn(6, vocabulary, generator=generator)
        found = bar(ids, scores)
        for row in range(6):
            own = ids[row, start:].tolist()
            seen = {tuple(own[i : i + size]) for i in range(len(own) - size + 1)}
            last = own[len(own) - size + 1 :] if size > 1 else []
            barred = [
                token for token in range(vocabulary) if (*last, token) in seen and len(own) >= size
            ]
            if len(barred) == vocabulary:
                continue
            left = scores[row].double()
            left[barred] = -math.inf
            wanted = left.log_softmax(-1) if length >= size else scores[row].double()
            assert torch.allclose(found[row].double(), wanted, atol=1e-6)


def test_samples_follow_the_distribution() -> None:
    scores = torch.tensor([2.0, 0.5, 1.0, -1.0, 1.5])
    draws = 20_000
    numbers = torch.from_numpy(np.random.default_rng(0).random((draws, 1)))
    for temperature, top_p in ((1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.0, 0.05)):
        wanted = (scores.double() / temperature).softmax(-1)
        order = wanted.argsort(descending=True).tolist()
        kept: list[int] = []
        while sum(float(wanted[i]) for i in kept) < top_p and len(kept) < len(order):
            kept.append(order[len(kept)])
        mask = torch.zeros(5, dtype=torch.float64)
        mask[kept] = 1
        wanted = wanted * mask / (wanted * mask).sum()
        sample = SampleToken(temperature, top_p, numbers, start=2)
        ids = torch.zeros(draws, 2, dtype=torch.long)
        chosen = sample(ids, scores.expand(draws, 5).contiguous()).argmax(-1)
        share = torch.bincount(chosen, minlength=5) / draws
        assert torch.allclose(share.double(), wanted, atol=0.012)
        assert set(chosen.tolist()) == set(kept)


def test_a_tiny_temperature_takes_the_most_likely_token() -> None:
    sample = SampleToken(1e-300, 1.0, torch.full((1, 1), 0.999999, dtype=torch.float64), start=1)
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    assert int(sample(torch.zeros(1, 1, dtype=torch.long), scores).argmax()) == 1


def test_random_numbers_depend_on_seed_row_and_position() -> None:
    three = uniform_numbers(7, [4, 0, 9], 6, CPU)
    assert three.shape == (3, 6)
    assert ((three >= 0) & (three < 1)).all()
    assert torch.equal(uniform_numbers(7, [9], 6, CPU)[0], three[2])
    assert torch.equal(uniform_numbers(7, [4], 3, CPU)[0], three[0, :3])
    assert not torch.equal(uniform_numbers(8, [4], 6, CPU)[0], three[0])
    assert len(set(three.flatten().tolist())) == 18


def test_remaining_rows_keep_their_numbers() -> None:
    sample = SampleToken(1.0, 1.0, uniform_numbers(0, [0, 1, 2], 2, CPU), start=1)
    wanted = sample.numbers[[0, 2]]
    sample.keep_rows(torch.tensor([0, 2]))
    assert torch.equal(sample.numbers, wanted)
