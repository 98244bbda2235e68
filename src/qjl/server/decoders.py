"""Which part of a decoded text no later token can change, by the decoder that a tokenizer has."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers.decoders import Decoder
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

UNFINISHED = "\ufffd"  # what the bytes of a character decode to as long as not all of them are there
_SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
_OF_ONE_TOKEN = {"Replace", "Strip", "Metaspace", "WordPiece", "CTC"}  # they look at a token, and at most at its place
_BYTE = re.compile("<0x..>", re.DOTALL)


@dataclass(frozen=True)
class Rules:
    """How tokens become text that depends on few tokens before and behind them.

    - ``is_silent``: the token leaves no trace in any text.
    - ``is_open``: the token's text, and that of such tokens right before it, depends on the token behind it.
    - ``joins_bytes``: the last character may be one that is unfinished.
    """

    is_silent: Callable[[int], bool]
    is_open: Callable[[int], bool]
    joins_bytes: bool


def rules_of(tokenizer: PreTrainedTokenizerBase) -> Rules | None:
    """None where a text is certain only when all of its tokens are there."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or _decodes_in_its_own_way(type(tokenizer)):
        return None
    backend = tokenizer.backend_tokenizer
    stages = _stages(backend.decoder)
    if stages is None or not _is_local(stages):
        return None
    kinds = [stage["type"] for stage in stages]
    special = {token for token, added in backend.get_added_tokens_decoder().items() if added.special}
    silent = {None, ""} if "ByteLevel" in kinds else {None}
    opens = _opening(stages)
    return Rules(
        lambda token: token in special or backend.id_to_token(token) in silent,
        lambda token: opens(str(backend.id_to_token(token))),
        "ByteLevel" in kinds,
    )


def _decodes_in_its_own_way(kind: type) -> bool:
    order = kind.__mro__
    own = order[: order.index(PreTrainedTokenizerFast)]
    return any({"decode", "_decode"} & vars(one).keys() for one in own)


def _stages(decoder: Decoder | None) -> list[dict[str, Any]] | None:
    """Settings of the decoders that work one behind the other; None of those written in Python."""
    if decoder is None:
        return []
    try:
        state = json.loads(decoder.__getstate__())
    except Exception as error:  # of no kind of its own
        if "Custom" not in str(error):
            raise
        return None
    return list(_flat(state))


def _flat(state: dict[str, Any]) -> list[dict[str, Any]]:
    if state["type"] != "Sequence":
        return [state]
    return [stage for one in state["decoders"] for stage in _flat(one)]


def _is_local(stages: list[dict[str, Any]]) -> bool:
    """Whether a token's text depends on the tokens right beside it alone, once there is some text before it."""
    is_joined = False
    for place, stage in enumerate(stages):
        kind, before = stage["type"], stages[:place]
        if is_joined:
            if not _keeps_to_characters(stage):
                return False
        elif kind == "BPEDecoder":
            if before or any(one["type"] != "Fuse" for one in stages[1:]):
                return False
        elif kind == "ByteFallback":
            if any(one != _SPACES for one in before):
                return False
        elif kind == "ByteLevel":
            if before:
                return False
        elif kind not in _OF_ONE_TOKEN | {"Fuse"}:
            return False
        is_joined = is_joined or kind in ("ByteLevel", "Fuse")
    return True


def _keeps_to_characters(stage: dict[str, Any]) -> bool:
    """Whether a text of all tokens is changed character by character, but for its beginning."""
    if stage["type"] == "Replace":
        pattern = stage["pattern"].get("String", "")
        return len(pattern) == 1 and pattern != UNFINISHED
    return stage["type"] in ("Fuse", "Metaspace") or (stage["type"] == "Strip" and not stage["stop"])


def _opening(stages: list[dict[str, Any]]) -> Callable[[str], bool]:
    kinds = {stage["type"]: stage for stage in stages}
    if "ByteFallback" in kinds:  # one wrong byte makes all bytes beside it wrong
        return lambda token: _BYTE.fullmatch(token) is not None
    if "BPEDecoder" in kinds:  # the last token's suffix is no space
        suffix = kinds["BPEDecoder"]["suffix"]
        return lambda token: not token.replace(suffix, " ").startswith(token.replace(suffix, ""))
    return lambda token: False
