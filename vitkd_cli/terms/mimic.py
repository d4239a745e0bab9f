"""Mimicking of shallow blocks: one half of ViTKD (Yang et al. 2022, arXiv:2209.02432, eq. 2).

    L = Σ_i Σ_n Σ_d ( T_i − fc_i(S_i) )²,   mean over images

S_i and T_i are the patch tokens [N, D] after block i of the student and of the teacher; fc_i is a
linear layer of the block's own, and absent where the widths are equal. A linear hint on a block's
output is FitNets' idea (Romero et al. 2014, arXiv:1412.6550).
"""

from typing import Annotated, Any, Literal

from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from vitkd_cli.terms import term
from vitkd_cli.terms.bases import FeatureTerm, TokenTap, class_token, tokens_of
from vitkd_cli.vit.spec import ViTSpec


@term("mimic")
class Mimic(FeatureTerm):
    """Squared distance of aligned tokens (Yang et al. 2022, arXiv:2209.02432, eq. 2).

    Summed over blocks, tokens and channels, mean over images; the paper's weight for that is 3e-5.
    ``reduce="mean"`` also divides by blocks · N · D, so the paper's weight becomes 3e-5 · 2 · N · D:
    4.52 for two blocks of 196 tokens, 384 wide. ``tokens="class", normalize=true, reduce="mean"`` is
    patient distillation, PKD (Sun et al. 2019, arXiv:1908.09355): tokens of length 1 differ by little, so its
    weight is 10 to 1000, and 3e-5 would leave it without effect.
    """

    weight = 3e-5

    blocks = (0, 1)
    at = "ffn"
    tokens: Annotated[Literal["patch", "class"], "Compare the patch tokens or the class token."] = "patch"
    normalize: Annotated[bool, "Scale each token to length 1 first, the student's after its layer."] = False
    always_align = False
    norm = "auto"
    reduce = "sum"
    target_norm = "none"

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        self.align = nn.ModuleList(site.align(self.always_align) for site in self.sites)

    def read(self, vit: ViTSpec, block: int) -> TokenTap:
        return tokens_of(vit, block, self.word, at=self.at, norm=self.norm, tokens=self.tokens)

    def squares(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """( T − fc(S) )² of a pair of blocks, ``[B, N, D]``; one token where it is the class token."""
        if self.tokens == "class":
            student, teacher = class_token(student), class_token(teacher)
        ours = self.align[index](student)
        target = self.sites[index].target(teacher, self.target_norm)  # [B, N, D] each
        if self.normalize:
            ours, target = unit(ours, dim=-1), unit(target, dim=-1)
        return (target - ours).square()
