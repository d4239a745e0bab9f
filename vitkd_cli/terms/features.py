"""Features of a foundation model, without labels: Proteus (Zhang et al. 2025, arXiv:2407.10366).

    L = w_c MSE( h_1(c_s), c_t )  +  w_p MSE( [h_1(c_s); h_2(P_s)], [c_t; P_t] )
        + w_m MSE( h_3(P'_s), P_t ) over masked patches

c and P are the class token and the patch tokens after the final norm, of the student (s) and of the
teacher (t); P' are the patch tokens of a second view whose patches are partly masked; each h is a
LayerNorm and a linear layer. That h_1 serves in the second part too is the authors' code.
"""

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, term, to_device
from vitkd_cli.terms.bases import FeatureTerm, Site, TokenTap, class_token, tokens_of
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import EMBEDDING


@term("features")
class Features(FeatureTerm):
    """Class, patch and masked-patch features (Zhang et al. 2025, arXiv:2407.10366).

    Each part is a mean over images, tokens and channels; all weights are 1 in the paper, and for teachers
    such as CLIP ``patch=0, masked=0``. Where one of the models has no class token, both models' embeddings
    take its place in the first part, and the second is of patch tokens alone.

    The masked part costs a second forward of the student. ⌊B · mask_probability⌋ images of the global batch
    have masked patches, ⌊N · mask⌋ each, and the mean is over these, however many processes share the
    batch. Masked patches take the mean colour, in every family of models alike; the authors put a
    learned token into the sequence instead. ``at`` applies to patch tokens; the class token is read after the
    final norm.
    """

    cls: Annotated[float, Option("w_c: weight of the class token, or of the embedding.", minimum=0)] = 1.0
    patch: Annotated[float, Option("w_p: weight of class and patch tokens together.", minimum=0)] = 1.0
    masked: Annotated[float, Option("w_m: weight of the masked patches of a second view.", minimum=0)] = 1.0
    mask: Annotated[
        float, Option("Share of the patches that are masked, in an image that has any.", above=0, below=1)
    ] = 0.5
    mask_probability: Annotated[
        float, Option("Share of the images that have masked patches.", above=0, maximum=1)
    ] = 0.5
    at = "ffn"
    norm: Literal["auto"] = "auto"  # no option

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        if not (self.cls or self.patch or self.masked):
            raise UserError("features: cls=0, patch=0, masked=0 are no weights", "the paper's are all 1")
        self.asks_second_view = self.masked > 0
        [self.patches] = self.sites
        self.tokens = self.patches.student.grid[0] * self.patches.student.grid[1]
        self.masked_tokens = max(1, int(self.tokens * self.mask))

        vits = student, teacher
        self.class_tokens = student.class_token and teacher.class_token
        if self.class_tokens:
            whole = Site(*(tokens_of(vit, -1, self.word, tokens="class") for vit in vits))
        else:
            whole = Site(*(TokenTap(EMBEDDING, vit.embed_dim, (1, 1)) for vit in vits))
        parts = {}
        if self.cls or (self.patch and self.class_tokens):
            parts["cls"] = whole
            self.warnings = (self.which(*vits),)
        if self.patch:
            parts["patch"] = self.patches
        if self.masked:
            second = self.patches.student._replace(tap=replace(self.patches.student.tap, view=1))
            parts["masked"] = Site(second, self.patches.teacher)
        self.compares = [site.taps for site in parts.values()]
        self.heads = nn.ModuleDict(
            {
                part: nn.Sequential(nn.LayerNorm(ours.dim), nn.Linear(ours.dim, theirs.dim))
                for part, (ours, theirs) in parts.items()
            }
        )

    def block_pairs(self, student: ViTSpec, teacher: ViTSpec) -> list[tuple[int, int]]:
        return [(student.depth - 1, teacher.depth - 1)]

    def which(self, *vits: ViTSpec) -> str:
        """What the first part compares, in words."""
        if self.class_tokens:
            return "features compares the class tokens of both models"
        for vit in vits:
            if not vit.embed_dim:
                raise UserError(
                    f"features: {vit.name} has no embedding to compare, and not both have a class token",
                    "features(cls=0) compares patch tokens alone",
                )
        without = " and ".join(vit.name for vit in vits if not vit.class_token)
        return f"features compares the embeddings of both models: {without} has no class token"

    def draw(self, images: int, batch: Batch) -> tuple[Tensor, float]:
        """Which patches are masked, ``[B, N]`` on the CPU, True where they are; and the number to divide by.

        That number is these images' part, by their count, of all masked patches of the global batch: it
        does not depend on which of the masked images are here.
        """
        if batch.mask is not None:
            return batch.mask.bool(), max(1.0, float(batch.mask.sum()))
        everyone = images if batch.rows is None else batch.global_size
        count = max(1, int(everyone * self.mask_probability))
        chosen = replace(batch, rows=None).rand(everyone, 1).argsort(0).argsort(0) < count  # [global B, 1]
        if batch.rows is not None:
            chosen = chosen[batch.rows]
        masked = batch.rand(images, self.tokens).argsort(1).argsort(1) < self.masked_tokens
        return chosen & masked, images / everyone * count * self.masked_tokens

    def view(self, images: Tensor, batch: Batch) -> Tensor:
        """The images ``[B, C, H, W]``, normalised, with masked patches at 0, the mean colour."""
        mask, _ = self.draw(len(images), batch)
        mask = mask.view(-1, 1, *self.patches.student.grid)
        mask = to_device(mask, images.device).to(images.dtype)
        return images.masked_fill(F.interpolate(mask, size=images.shape[-2:]).bool(), 0)

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        losses = []
        whole: list[Tensor] = []
        for (part, head), (student, teacher) in zip(self.heads.items(), pairs, strict=True):
            assert teacher is not None
            if part == "cls":  # [B, P_s, D_s] and [B, P, D], or [B, E_s] and [B, E]
                if self.class_tokens:
                    student, teacher = class_token(student), class_token(teacher)
                squares = (head(student) - teacher).square()
                loss = squares.mean()
                if self.class_tokens:
                    whole.append(squares)  # [B, 1, D]
            elif part == "patch":  # [B, N, D_s], [B, N_t, D]
                squares = (head(student) - self.patches.target(teacher)).square()
                loss = torch.cat([*whole, squares], dim=1).mean()
            else:
                mask, number = self.draw(len(student), batch)
                at = to_device(mask.nonzero(), student.device).unbind(1)
                squares = (head(student[at]) - self.patches.target(teacher)[at]).square()  # [masked, D]
                loss = squares.sum() / (number * teacher.shape[-1])
            losses.append(getattr(self, part) * loss)
        return torch.stack(losses).sum()
