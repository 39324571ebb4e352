from __future__ import annotations

import logging
import warnings

import pytest

from qlora_kit.system.quiet import LOG_MESSAGES, WARNINGS, quiet_libraries


@pytest.mark.parametrize("name", LOG_MESSAGES)
def test_only_the_named_messages_are_dropped(name, caplog):
    quiet_libraries()
    logger = logging.getLogger(name)
    logger.addHandler(caplog.handler)
    try:
        for beginning in LOG_MESSAGES[name]:
            logger.warning("%s and more", beginning)
        logger.warning("something new")
    finally:
        logger.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"something new"}


def test_only_the_named_warnings_are_dropped():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet_libraries()
        for category, beginning in WARNINGS:
            warnings.warn(f"{beginning} and more", category, stacklevel=1)
        warnings.warn("something new", UserWarning, stacklevel=1)
    assert [str(w.message) for w in caught] == ["something new"]


def test_installing_the_filters_twice_changes_nothing():
    quiet_libraries()
    before = {name: len(logging.getLogger(name).filters) for name in LOG_MESSAGES}
    quiet_libraries()
    assert before == {name: len(logging.getLogger(name).filters) for name in LOG_MESSAGES}
