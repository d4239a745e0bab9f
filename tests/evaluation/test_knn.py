"""The vote of nearest neighbours against a loop over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkd_cli.evaluation.knn import knn

CPU = torch.device("cpu")


def images(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).byte()


def batches(pictures, labels, positions=None, size=7):
    positions = torch.arange(len(labels)) if positions is None else positions
    return [
        tuple(x[i : i + size] for x in (pictures, labels, positions)) for i in range(0, len(labels), size)
    ]


def embed(pictures):
    return pictures.flatten(1)[:, ::3] - 0.5


def by_hand(bank, labels, query, k, temperature, without=None):
    """The classes of one query, best first."""
    unit = lambda x: x / np.linalg.norm(x)  # noqa: E731
    cosines = np.array([unit(query) @ unit(known) for known in bank])
    order = [i for i in np.argsort(-cosines) if i != without][:k]
    votes = np.zeros(int(labels.max()) + 1)
    for i in order:
        votes[labels[i]] += np.exp(cosines[i] / temperature)
    return [c for c in np.argsort(-votes, kind="stable") if votes[c] > 0]


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (3, 0.5)])
def test_it_is_the_weighted_vote(leave_one_out, k, temperature):
    bank, labels = images(50, 0), torch.arange(50) % 6
    queries, truth = (bank, labels) if leave_one_out else (images(23, 1), torch.arange(23) % 6)
    found = knn(
        embed,
        (batches(bank, labels), 50),
        None if leave_one_out else (batches(queries, truth), 23),
        width=16,
        device=CPU,
        k=k,
        temperature=temperature,
    )
    known = embed(bank.float() / 255).double().numpy()
    asked = embed(queries.float() / 255).double().numpy()
    ranked = [
        by_hand(known, labels.numpy(), query, k, temperature, i if leave_one_out else None)
        for i, query in enumerate(asked)
    ]
    assert found.predictions.tolist() == [r[0] for r in ranked]
    right = [r[0] == int(t) for r, t in zip(ranked, truth, strict=True)]
    among = [int(t) in r[:5] for r, t in zip(ranked, truth, strict=True)]
    assert (found.count, found.loss) == (len(truth), None)
    assert found.top1 == pytest.approx(100 * np.mean(right)) and 0 < found.top1 < 100
    assert found.top5 == pytest.approx(100 * np.mean(among))


def test_processes_share_the_images():
    bank, labels = images(31, 0), torch.arange(31) % 4
    alone = knn(embed, (batches(bank, labels), 31), None, width=16, device=CPU)
    shares: list[list[torch.Tensor]] = []

    def collect(rank):
        mine = torch.arange(rank, 31, 2)
        told: list[torch.Tensor] = []
        knn(
            embed, (batches(bank[mine], labels[mine], mine), 31), None, width=16, device=CPU,
            reduce=lambda t: told.append(t) or t,
        )  # fmt: skip
        shares.append(told)

    collect(0), collect(1)
    summed = iter([a + b for a, b in zip(*shares, strict=True)])
    mine = torch.arange(0, 31, 2)
    together = knn(
        embed,
        (batches(bank[mine], labels[mine], mine), 31),
        None,
        width=16,
        device=CPU,
        reduce=lambda t: next(summed),
    )
    assert torch.equal(together.predictions, alone.predictions) and together.top1 == alone.top1
