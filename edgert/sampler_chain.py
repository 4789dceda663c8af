"""llama.cpp's sampler chain over NumPy logits: penalties, top-k, top-p, min-p, temperature."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError
from edgert.llama.lib import load_library

if TYPE_CHECKING:
    from edgert.sampling import SamplingParams

# struct llama_token_data (include/llama.h): int32 id, float logit, float p
TOKEN_DATA = np.dtype([("id", "<i4"), ("logit", "<f4"), ("p", "<f4")])


class SamplerChain:
    """The filters of one generation, as llama.cpp implements them. `close` frees them.

    Args:
        params: Checked parameters.
        n_vocab: Tokens in the vocabulary.
    """

    def __init__(self, params: SamplingParams, n_vocab: int) -> None:
        api = load_library().api
        self._api = api
        self._ids = np.arange(n_vocab, dtype=np.int32)
        self._penalties = _penalties(api, params, n_vocab)
        self._filters = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        filters = [
            api.llama_sampler_init_top_k(params.top_k),
            api.llama_sampler_init_top_p(params.top_p, 1),
            api.llama_sampler_init_min_p(params.min_p, 1),
        ]
        if not params.greedy:
            filters.append(api.llama_sampler_init_temp(params.temperature))
        for one in filters:
            api.llama_sampler_chain_add(self._filters, one)

    def apply(self, logits: NDArray[np.float32]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Return the token ids that all filters keep and their changed logits."""
        return self._run(self._ids, logits, penalize=True)

    def filter(
        self, token_ids: NDArray[np.int32], logits: NDArray[np.float32]
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Apply everything except the penalties to some tokens."""
        return self._run(token_ids, logits, penalize=False)

    def penalize(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (n_vocab,) logits after the repeat penalty."""
        if self._penalties is None:
            return logits
        data = _token_data(self._ids, logits)
        array = _array(self._api, data)
        self._api.llama_sampler_apply(self._penalties, ctypes.byref(array))
        return np.ascontiguousarray(data["logit"])

    def accept(self, token_id: int) -> None:
        """Note a token for the repeat penalty."""
        if self._penalties is not None:
            self._api.llama_sampler_accept(self._penalties, token_id)

    def close(self) -> None:
        """Free the native samplers; calling again does nothing."""
        if self._filters is not None:
            self._api.llama_sampler_free(self._filters)
        if self._penalties is not None:
            self._api.llama_sampler_free(self._penalties)
        self._filters = self._penalties = None

    def _run(
        self, token_ids: NDArray[np.int32], logits: NDArray[np.float32], *, penalize: bool
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        data = _token_data(token_ids, logits)
        array = _array(self._api, data)
        if penalize and self._penalties is not None:
            self._api.llama_sampler_apply(self._penalties, ctypes.byref(array))
        self._api.llama_sampler_apply(self._filters, ctypes.byref(array))
        if not 0 < array.size <= len(data):
            raise BackendError(f"llama.cpp's samplers kept {array.size} of {len(data)} tokens")
        kept = data[: array.size]
        return kept["id"].copy(), kept["logit"].copy()


def _token_data(token_ids: NDArray[np.int32], logits: NDArray[np.float32]) -> NDArray[np.void]:
    data = np.empty(len(token_ids), TOKEN_DATA)
    data["id"], data["logit"], data["p"] = token_ids, logits, 0.0
    return data


def _array(api: Any, data: NDArray[np.void]) -> Any:  # noqa: ANN401  a ctypes structure
    return api.llama_token_data_array(
        data=data.ctypes.data_as(api.llama_token_data_p),
        size=len(data),
        selected=-1,
        sorted=False,
    )


def _penalties(api: Any, params: SamplingParams, n_vocab: int) -> Any:  # noqa: ANN401  as above
    if not params.penalized:
        return None
    return api.llama_sampler_init_penalties(
        n_vocab, params.repeat_last_n, params.repeat_penalty, 0.0, 0.0
    )
