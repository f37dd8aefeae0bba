import io
import json
import logging
from collections.abc import Iterator

import pytest

from kvcluster import log

CANARY = "the-canary-prompt-text"


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    logger = logging.getLogger("kvcluster")
    before = (logger.handlers, logger.level, logger.propagate)
    stream = io.StringIO()
    log.configure(level="debug", as_json=True, stream=stream)
    yield stream
    logger.handlers, logger.level, logger.propagate = before


def events(written: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


def test_an_event_keeps_its_numbers_and_its_known_text(written: io.StringIO) -> None:
    log.get_logger("kvcluster.x").info("rank_lost", rank=3, rebuild_s=4.2, reason="SHARD_LOST")

    (event,) = events(written)
    assert (event["event"], event["level"], event["logger"]) == ("rank_lost", "info", "kvcluster.x")
    assert (event["rank"], event["rebuild_s"], event["reason"]) == (3, 4.2, "SHARD_LOST")


def test_text_under_an_unknown_name_is_replaced_by_its_type(written: io.StringIO) -> None:
    log.get_logger("kvcluster.x").info("admitted", prompt=CANARY)

    assert events(written)[0]["prompt"] == "<str>"
    assert CANARY not in written.getvalue()


@pytest.mark.parametrize("name", ["token_id", "token_ids", "seed"])
def test_a_token_or_a_seed_is_replaced_though_it_is_a_number(
    written: io.StringIO, name: str
) -> None:
    log.get_logger("kvcluster.x").info("sampled", **{name: 4242})

    assert events(written)[0][name] == "<int>"


def test_a_collection_is_replaced_by_its_type(written: io.StringIO) -> None:
    log.get_logger("kvcluster.x").info("admitted", reason=[CANARY], ranks=(1, 2))

    assert CANARY not in written.getvalue()
    assert events(written)[0]["ranks"] == "<tuple>"


def test_text_formatted_into_the_event_is_not_written(written: io.StringIO) -> None:
    log.get_logger("kvcluster.x").info(f"got prompt {CANARY}")

    assert events(written)[0]["event"] == "event_without_a_name"
    assert CANARY not in written.getvalue()


def test_an_exception_is_written_as_class_and_frames_without_its_message(
    written: io.StringIO,
) -> None:
    def failing() -> None:
        try:
            raise KeyError(CANARY)
        except KeyError as error:
            raise ValueError(CANARY) from error

    try:
        failing()
    except ValueError:
        log.get_logger("kvcluster.x").exception("step_failed")

    (event,) = events(written)
    assert event["error"] == "ValueError from KeyError"
    assert str(event["frames"]).endswith("failing']")
    assert CANARY not in written.getvalue()


def test_a_message_of_the_standard_logging_module_is_not_written(written: io.StringIO) -> None:
    logging.getLogger("kvcluster.elsewhere").warning("prompt %s", CANARY)

    assert events(written)[0]["logger"] == "kvcluster.elsewhere"
    assert CANARY not in written.getvalue()


def test_events_are_clean_in_a_process_that_never_configured_logging(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log.get_logger("kvcluster_unconfigured").warning("admitted", prompt=CANARY)

    assert "admitted" in caplog.text
    assert CANARY not in caplog.text


def test_events_inside_bound_carry_generation_and_tenant(written: io.StringIO) -> None:
    logger = log.get_logger("kvcluster.x")

    with log.bound(generation="g1", tenant="red"):
        logger.info("inside")
    logger.info("outside")

    inside, outside = events(written)
    assert (inside["generation"], inside["tenant"]) == ("g1", "red")
    assert "generation" not in outside


def test_events_below_the_level_are_not_written(written: io.StringIO) -> None:
    log.configure(level="warning", as_json=True, stream=written)

    log.get_logger("kvcluster.x").info("quiet")

    assert written.getvalue() == ""


def test_the_console_form_is_one_line_for_a_reader(written: io.StringIO) -> None:
    log.configure(level="info", as_json=False, stream=written)

    log.get_logger("kvcluster.x").info("ready", num_ranks=3)

    assert "ready" in written.getvalue()
    assert "num_ranks=3" in written.getvalue()
    assert written.getvalue().count("\n") == 1


def test_long_text_is_cut(written: io.StringIO) -> None:
    log.get_logger("kvcluster.x").info("refused", reason="x" * 1000)

    assert len(str(events(written)[0]["reason"])) == 201
