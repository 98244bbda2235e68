"""A quantizer for tests that shows a token out of place, or coded twice, at once."""

from dataclasses import dataclass

import torch

from qjl.methods.base import Codec, Quantizer
from qjl.packed import BLOCK, Field, block_positions, blocks_of_tokens


@dataclass(frozen=True)
class Stamp(Quantizer):
    """Rounds tokens and stamps them with their position."""

    method = "stamp"
    source = "-"

    def layout(self, head_dim, dtype=torch.float32):
        return {"tokens": Field((BLOCK, head_dim), torch.float32)}

    def build(self, context, learned):
        return StampCodec(self.layout(context.head_dim))


@dataclass(frozen=True, eq=False)
class StampCodec(Codec):
    layout: dict

    def quantize(self, x, first):
        return {"tokens": blocks_of_tokens(x.round() + 1000 * block_positions(first)[:, None, :, None])}

    def dequantize(self, blocks, first):
        return blocks["tokens"].flatten(2, 3) - 999 * block_positions(first)[:, None, :, None]
