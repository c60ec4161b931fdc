"""Muted loggers and the errors for names and files that cannot be had."""

import contextlib
import logging
from types import SimpleNamespace

import pytest

from vit_reciprocam.errors import DownloadError, ModelError, first_line
from vit_reciprocam.libraries.common.loading import (
    first_sentence,
    no_such_model,
    not_fetched,
    quiet,
)


def test_quiet_mutes_the_named_loggers_and_restores_their_levels(caplog):
    hub, other = logging.getLogger("hub"), logging.getLogger("other")
    hub.setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        with contextlib.suppress(RuntimeError), quiet("hub"):
            hub.warning("retry")
            hub.error("broken")
            other.warning("seen")
            raise RuntimeError
        hub.info("again")
    assert [record.message for record in caplog.records] == ["broken", "seen", "again"]
    assert hub.level == logging.INFO


def test_quiet_mutes_the_root_logger_up_to_a_level(caplog):
    with caplog.at_level(logging.INFO), quiet("", level=logging.CRITICAL):
        logging.error("hidden")
        logging.critical("seen")
    assert [record.message for record in caplog.records] == ["seen"]


@pytest.mark.parametrize(
    ("message", "line", "sentence"),
    [
        ("No route. Check the proxy.\nThen retry.", "No route. Check the proxy.", "No route"),
        ("\n  timed out after 3.5 s\n", "timed out after 3.5 s", "timed out after 3.5 s"),
        ("", "OSError", "OSError"),
    ],
)
def test_the_first_line_and_sentence_of_an_error(message, line, sentence):
    assert first_line(OSError(message)) == line
    assert first_sentence(OSError(message)) == sentence


def test_errors_say_what_was_asked_for_and_what_to_do():
    error = not_fetched("the weights of 'x'", OSError("no route"), "a local file")
    assert isinstance(error, DownloadError)
    assert str(error) == (
        "the weights of 'x' could not be fetched: no route. Without network, pass a local file"
    )
    library = SimpleNamespace(__name__="lib", __version__="1.2")
    error = no_such_model(library, "vit_b", ["vit_a", "resnet", "vit_bb"])
    assert isinstance(error, ModelError)
    assert str(error) == "lib 1.2 has no model 'vit_b'. Closest: vit_bb, vit_a"
    assert str(no_such_model(library, "zzz", ["vit_a"])) == "lib 1.2 has no model 'zzz'"
