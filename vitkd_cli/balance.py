"""Weights that hold terms at a share of the student's gradient: ``labels + mimic(balance=0.1)``.

    w_i = s_i / (1 − Σ_j s_j) · O / ‖g_i‖,   O = Σ_k |w_k| ‖g_k‖

i and j are balanced terms, s_i the share that is asked for; k are the terms that have a weight of their
own; g is a term's gradient, before its weight, at all of the student's parameters, of the global batch. Then
|w_i| ‖g_i‖ is s_i of the sum of all terms' weighted norms.

Ratios of gradient norms weigh terms in VQGAN, too (Esser et al. 2021, arXiv:2012.09841, eq. 7: at the
decoder's last layer, anew at every step) and in GradNorm (Chen et al. 2018, arXiv:1711.02257: at a layer that
the tasks share, by gradient descent on the weights, so that tasks learn at one pace). Here a share is asked
for and held, and the ratio is estimated now and then, since each estimate costs a backward pass per term.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

# A tenth of the time, about, where there are two terms; and still ten estimates in a run of 200 updates.
EVERY = 20
# Norms of one batch scatter by a factor, so it is logarithms that are averaged. Of an estimate's error a half
# stays; a start that is wrong counts for 3 % after five more. The first one has nothing to be averaged with.
KEPT = 0.5


class Balance(nn.Module):
    """O / ‖g_i‖ of balanced terms, from which their weights follow.

    Its state is one float64 number per term, which a checkpoint holds. It is no buffer: those are copied
    between processes and to devices, and would be waited for in every forward.

    Attributes:
        ratios: of each term; not a number before its first estimate, and 0 where that found nothing to
            balance, so its weight is 0 until then.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.ratios = dict.fromkeys(names, math.nan)

    def weights(self, shares: Mapping[str, float]) -> dict[str, float]:
        """The weights that give the balanced terms the shares of now; other terms' are not looked at."""
        left = 1 - sum(shares[name] for name in self.ratios)
        known = {name: 0.0 if math.isnan(ratio) else ratio for name, ratio in self.ratios.items()}
        return {name: shares[name] / left * ratio for name, ratio in known.items()}

    def due(self, update: int) -> bool:
        """Is there to be an estimate in the update that follows ``update`` others?"""
        return update % EVERY == 0 or any(map(math.isnan, self.ratios.values()))

    def estimate(self, norms: Mapping[str, float], weights: Mapping[str, float]) -> list[str]:
        """Estimate anew, for the updates from the next one on.

        Args:
            norms: of every term's gradient, before its weight. Where one is not finite nothing is
                estimated: a scaler passes over such an update.
            weights: the terms', as the gradients were taken.

        Returns:
            What could not be estimated, in words.
        """
        if not all(map(math.isfinite, norms.values())):
            return []
        others = sum(abs(weights[name]) * norm for name, norm in norms.items() if name not in self.ratios)
        notes = [] if others else ["no term has a gradient to balance others against: their weights are left"]
        for name, before in self.ratios.items():
            found = others / norms[name] if norms[name] else math.inf
            known = before > 0
            if not 0 < found < math.inf:
                self.ratios[name] = before if known else 0.0
                if others:
                    notes.append(f"{name} has no gradient at the student: its weight is left")
            else:
                self.ratios[name] = before**KEPT * found ** (1 - KEPT) if known else found
        return notes

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list(self.ratios.values()), dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.ratios = dict(zip(self.ratios, state.tolist(), strict=True))
