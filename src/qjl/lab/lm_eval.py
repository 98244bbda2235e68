"""The model ``qjl`` of lm-evaluation-harness, and the harness's own command line with it.

``python -m qjl.lab.lm_eval`` takes the words of ``lm_eval``, such as ``--model qjl --model_args
pretrained=smollm2,preset=b3 --tasks piqa``. It is needed because the harness (0.4.13) knows the models of other
packages only once they are imported, and has no entry points to import them by. In Python, importing this module is
enough.
"""

from __future__ import annotations

import sys

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from qjl import corpora, models
from qjl.errors import QJLError
from qjl.lab.evals.eval_model import EvalModel
from qjl.lab.evals.packed_lm import PackedModel
from qjl.lab.reuploads import place
from qjl.presets import resolve


@register_model("qjl")
class QuantizedLM(PackedModel):
    """A model whose answers are all read from a quantized cache.

    Args:
        pretrained: a model as `qjl eval` takes it: smollm2, a folder, a .gguf file, or a name on the hub.
        preset: one of `qjl presets`, or a .json file.
        recent: exact tokens at the end; ``own`` for the preset's.
        chunk: contexts are read so many tokens at a time, over the codes of those before; all at once if not given.
        data: a UTF-8 text that codecs are fitted to, never the questions; Paul Graham's essays if not given.
        seed: of the projections.
        dtype, device: as of `qjl.load`.
        batch_size: continuations, or prompts to go on from, that go through the model together.
        max_batch_size: given by the harness; there is no automatic batch here.

    Raises:
        QJLError: if the model, the preset or the text is not to be had, or the model cannot have the preset.
    """

    def __init__(
        self,
        pretrained: str = models.EMBEDDED,
        preset: str = "b3",
        *,
        recent: int | str = 0,
        chunk: int | None = None,
        data: str | None = None,
        seed: int = 0,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
    ) -> None:
        if not str(batch_size).isdecimal():
            raise QJLError(f"batch_size {batch_size!r} is no number: give one, such as 8.")
        if recent != "own" and not str(recent).isdecimal():
            raise QJLError(f"recent {recent!r} is no number of tokens: give one, or own for that of the preset.")
        config = resolve(preset).with_seed(seed).with_window(None if recent == "own" else int(recent))
        text = corpora.essays() if data is None else corpora.read_text(data)
        network, tokenizer = models.load(place(pretrained), device=_device(device), dtype=dtype)
        cache = EvalModel(pretrained, network, tokenizer, text).cache(config)
        super().__init__(network, tokenizer, cache, chunk=chunk, batch=int(batch_size))


def _device(asked: str | None) -> str:
    """As for the harness's other models: it says cuda:0 where nothing was asked for, and means the CPU without one."""
    return asked if asked and (torch.cuda.is_available() or not asked.startswith("cuda")) else "cpu"


def main() -> None:
    """The harness's command line, in which ``--model qjl`` is known; a mistake is told in one sentence."""
    try:
        cli_evaluate()
    except QJLError as error:
        sys.exit(f"Error: {str(error).rstrip('.')}.")


if __name__ == "__main__":
    main()
