"""Features of a foundation model, without labels: Proteus (Zhang et al. 2025, arXiv:2407.10366).

    L = w_c MSE( h_1(c_s), c_t )  +  w_p MSE( [h_1(c_s); h_2(P_s)], [c_t; P_t] )
        + w_m MSE( h_3(P'_s), P_t ) over masked patches

c and P are the class token and the patch tokens after the final norm, of the student (s) and of the
teacher (t); P' are the patch tokens of a second view whose patches are partly masked; each h is a
LayerNorm and a linear layer. That h_1 serves in the second part too is the authors' code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.terms import AT_HELP, At, Batch, Site, Term, Tokens, class_token, sent, term, tokens_of
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import EMBEDDING


@term("features")
class Features(Term):
    """Class, patch and masked-patch features (Zhang et al. 2025, arXiv:2407.10366).

    Each part is a mean over images, tokens and channels; all weights are 1 in the paper, and for teachers
    such as CLIP ``patch=0, masked=0``. Where one of the models has no class token, both models' embeddings
    take its place in the first part, and the second is of patch tokens alone.

    The masked part costs a second forward of the student. ⌊B · mask_probability⌋ images of the global batch
    have masked patches, ⌊N · mask⌋ each, and the mean is over these, however many processes share the
    batch. Masked patches take the mean colour, in every family of models alike; the authors put a
    learned token into the sequence instead.

    Raises:
        UserError: for weights below 0 or all 0, ``mask`` or ``mask_probability`` out of range, or a model
            with neither class token nor embedding.
    """

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        cls: Annotated[float, "w_c: weight of the class token, or of the embedding."] = 1.0,
        patch: Annotated[float, "w_p: weight of class and patch tokens together."] = 1.0,
        masked: Annotated[float, "w_m: weight of the masked patches of a second view."] = 1.0,
        mask: Annotated[float, "Share of the patches that are masked, in an image that has any."] = 0.5,
        mask_probability: Annotated[float, "Share of the images that have masked patches."] = 0.5,
        at: Annotated[At, AT_HELP + " The class token stays after the final norm."] = "ffn",
    ) -> None:
        super().__init__()
        weights = {"cls": cls, "patch": patch, "masked": masked}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise UserError(
                f"features: cls={cls:g}, patch={patch:g}, masked={masked:g} are no weights",
                "none below 0, one at least above: the paper's are all 1",
            )
        if not 0 < mask < 1:
            raise UserError(f"features: mask is {mask:g}, not between 0 and 1", "the paper's is 0.5")
        if not 0 < mask_probability <= 1:
            raise UserError(
                f"features: mask_probability is {mask_probability:g}, neither 1 nor between 0 and 1",
                "the paper's is 0.5; masked=0 leaves the part out",
            )
        self.weights = weights
        self.mask_probability = mask_probability
        self.asks_second_view = masked > 0

        vits = student, teacher
        self.class_tokens = student.class_token and teacher.class_token
        if self.class_tokens:
            whole = Site(*(tokens_of(vit, -1, "features", tokens="class") for vit in vits))
        else:
            whole = Site(*(Tokens(EMBEDDING, vit.embed_dim, (1, 1)) for vit in vits))
        self.patches = patches = Site(*(tokens_of(vit, -1, "features", at=at) for vit in vits))
        self.tokens = patches.student.grid[0] * patches.student.grid[1]
        self.masked_tokens = max(1, int(self.tokens * mask))
        sites = {}
        if cls or (patch and self.class_tokens):
            sites["cls"] = whole
            self.warnings = (self.which(*vits),)
        if patch:
            sites["patch"] = patches
        if masked:
            sites["masked"] = Site(
                patches.student._replace(tap=replace(patches.student.tap, view=1)), patches.teacher
            )
        self.compares = [site.taps for site in sites.values()]
        self.heads = nn.ModuleDict(
            {
                part: nn.Sequential(
                    nn.LayerNorm(site.student.dim), nn.Linear(site.student.dim, site.teacher.dim)
                )
                for part, site in sites.items()
            }
        )

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
        mask = sent(mask, images.device).to(images.dtype)
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
                at = sent(mask.nonzero(), student.device).unbind(1)
                squares = (head(student[at]) - self.patches.target(teacher)[at]).square()  # [masked, D]
                loss = squares.sum() / (number * teacher.shape[-1])
            losses.append(self.weights[part] * loss)
        return torch.stack(losses).sum()
