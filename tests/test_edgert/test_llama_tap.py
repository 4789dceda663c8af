"""The tap's primitives on a real model, and the check of the structures it reads."""

import ctypes
from pathlib import Path

import numpy as np
import pytest

from edgert.errors import BackendError, ConfigError
from edgert.llama.lib import Tensor, load_library, verify_layout
from native import PROMPT, tapped

pytestmark = pytest.mark.model


def test_a_wrong_tensor_layout_is_refused() -> None:
    class Shifted(ctypes.Structure):
        _fields_ = [("gap", ctypes.c_int64), *Tensor._fields_]

    with pytest.raises(BackendError, match="another layout"):
        verify_layout(load_library().base, Shifted)


def test_capture_stop_then_inject_equals_the_whole_graph(random_models: dict[str, Path]) -> None:
    with tapped(random_models["plain"]) as (context, tap):
        whole = context.decode(PROMPT, 0, 1).copy()
        context.clear()
        hidden = tap.capture("l_out-3")
        context.decode(PROMPT, 0, 1)
        assert hidden.value is not None
        assert hidden.value.shape[1] == context.model.n_embd
        context.clear()
        tap.release("l_out-3")
        first = tap.capture("l_out-0", stop=True)
        tap.begin()
        context.decode(PROMPT, 0, 1)
        assert first.value is not None
        assert first.value.shape == (len(PROMPT), context.model.n_embd)
        tap.release("l_out-0")
        tap.begin()
        context.clear()
        assert np.array_equal(context.decode(PROMPT, 0, 1), whole)


def test_inject_takes_the_place_of_the_embedding(random_models: dict[str, Path]) -> None:
    with tapped(random_models["plain"]) as (context, tap):
        embedded = tap.capture("embd")
        whole = context.decode(PROMPT, 0, 1).copy()
        assert embedded.value is not None
        states = embedded.value
        tap.release("embd")
        context.clear()
        assert np.array_equal(context.decode_hidden(states, 0, 1), whole)


def test_replace_overwrites_a_node(random_models: dict[str, Path]) -> None:
    with tapped(random_models["plain"]) as (context, tap):
        whole = context.decode(PROMPT, 0, 1).copy()
        context.clear()
        tap.replace("ffn_out-1", lambda values: values)
        assert np.array_equal(context.decode(PROMPT, 0, 1), whole)
        context.clear()
        tap.replace("ffn_out-1", lambda values: 0 * values)
        assert not np.array_equal(context.decode(PROMPT, 0, 1), whole)


def test_an_error_inside_the_callback_reaches_the_caller(random_models: dict[str, Path]) -> None:
    with tapped(random_models["plain"]) as (context, tap):
        tap.replace("ffn_out-1", lambda values: values[:, :1])
        tap.begin()
        context.decode(PROMPT, 0, 1)
        with pytest.raises(ConfigError, match="replacement has shape"):
            tap.raise_error()
        tap.raise_error()
