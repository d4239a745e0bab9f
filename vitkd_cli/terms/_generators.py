"""The blocks G with which ``generate`` makes the teacher's tokens out of the student's.

Each is at the teacher's width D, takes tokens ``[B, N, D]`` in which a learned vector stands wherever
``masked`` ``[B, N]`` is true, and returns generated tokens of the same shape.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkd_cli.terms import exactly

DEPTH = 6  # transformer layers of both attention generators, by the text of the ViTKD paper


class Conv(nn.Module):
    """conv3×3, ReLU, conv3×3 over the grid of tokens: that of MGD (Yang et al. 2022, arXiv:2205.01529)."""

    neighbours: Tensor  # [N, 9]

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.conv1 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(dim, dim, kernel_size=3, padding=1)
        self.register_buffer("neighbours", neighbours_of(*grid), persistent=False)

    def forward(self, tokens: Tensor, masked: Tensor) -> Tensor:
        image = tokens.transpose(1, 2).unflatten(2, self.grid)  # [B, D, rows, columns]
        with exactly(image):
            hidden = self.conv1(image).relu()
        made: Tensor = self.conv2(hidden)
        return made.flatten(2).transpose(1, 2)

    def at_masked(
        self, student: Tensor, align: nn.Module, mask_token: Tensor, kept: Tensor, masked: Tensor
    ) -> Tensor:
        """What :meth:`forward` returns at the masked tokens, with about half of its arithmetic.

        Besides constants the first convolution reads the kept tokens alone: each is multiplied with the
        product of the weights of convolution and fc, and added to its nine neighbours. fc's bias and the
        mask token are the constants; they are multiplied with the numbers of kept and of masked neighbours.
        The second convolution is computed at the masked tokens. Value and gradients are those of the dense
        form, which takes 5 % more of a whole training step on a CPU, and 2 to 4 % on a GPU.

        Args:
            student: ``[B, N, D_s]``, before ``align``, a linear layer or nothing.
            mask_token: ``[1, 1, D]``.
            kept, masked: ``[B, kept]`` and ``[B, masked]``, indices of tokens.

        Returns:
            ``[B, masked, D]``.
        """
        images, tokens, _ = student.shape
        width = mask_token.shape[-1]
        # One row more than tokens stands for the neighbours outside the grid.
        rows = torch.arange(images, device=student.device)[:, None, None] * (tokens + 1)
        with exactly(student):
            hidden = self._hidden(student, align, mask_token, kept, masked, rows)

        # conv2, gathered around each masked token.
        hidden = F.pad(hidden.relu(), (0, 0, 0, 1)).flatten(0, 1)  # [B * (N + 1), D]
        near = hidden.index_select(0, (rows + self.neighbours[masked]).flatten()).view(images, -1, 9 * width)
        kernel = self.conv2.weight.permute(0, 2, 3, 1).flatten(1)  # [D, 9 * D]
        return F.linear(near, kernel, self.conv2.bias)

    def _hidden(
        self,
        student: Tensor,
        align: nn.Module,
        mask_token: Tensor,
        kept: Tensor,
        masked: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """What the first convolution makes of all tokens, ``[B, N, D]``, before the ReLU."""
        images, tokens, _ = student.shape
        width = mask_token.shape[-1]
        # The constant that a neighbour adds: fc's bias if it is kept, the mask token if it is masked.
        visible = gather_tokens(student, kept)  # [B, kept, D_s]
        weight, constants = self.conv1.weight, mask_token[0]  # [D, D, 3, 3], [1, D]
        is_masked = student.new_zeros(images, tokens + 1, 1)
        around = is_masked.scatter(1, masked[..., None], 1.0)
        if isinstance(align, nn.Linear):
            weight = torch.einsum("oihw,id->odhw", weight, align.weight)  # [D, D_s, 3, 3]
            constants = torch.cat([constants, align.bias[None]])
            around = torch.cat([around, is_masked.scatter(1, kept[..., None], 1.0)], dim=2)
        constants = torch.einsum("oihw,ci->ohwc", self.conv1.weight, constants).flatten(1)
        counts = around[:, self.neighbours].flatten(2)  # [B, N, 9 * constants]
        hidden = F.linear(counts, constants, self.conv1.bias)  # [B, N, D]

        # conv1, from each kept token to its neighbours, so the kernel is flipped.
        kernel = weight.permute(1, 2, 3, 0).flip(1, 2).flatten(1)  # [D_s, 9 * D]
        carried = (visible @ kernel).view(-1, width)  # [B * kept * 9, D]
        to = (rows + self.neighbours[kept]).flatten()
        arrived = carried.new_zeros(images * (tokens + 1), width).index_add_(0, to, carried)
        return hidden + arrived.view(images, tokens + 1, width)[:, :-1]


class SelfAttention(nn.Module):
    """Six layers of attention among all tokens: MAE's decoder (He et al. 2021, arXiv:2111.06377)."""

    positions: Tensor  # [N, D]

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("positions", positions_of(grid, dim), persistent=False)
        layers = (
            nn.TransformerEncoderLayer(
                dim,
                attention_heads(dim),
                dim_feedforward=4 * dim,
                dropout=0.0,
                activation=F.gelu,
                batch_first=True,
                norm_first=True,
            )
            for _ in range(DEPTH)
        )
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, tokens: Tensor, masked: Tensor) -> Tensor:
        made: Tensor = self.head(self.layers(tokens + self.positions))
        return made


