"""What methods share that rotate tokens and have no nibble form."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from qjl.methods.base import Codec
from qjl.packed import Blocks


class TurnedCodec(Codec):
    """Codes of ``rotation x``, ``rotation [H or 1, D, D]``."""

    rotation: Tensor

    @abstractmethod
    def decode(self, blocks: Blocks) -> Tensor:
        """Turned tokens, ``float32 [B, H, T, D]``."""

    def turn(self, x: Tensor) -> Tensor:
        """``rotation x`` of rows ``[B, H, R, D]``."""
        return x.float() @ self.rotation.float().transpose(1, 2)

    def dequantize(self, blocks: Blocks, first: Tensor) -> Tensor:
        return self.decode(blocks) @ self.rotation.float()
