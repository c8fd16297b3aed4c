"""Environment variables: read when they are asked for, in one place, which the README repeats."""

from __future__ import annotations

import os

import pytest

from model.errors import UserError
from model.plumbing import environment
from model.plumbing.environment import CACHE_GIB, LAUNCHER


def test_a_value_is_read_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LATENT_GPT_LAUNCHER", raising=False)
    assert LAUNCHER.get() == "torchrun"
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "pytorchjob")
    assert LAUNCHER.get() == "pytorchjob"
    monkeypatch.setenv("LATENT_GPT_LAUNCHER", "")
    assert LAUNCHER.get() == "torchrun", "set to nothing is as good as unset"


def test_a_number_is_a_number_above_0(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_CACHE_GIB", "0.5")
    assert CACHE_GIB.get() == 0.5
    for wrong in ("much", "-1", "0", "inf", "nan"):
        monkeypatch.setenv("LATENT_GPT_CACHE_GIB", wrong)
        with pytest.raises(
            UserError, match=f"^LATENT_GPT_CACHE_GIB is '{wrong}'; it must be a number of GiB"
        ):
            CACHE_GIB.get()


def test_variables_are_back_after_the_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", "/before")
    monkeypatch.delenv("LATENT_GPT_CACHE", raising=False)
    with environment.within({"LATENT_GPT_STORE": "/within", "LATENT_GPT_CACHE": "/c"}):
        assert (environment.STORE.get(), environment.CACHE.get()) == ("/within", "/c")
    assert os.environ["LATENT_GPT_STORE"] == "/before"
    assert "LATENT_GPT_CACHE" not in os.environ


def test_a_child_gets_ours_and_the_last_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENT_GPT_STORE", "/ours")
    child = environment.of_a_child({"A": "1", "B": "1"}, {"B": "2"})
    assert (child["LATENT_GPT_STORE"], child["A"], child["B"]) == ("/ours", "1", "2")
    assert "A" not in os.environ
