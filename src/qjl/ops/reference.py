"""Every op in plain torch, on any device: the living definition that other backends are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qjl.packed import BLOCK


def pack(nibbles: Tensor) -> Tensor:
    low, high = nibbles[..., 0::2], nibbles[..., 1::2]
    token_major = low | (high << 4)  # [B, H, T, N / 2]
    return token_major.unflatten(2, (-1, BLOCK)).transpose(3, 4).contiguous()


def unpack(codes: Tensor) -> Tensor:
    token_major = codes.transpose(3, 4).flatten(2, 3)
    return torch.stack([token_major & 15, token_major >> 4], dim=-1).flatten(3)


def scan(tables: Tensor, codes: Tensor) -> Tensor:
    batch, heads, rows, nibbles, _ = tables.shape
    flat = tables.permute(0, 1, 3, 4, 2).reshape(batch * heads * nibbles * 16, rows)
    first = torch.arange(batch * heads * nibbles, device=codes.device, dtype=torch.int32) * 16
    index = unpack(codes).int() + first.view(batch, heads, 1, nibbles)
    sums = F.embedding_bag(index.flatten(0, 2), flat, mode="sum")
    return sums.view(batch, heads, index.shape[2], rows).transpose(2, 3)


def expand(entries: Tensor, codes: Tensor) -> Tensor:
    """Looks up whole bytes: a table of 256 pairs of nibbles halves the number of look-ups."""
    heads, nibbles, _, width = entries.shape
    pairs = _byte_entries(entries.float())  # [H, N / 2, 256, 2w]
    first = torch.arange(heads * nibbles // 2, device=codes.device, dtype=torch.int32) * 256
    index = codes.transpose(3, 4).flatten(2, 3).int() + first.view(heads, 1, nibbles // 2)
    return F.embedding(index, pairs.view(-1, 2 * width)).flatten(3)


def _byte_entries(entries: Tensor) -> Tensor:
    heads, nibbles, _, width = entries.shape
    low = entries[:, 0::2, None, :, :].expand(heads, nibbles // 2, 16, 16, width)
    high = entries[:, 1::2, :, None, :].expand(heads, nibbles // 2, 16, 16, width)
    return torch.cat([low, high], dim=-1).view(heads, nibbles // 2, 256, 2 * width)
