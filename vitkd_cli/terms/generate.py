"""Generation of the deep block: the other half of ViTKD (Yang et al. 2022, arXiv:2209.02432, eq. 5-8).

    L = 1/λ Σ_{n masked} Σ_d ( T − G(Ŝ) )²,   mean over images
    Ŝ = fc(S), a share λ of its tokens replaced by one learned vector
    G = conv3×3, ReLU, conv3×3 over the grid of tokens; or six transformer layers

S and T are patch tokens [N, D] of the student and of the teacher. 1/λ, the exact number of masked
tokens and the absent fc where the widths are equal are the authors' code, not their text; the
options divide_by_share, masking and always_align have it as the text does.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, exactly, term, to_device
from vitkd_cli.terms._generators import GENERATORS, gather_tokens
from vitkd_cli.terms.bases import FeatureTerm, Reduce
from vitkd_cli.vit.pairing import pair_blocks
from vitkd_cli.vit.spec import ViTSpec

Mask = Annotated[float, Option("λ: share of the student's tokens that are masked.", above=0, below=1)]


@term("generate")
class Generate(FeatureTerm):
    """Squared distance of the generated tokens (Yang et al. 2022, arXiv:2209.02432, eq. 8).

    Summed over masked tokens and channels, divided by λ, mean over images; the paper's weight for
    that is 3e-6. ``reduce="mean"`` is a plain mean over masked tokens and channels, so the paper's
    weight becomes 3e-6 · masked tokens · D / λ: 0.226 for 98 of 196 tokens, 384 wide.

    ``generator="cross_attention"`` is after CAE (Chen et al. 2022, arXiv:2202.03026): masked tokens attend
    to the kept ones. ``"self_attention"`` is after MAE (He et al. 2021, arXiv:2111.06377): kept and masked
    tokens attend to each other. Both have six layers at the teacher's width D, heads of 64 channels and
    fixed sine-cosine positions: 73 D² weights, where the convolutions have 18 D².

    ``masked_only=false`` takes the distance at all tokens, as MGD does (Yang et al. 2022,
    arXiv:2205.01529). MGD has no 1/λ: ``generate(masked_only=false, divide_by_share=false)``.

    ``masking="bernoulli"`` masks each token by its own draw, so the number differs from image to image;
    one with nothing masked counts as 0, and ``reduce="mean"`` is the mean of each image's own mean.
    """

    weight = 3e-6

    block: Annotated[
        int | str, 'Block to compare with the same one of the teacher; -1 is the last, "5:11" a pair.'
    ] = -1
    mask: Mask = 0.5
    generator: Annotated[
        Literal["conv", "cross_attention", "self_attention"], "G: what generates the masked tokens."
    ] = "conv"
    masking: Annotated[
        Literal["exact", "bernoulli"],
        "Keep ⌊N(1 − λ)⌋ tokens of each image (exact), or each one with probability 1 − λ (bernoulli).",
    ] = "exact"
    masked_only: Annotated[bool, "Take the distance at masked tokens only, or at all of them."] = True
    divide_by_share: Annotated[bool, "Divide the sum by λ; a mean never is."] = True
    always_align = False
    at = "ffn"
    norm = "auto"
    reduce: Reduce = "sum"
    target_norm = "none"

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        [self.site] = self.sites
        ours, theirs = self.site
        self.align = self.site.align(self.always_align)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, theirs.dim))
        # The option has the attribute of that name; checkpoints know the module by it.
        self._modules["generator"] = GENERATORS[self.generator](theirs.dim, ours.grid)
        # Computed at the masked tokens alone, where every image has equally many.
        self.sparse = self.generator == "conv" and self.masking == "exact" and self.masked_only

    @property
    def generate(self) -> Any:
        return self._modules["generator"]

    def block_pairs(self, student: ViTSpec, teacher: ViTSpec) -> list[tuple[int, int]]:
        pairs = pair_blocks(self.block, student, teacher, self.word)
        if len(pairs) > 1:
            raise UserError(
                f"generate: block {self.block!r} is {len(pairs)} blocks, and generate compares one",
                "write it once for each: generate(block=0) + generate(block=1)",
            )
        return pairs

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, N, D_s], [B, N_t, D]
        assert teacher is not None
        target = self.site.target(teacher, self.target_norm)  # [B, N, D]
        masked = self.draw(len(student), student.shape[1], batch)  # [B, N], true = masked
        if not self.sparse:
            masked = to_device(masked, student.device)
        counted = masked if self.masked_only else torch.ones_like(masked)
        if self.sparse:
            kept, indices = (to_device(index, student.device) for index in kept_and_masked(masked))
            made = self.generate.at_masked(student, self.align, self.mask_token, kept, indices)
            squares = (made - gather_tokens(target, indices)).square()  # [B, masked, D]
        else:
            with exactly(student):
                tokens = torch.where(masked[..., None], self.mask_token, self.align(student))
            squares = (self.generate(tokens, masked) - target).square() * counted.to(target)[..., None]
        distances = squares.sum(dim=(1, 2))  # [B]
        if self.reduce == "mean":
            counts = to_device(counted.sum(dim=1).clamp(min=1), distances.device)
            return (distances / (counts * target.shape[2])).mean()
        # By the share asked for, not by the one that rounding leaves: it is the authors' 1/λ.
        return distances.mean() / (self.mask if self.divide_by_share else 1.0)

    def draw(self, images: int, tokens: int, batch: Batch) -> Tensor:
        """Which tokens are masked, ``[B, N]``."""
        if batch.mask is not None:
            return batch.mask.bool()
        noise = batch.rand(images, tokens)
        if self.masking == "bernoulli":
            return noise < self.mask
        kept = noise.argsort(dim=1)[:, : int(tokens * (1 - self.mask))]
        return torch.ones(images, tokens, dtype=torch.bool).scatter(1, kept, False)


def kept_and_masked(masked: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the kept and of the masked tokens, ``[B, kept]`` and ``[B, masked]``, in their order."""
    images, tokens = masked.shape
    counts = masked.sum(dim=1)  # [B]
    if (counts != counts[0]).any():
        raise ValueError(f"a mask must cover equally many tokens of each image, not {counts.tolist()}")
    count = int(counts[0])
    kept, covered = (~masked).nonzero()[:, 1], masked.nonzero()[:, 1]
    return kept.view(images, tokens - count), covered.view(images, count)
