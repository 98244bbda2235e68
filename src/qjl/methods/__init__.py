"""One paper per file; ``METHODS`` names them all."""

from __future__ import annotations

from qjl.methods.balanced import Balanced
from qjl.methods.base import Quantizer
from qjl.methods.calibquant import CalibQuant
from qjl.methods.identity import Identity
from qjl.methods.int8_fp8 import Fp8, Int8
from qjl.methods.kivi import KIVI
from qjl.methods.kvquant import KVQuant
from qjl.methods.oscar import OSCAR
from qjl.methods.polarquant import PolarQuant
from qjl.methods.qjl import QJL
from qjl.methods.quarot import QuaRot
from qjl.methods.rabitq import RaBitQ
from qjl.methods.saw import SAW
from qjl.methods.transform import Transform
from qjl.methods.turboesm import TurboESM
from qjl.methods.turboquant import TurboQuant
from qjl.methods.uniform import TokenUniform
from qjl.methods.vidkv import VidKVKeys, VidKVValues

METHODS: dict[str, type[Quantizer]] = {
    quantizer.method: quantizer  # type: ignore[type-abstract]
    for quantizer in (
        Identity,
        QJL,
        TokenUniform,
        Balanced,
        Transform,
        QuaRot,
        SAW,
        Int8,
        Fp8,
        OSCAR,
        KVQuant,
        KIVI,
        VidKVKeys,
        VidKVValues,
        CalibQuant,
        TurboQuant,
        PolarQuant,
        RaBitQ,
        TurboESM,
    )
}
