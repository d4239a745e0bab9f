"""The labels themselves, smoothed (Szegedy et al. 2015, arXiv:1512.00567, section 7).

    L = CE(q, softmax(s)),   q = (1 − ε) y + ε / K

y is the label, one-hot or mixed; s the student's logits; K the number of classes. With ``bce`` every
class is its own yes or no (Wightman et al. 2021, arXiv:2110.00476, section 2): L = BCE(q, sigmoid(s)).
"""

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.vit.taps import LOGITS


@term("labels")
class Labels(Term):
    """Smoothed cross-entropy (Szegedy et al. 2015, arXiv:1512.00567), in nats, mean over images.

    With ``bce``: binary cross-entropy (arXiv:2110.00476), in nats, mean over images *and classes*;
    times K it is the sum over classes.
    """

    uses_labels = True
    uses_teacher = False
    compares = ((LOGITS, None),)

    smoothing: Annotated[
        float, Option("Share of each label that is spread evenly over all classes.", minimum=0, below=1)
    ] = 0.1
    bce: Annotated[bool, "Binary cross-entropy over classes in place of cross-entropy."] = False

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, _)] = pairs  # [B, K]
        assert batch.targets is not None
        targets = batch.targets if batch.targets.ndim == 1 else batch.targets.to(student.dtype)
        if not self.bce:
            return F.cross_entropy(student, targets, label_smoothing=self.smoothing)
        classes = student.shape[1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes).to(student.dtype)
        smoothed = torch.lerp(targets, torch.full_like(targets, 1 / classes), self.smoothing)
        return F.binary_cross_entropy_with_logits(student, smoothed)
