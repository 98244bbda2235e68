"""What can be copied, and is not pickled."""

from __future__ import annotations

import copy
from typing import Any, Self

from qjl.errors import QJLError


class Copied:
    """Copies hold what ``_copied`` gives; a pickle is refused by naming what to do instead."""

    def _copied(self) -> dict[str, Any]:
        return vars(self)

    def __copy__(self) -> Self:
        return self._twin(self._copied(), {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._twin(copy.deepcopy(self._copied(), memo), memo)

    def _twin(self, attributes: dict[str, Any], memo: dict[int, Any]) -> Self:
        twin = memo[id(self)] = type(self).__new__(type(self))
        vars(twin).update(attributes)
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise QJLError(
            "a quantized cache is not pickled: write it with cache.save(path), and read it with "
            "qjl.KVCache.load(path, model)."
        )
