"""`notify:` of config.yaml, the messages, and what each preset sends."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfsvc import delivery, notify
from lfsvc.job import Job, State
from lfsvc.notify import PRESETS, Message, Tally, Target, cut, job_message, parse_notify, request_of
from lfsvc.task import parse

NOW = 1599360473.25
NO_WORDS = "command must be a list of words, the program first, with numbers in quotes"
FAILED = Message(event="failed", title="✗ job 42 train 千问_sft failed", body="显存不足 & <b>\non gpu01", host="gpu01")


def one(**entry: Any) -> Target:
    (target,) = parse_notify([entry])
    return target


def hook(preset: str, url: str = "https://example.org/hook/0123456789", **keys: str) -> Target:
    return one(webhook=url, preset=preset, **keys)


def body(target: Target, message: Message = FAILED) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(request_of(target, message, NOW).body)
    return found


# -- settings ----------------------------------------------------------------------------------------


def test_an_entry_has_a_kind_and_the_events_of_a_night_by_default() -> None:
    desktop, command, webhook = parse_notify(
        [
            {"desktop": True, "on": ["failed", "succeeded"]},
            {"command": ["/usr/bin/mail", "-s", "lfsvc", "me"], "on": "killed"},
            {"webhook": "https://ntfy.sh/topic", "preset": "ntfy", "token": "tk_abc"},
        ]
    )
    assert (desktop.kind, desktop.on, desktop.number) == ("desktop", {"failed", "succeeded"}, 1)
    assert (command.kind, command.on, command.command[0]) == ("command", {"killed"}, "/usr/bin/mail")
    assert (webhook.on, webhook.token) == ({"failed", "interrupted", "queue_empty"}, "tk_abc")
    assert one(webhook="https://h/x").preset == "json"


def test_the_bare_word_on_is_read_as_yaml_gives_it() -> None:
    import yaml

    value = yaml.safe_load("- desktop: true\n  on: [queue_empty]\n")
    assert True in value[0]
    assert parse_notify(value)[0].on == {"queue_empty"}


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("https://x", "notify must be a list of entries, each with desktop, command or webhook"),
        (["x"], "notify: entry 1: it must hold `key: value` lines"),
        ([{"on": "failed"}], "notify: entry 1: it must have one of desktop, command, webhook, and has none"),
        (
            [{"desktop": True}, {"desktop": True, "webhook": "https://h/"}],
            "notify: entry 2: it must have one of desktop, command, webhook, and has desktop and webhook",
        ),
        ([{"desktop": False}], "notify: entry 1: desktop must be true; to turn it off, take the entry away"),
        (
            [{"desktop": True, "on": ["fail"]}],
            "notify: entry 1: on must be one or more of succeeded, failed, killed, interrupted, queue_empty, "
            "not ['fail']",
        ),
        (
            [{"desktop": True, "preset": "slack"}],
            "notify: entry 1: the key 'preset' is unknown; a desktop entry has desktop, on",
        ),
        ([{"command": "mail me"}], f"notify: entry 1: {NO_WORDS}"),
        ([{"command": ["a", 5]}], f"notify: entry 1: {NO_WORDS}"),
        ([{"command": [""]}], "notify: entry 1: command must name a program"),
        (
            [{"webhook": "https://h/", "preset": "slak"}],
            "notify: entry 1: preset must be one of json, slack, ntfy, feishu, dingtalk, wecom",
        ),
        (
            [{"webhook": "https://h/", "preset": "slack", "secret": "s3cret"}],
            "notify: entry 1: the key 'secret' is unknown; a slack webhook has webhook, on, preset",
        ),
        (
            [{"webhook": "https://h/", "preset": "feishu", "secret": 12}],
            "notify: entry 1: secret must be text without blanks",
        ),
        ([{"webhook": "h/s3cret"}], "notify: entry 1: webhook must be an address such as https://host/path"),
        ([{"webhook": "ftp://h/s3cret"}], "notify: entry 1: webhook must be an address such as https://host/path"),
        ([{"webhook": "https://h:x/s3cret"}], "notify: entry 1: webhook must be an address such as https://host/path"),
        (
            [{"webhook": "https://h/s3cret x"}],
            "notify: entry 1: webhook must be an address such as https://host/path, without blanks, in ASCII",
        ),
        (
            [{"webhook": "https://me:s3cret@h/"}],
            "notify: entry 1: webhook must not hold a user and a password; ntfy and json take a token",
        ),
        (
            [{"webhook": "https://ntfy.sh/", "preset": "ntfy"}],
            "notify: entry 1: webhook must end in the topic, such as https://ntfy.sh/my_topic",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_clause_with_the_entry_and_the_key(value: object, sentence: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_notify(value)
    assert str(caught.value) == sentence
    assert "s3cret" not in sentence


def test_neither_repr_nor_label_has_what_is_secret() -> None:
    targets = [
        hook("dingtalk", "https://oapi.dingtalk.com/robot/send?access_token=0a1b2c3d4e", secret="SECret123"),
        hook("ntfy", "https://ntfy.sh/hidden_topic", token="tk_hidden"),
        one(command=["/usr/bin/curl", "-u", "me:hidden"]),
    ]
    assert [target.label for target in targets] == [
        "dingtalk webhook at oapi.dingtalk.com",
        "ntfy webhook at ntfy.sh",
        "command /usr/bin/curl",
    ]
    shown = "".join(map(repr, targets)) + repr(request_of(targets[1], FAILED, NOW))
    assert not any(word in shown for word in ("0a1b2c3d4e", "SECret123", "hidden"))


def test_a_reason_that_quotes_a_secret_loses_it() -> None:
    target = hook("dingtalk", "https://h/send?access_token=0a1b2c3d4e", secret="s3c")
    text = delivery.without_secrets(target, "no robot 0a1b2c3d4e with s3c at /send")
    assert text == "no robot *** with *** at /send"


# -- presets -----------------------------------------------------------------------------------------


def test_json_has_everything() -> None:
    message = replace(FAILED, job={"id": 42, "finished_at": "2026-01-01T00:00:00.000000Z"})
    assert body(hook("json"), message) == {
        "event": "failed", "title": message.title, "body": message.body, "host": "gpu01", "job": message.job,
    }  # fmt: skip
    assert "job" not in body(hook("json"), replace(FAILED, counts={"failed": 2}))
    assert body(hook("json"), replace(FAILED, counts={"failed": 2}))["counts"] == {"failed": 2}


def test_slack_reads_no_markup_out_of_a_text() -> None:
    assert body(hook("slack")) == {"text": "✗ job 42 train 千问_sft failed\n显存不足 &amp; &lt;b&gt;\non gpu01"}


def test_ntfy_posts_to_the_server_and_names_the_topic() -> None:
    target = hook("ntfy", "https://h.example/ntfy/my_topic/", token="tk_x")
    request = request_of(target, FAILED, NOW)
    assert request.url == "https://h.example/ntfy/"
    assert request.headers["Authorization"] == "Bearer tk_x"
    assert body(target) == {"topic": "my_topic", "title": FAILED.title, "message": FAILED.body, "priority": 4}
    assert body(target, replace(FAILED, event="succeeded"))["priority"] == 3


def test_feishu_is_signed_where_a_secret_is_set() -> None:
    content = {"msg_type": "text", "content": {"text": FAILED.text}}
    assert body(hook("feishu")) == content
    # printf '' | openssl dgst -sha256 -hmac "$(printf '1599360473\nkJ4demoSecret')" -binary | base64
    sign = "leNSiKDBwotLhdxxTwmzes6LvPz6MeQJfBgTD0DiDIo="
    assert body(hook("feishu", secret="kJ4demoSecret")) == {**content, "timestamp": "1599360473", "sign": sign}


def test_dingtalk_is_signed_in_the_address_where_a_secret_is_set() -> None:
    url = "https://oapi.dingtalk.com/robot/send?access_token=0a1b2c"
    assert request_of(hook("dingtalk", url), FAILED, NOW).url == url
    signed = request_of(hook("dingtalk", url, secret="this_is_secret"), FAILED, 1577262236.757)
    query = parse_qs(urlsplit(signed.url).query, strict_parsing=True)
    assert query["access_token"] == ["0a1b2c"] and query["timestamp"] == ["1577262236757"]
    # printf '1577262236757\nthis_is_secret' | openssl dgst -sha256 -hmac this_is_secret -binary | base64
    assert query["sign"] == ["OGxW/51aOkXEdzZxMhSYGyrbc6lbFtSQ83hTJyEhh/Y="]
    assert json.loads(signed.body) == {"msgtype": "text", "text": {"content": FAILED.text}}


def test_a_signature_is_the_one_of_dingtalks_own_example() -> None:
    # Source: DingTalk's documentation, example of the signature of a login: 1546084445901, testappSecret.
    assert notify.signature("testappSecret", "1546084445901") == "HCbG3xNE3vzhO+u7qCUL1jS5hsu2n5r2cFhnTrtyDAE="


def test_wecom_is_a_text() -> None:
    assert body(hook("wecom")) == {"msgtype": "text", "text": {"content": FAILED.text}}


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "json"])
def test_a_preset_keeps_its_limit_and_stays_json_whatever_a_file_is_called(preset: str) -> None:
    texts = _texts(body(hook(preset, "https://h.example/topic"), replace(FAILED, body="显存🔥\udc80" * 5000)))
    assert max(len(text.encode("utf-8", "backslashreplace")) for text in texts) <= PRESETS[preset].limit_bytes
    assert any(text.endswith("…") for text in texts)


def _texts(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    return [value] if isinstance(value, str) else []


@given(st.text(), st.integers(min_value=3, max_value=200))
def test_a_cut_text_is_short_enough_and_a_beginning(text: str, limit: int) -> None:
    found = cut(text, limit)
    assert len(found.encode("utf-8", "backslashreplace")) <= limit
    assert found == text or (found.endswith("…") and text.startswith(found[:-1]))


def test_a_robot_that_answers_200_and_complains_is_a_failure() -> None:
    feishu, dingtalk, wecom = hook("feishu"), hook("dingtalk"), hook("wecom")
    assert delivery.problem_of(feishu, b'{"code":0,"msg":"success","data":{}}') == ("", False)
    assert delivery.problem_of(feishu, b'{"Extra":null,"StatusCode":0,"StatusMessage":"success"}') == ("", False)
    assert delivery.problem_of(feishu, b'{"code":19021,"msg":"sign match fail"}') == (
        "code 19021: sign match fail",
        False,
    )
    assert delivery.problem_of(feishu, b'{"code":11232,"msg":"frequency limited"}')[1] is True
    assert (
        delivery.problem_of(dingtalk, b'{"errcode":310000,"errmsg":"sign not match"}')[0]
        == "errcode 310000: sign not match"
    )
    assert delivery.problem_of(wecom, b'{"errcode":0,"errmsg":"ok"}') == ("", False)
    assert delivery.problem_of(wecom, b'{"errcode":-1,"errmsg":"system busy"}')[1] is True
    # A login page of a network that answers for everybody.
    page = "answered what no wecom robot does: <html> <p>Log in</p>"
    assert delivery.problem_of(wecom, b"<html>\n<p>Log in</p>") == (page, False)
    assert delivery.problem_of(hook("slack"), b"ok") == ("", False)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("", 0), ("7", 7), (" 120 ", 120), ("-3", 0), ("soon", 0), ("Thu, 01 Jan 1970 00:01:40 GMT", 60)],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float) -> None:
    assert delivery.retry_after(value, 40.0) == seconds


# -- messages ----------------------------------------------------------------------------------------


def job(**changes: Any) -> Job:
    known = {
        "id": 42, "task": parse("/a/qwen.yaml"), "text": "/a/qwen.yaml", "working_directory": "/a", "name": "qwen_sft",
        "state": State.FAILED, "started_at": 1_000_000, "finished_at": 4_321_000_000, "exit_status": 1,
    }  # fmt: skip
    return Job(**{**known, **changes})


def test_the_message_of_a_failed_job_says_why_and_how_far_it_came() -> None:
    failed = job(
        failure="The device ran out of memory: use a smaller batch.",
        progress={"percentage": 38.2, "loss": 0.4123, "remaining_time": 700},
        log="/o/train.log",
    )
    message = job_message(failed, {"id": 42}, "gpu01")
    assert message.title == "✗ job 42 train qwen_sft failed"
    assert message.body.splitlines() == [
        "The device ran out of memory: use a smaller batch.",
        "ran 1 h 12 min, 38 %, loss 0.4123",
        "log: /o/train.log",
        "on gpu01",
    ]
    assert message.urgent


def test_the_message_of_a_finished_job_says_what_came_of_it() -> None:
    done = job(state=State.SUCCEEDED, progress={"percentage": 100.0, "loss": 0.3}, output_dir="/o", model="/o/merged")
    message = job_message(done, {}, "gpu01")
    assert message.title == "✓ job 42 train qwen_sft succeeded"
    assert message.body == "ran 1 h 12 min, loss 0.3\nmodel: /o/merged\non gpu01"
    assert job_message(job(failed_step="merge"), {}, "h").body.startswith("The step merge ended with exit status 1.\n")
    # Nothing ran.
    assert job_message(job(started_at=0, failure="No runner."), {}, "h").body == "No runner.\non h"


def test_names_that_would_draw_on_a_terminal_are_harmless() -> None:
    message = job_message(job(name="a\n\x1b[31mb\udc80", failure="x\x00y\u0085z"), {}, "h")
    assert message.title == "✗ job 42 train a  [31mb? failed"
    assert message.body.startswith("x y z\n")


def test_an_empty_queue_counts_what_ended_since() -> None:
    tally = Tally()
    tally.add(job(state=State.CANCELLED))
    assert not tally.counts
    for number in range(13):
        tally.add(job(id=number, state=State.FAILED))
    for _ in range(7):
        tally.add(job(state=State.SUCCEEDED))
    message = tally.message("gpu01")
    assert message.title == "○ the queue is empty: 7 succeeded, 13 failed"
    lines = message.body.splitlines()
    assert lines[0] == "job 0 train qwen_sft failed" and lines[10:] == ["and 3 more", "on gpu01"]
    assert message.counts == {"succeeded": 7, "failed": 13}


def test_a_command_finds_the_job_in_its_environment() -> None:
    dictionary = {"id": 42, "state": "failed", "name": "qwen\0sft", "failure": "No."}
    found = delivery.environment_of(job_message(job(failure="No."), dictionary, "h"))
    assert found["LFSVC_EVENT"] == "failed" and found["LFSVC_JOB_ID"] == "42"
    assert found["LFSVC_JOB_NAME"] == "qwen\\x00sft" and found["LFSVC_JOB_FAILURE"] == "No."
    assert found["LFSVC_TITLE"] == "✗ job 42 train qwen_sft failed" and found["LFSVC_HOST"] == "h"
    tally = Tally()
    tally.add(job())
    found = delivery.environment_of(tally.message("h"))
    assert found["LFSVC_COUNT_FAILED"] == "1" and "LFSVC_JOB_ID" not in found


def test_only_a_failed_job_is_critical_on_the_desktop_and_markup_is_escaped() -> None:
    *_, summary, text, urgency = delivery.desktop_arguments(FAILED, markup=True)
    assert (summary, text, urgency) == (FAILED.title, "显存不足 &amp; &lt;b&gt;\non gpu01", 2)
    *_, text, urgency = delivery.desktop_arguments(replace(FAILED, event="queue_empty"), markup=False)
    assert (text, urgency) == (FAILED.body, 1)