class CrossAttention(nn.Module):
    """Six layers in which tokens attend to the visible ones, which do not change.

    After the regressor of CAE (Chen et al. 2022, arXiv:2202.03026), whose masked tokens also attend to each
    other; the ViTKD paper says only that masked tokens are the queries.
    """

    positions: Tensor  # [N, D]

    def __init__(self, dim: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("positions", positions_of(grid, dim), persistent=False)
        self.layers = nn.ModuleList(_CrossLayer(dim) for _ in range(DEPTH))
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim))

    def forward(self, tokens: Tensor, masked: Tensor) -> Tensor:
        seen = made = tokens + self.positions
        # Attention to nothing would be nan: where nothing is visible, the masked tokens are.
        hidden = masked & ~masked.all(dim=1, keepdim=True)
        for layer in self.layers:
            made = layer(made, seen, hidden)
        made = self.head(made)
        return made


class _CrossLayer(nn.Module):
    """Attention and MLP, each after a norm and beside a skip."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1, self.norm_seen, self.norm2 = (nn.LayerNorm(dim) for _ in range(3))
        self.attn = nn.MultiheadAttention(dim, attention_heads(dim), batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, tokens: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        seen = self.norm_seen(seen)
        attended, _ = self.attn(self.norm1(tokens), seen, seen, key_padding_mask=hidden, need_weights=False)
        tokens = tokens + attended
        made: Tensor = tokens + self.mlp(self.norm2(tokens))
        return made


GENERATORS = {"conv": Conv, "cross_attention": CrossAttention, "self_attention": SelfAttention}


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[B, N, D]`` at indices ``[B, M]``: ``[B, M, D]``."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def neighbours_of(rows: int, columns: int) -> Tensor:
    """``[N, 9]``: the tokens around each token and itself, row by row; N where the grid ends."""
    grid = torch.arange(rows * columns).view(rows, columns)
    framed = F.pad(grid, (1, 1, 1, 1), value=rows * columns)
    return framed.unfold(0, 3, 1).unfold(1, 3, 1).reshape(rows * columns, 9)


def positions_of(grid: tuple[int, int], dim: int) -> Tensor:
    """``[N, D]``: fixed sines and cosines of row and column; zeros beyond a multiple of four channels."""
    from timm.layers import build_sincos2d_pos_embed  # seconds: not before a model is built

    return F.pad(build_sincos2d_pos_embed(list(grid), dim // 4 * 4), (0, dim % 4))


def attention_heads(dim: int) -> int:
    """Heads of 64 channels, as vision transformers have them, or of the next width that divides D."""
    return next(heads for heads in range(max(dim // 64, 1), 0, -1) if dim % heads == 0)
