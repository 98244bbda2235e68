"""One paper per file; ``METHODS`` names them all."""

from __future__ import annotations

from qjl.methods.balanced import Balanced
from qjl.methods.base import Quantizer
from qjl.methods.identity import Identity
from qjl.methods.qjl import QJL
from qjl.methods.uniform import TokenUniform

METHODS: dict[str, type[Quantizer]] = {
    quantizer.method: quantizer  # type: ignore[type-abstract]
    for quantizer in (Identity, QJL, TokenUniform, Balanced)
}
