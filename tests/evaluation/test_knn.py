"""The vote of nearest neighbours against a loop over images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitkd_cli.evaluation import knn as knn_module
from vitkd_cli.evaluation.knn import knn, vote

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
    known, asked = (embed(some.float() / 255) for some in (bank, queries))
    others = (None, None) if leave_one_out else (asked, truth)
    found = vote(known, labels, *others, k=k, temperature=temperature)
    ranked = [
        by_hand(known.double().numpy(), labels.numpy(), query, k, temperature, i if leave_one_out else None)
        for i, query in enumerate(asked.double().numpy())
    ]
    assert found.predictions.tolist() == [r[0] for r in ranked]
    right = [r[0] == int(t) for r, t in zip(ranked, truth, strict=True)]
    among = [int(t) in r[:5] for r, t in zip(ranked, truth, strict=True)]
    assert (found.count, found.loss) == (len(truth), None)
    assert found.top1 == pytest.approx(100 * np.mean(right)) and 0 < found.top1 < 100
    assert found.top5 == pytest.approx(100 * np.mean(among))


def features(count, seed, width=24, classes=7):
    """Clusters that overlap, with twins among them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (count,), generator=generator)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(99))
    vectors = 0.5 * centres[labels] + torch.randn(count, width, generator=generator)
    vectors[count // 2 :: 3] = vectors[: len(vectors[count // 2 :: 3])]
    return vectors, labels


def test_batches_and_votes_agree():
    bank, labels = images(50, 0), torch.arange(50) % 6
    queries, truth = images(23, 1), torch.arange(23) % 6
    whole = knn(embed, (batches(bank, labels), 50), (batches(queries, truth), 23), width=16, device=CPU)
    assert torch.equal(
        whole.ranked, vote(embed(bank.float() / 255), labels, embed(queries.float() / 255), truth).ranked
    )


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("chunks", [(40, 1), (7, 13), (64, 250), (3, 10_000)])
def test_chunks_change_nothing_ties_included(monkeypatch, leave_one_out, chunks):
    bank = features(301, 0)
    queries = (None, None) if leave_one_out else features(90, 1)
    if not leave_one_out:
        queries[0][:40] = bank[0][150:190]  # some of which lie in the bank twice, with other labels
    whole = vote(*bank, *queries)
    monkeypatch.setattr(knn_module, "_QUERIES", chunks[0])
    monkeypatch.setattr(knn_module, "_BANK", chunks[1])
    assert torch.equal(vote(*bank, *queries).ranked, whole.ranked)


def test_of_equal_neighbours_the_first_counts():
    bank = torch.ones(30, 4)
    labels = torch.tensor([3, *[1] * 4, *[2] * 25])
    assert vote(bank, labels, torch.ones(1, 4), torch.tensor([3]), k=1).predictions.tolist() == [3]
    assert vote(bank, labels, torch.ones(1, 4), torch.tensor([3]), k=5).predictions.tolist() == [1]


def test_scikit_learn_gives_the_same_answer_to_every_image():
    neighbors = pytest.importorskip("sklearn.neighbors")
    (bank, labels), (queries, truth) = features(2000, 0), features(500, 1)
    judge = neighbors.KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda far: np.exp((1 - far) / 0.07)
    )
    unique = np.unique(bank.numpy(), axis=0, return_index=True)[1]  # of twins it takes any
    judge.fit(bank[unique].double().numpy(), labels[unique])
    found = vote(bank[unique], labels[unique], queries, truth)
    assert found.predictions.tolist() == judge.predict(queries.double().numpy()).tolist()
    assert 50 < found.top1 < 95


def test_what_is_not_a_number_is_no_answer():
    (bank, labels), (queries, truth) = features(50, 0), features(9, 1)
    queries[3, 0] = torch.nan
    found = vote(bank, labels, queries, truth)
    assert found.predictions[3] == -1 and (found.predictions >= 0).sum() == 8


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
