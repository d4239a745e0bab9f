"""Soft targets (Hinton et al. 2015, arXiv:1503.02531, section 2).

    L = T² KL( softmax(t / T) ‖ softmax(s / T) )

s and t are the student's and the teacher's logits; T² keeps the gradient's size when T changes. With
``standardize`` each image's logits z become (z − mean) / std over classes first, in both models (Sun et
al. 2024, arXiv:2403.01427).
"""

from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.terms import Batch, term
from vitkd_cli.terms.bases import LogitTerm


@term("kd")
class KD(LogitTerm):
    """Soft targets (Hinton et al. 2015, arXiv:1503.02531), in nats, sum over classes, mean over images.

    ``soft_ce`` adds the teacher's entropy, T² H(softmax(t / T)): another value, the same gradient.
    Divided by the number of classes K it is a mean over classes too, which some codebases take.

    ``standardize`` leaves the student free to choose the size and the mean of its logits; logits of
    standard deviation 1 want a T near 2 and a weight near 9. Its authors then weigh the labels by 0.1 for
    convolutional networks on CIFAR-100, by 0.5 on ImageNet, and by 1 for vision transformers.
    """

    temperature = 1.0
    soft_ce: Annotated[bool, "Cross-entropy in place of KL: the gradient is the same."] = False
    standardize: Annotated[bool, "Give each image's logits mean 0 and deviation 1 first."] = False

    def loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        student, teacher = student / self.temperature, teacher / self.temperature
        if self.soft_ce:
            return self.temperature**2 * F.cross_entropy(student, teacher.softmax(dim=1))
        return self.temperature**2 * kl_divergence(student, teacher)


def standardized(logits: Tensor) -> Tensor:
    """Each image's logits ``[B, K]`` with mean 0 and, unbiased, standard deviation 1 over classes."""
    # 1e-7 is the authors' guard against logits that are all the same.
    return (logits - logits.mean(dim=1, keepdim=True)) / (1e-7 + logits.std(dim=1, keepdim=True))


def kl_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(softmax(teacher) ‖ softmax(student)) of logits ``[B, K]``, in nats, mean over images."""
    log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
