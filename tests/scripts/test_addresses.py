"""scripts/addresses.py: a key goes where it is safe, and nothing is said of it."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.addresses import checked_key, checked_url, is_this_machine
from scripts.batch.client import Client
from scripts.batch.errors import EndpointError
from scripts.batch.rates import LIMITS
from scripts.deploying.api import Api
from scripts.deploying.files import DeployError

HERE = [
    "http://localhost",
    "http://127.0.0.1:8000/v2/abc",
    "http://[::1]:8000",
    "HTTP://LOCALHOST:8000/",
    "https://localhost:8443",
]
ELSEWHERE = ["https://api.runpod.ai/v2", "https://127.0.0.1.evil.example", "https://localhost.evil.example:443/x_y"]
UNSAFE = [
    *("http://api.runpod.ai/v2", "api.runpod.ai/v2", "ftp://localhost", "//localhost", "https:/localhost", "https://"),
    *("http://127.0.0.1.evil.example", "http://localhost.evil.example", "http://127.0.0.1evil.example", ""),
    *("http://127.0.0.1@evil.example", "http://localhost:80@evil.example/", "http://evil.example#@localhost"),
    *("http://[::1]evil.example/", "http://[::1", "http://localhost\\@evil.example", "http://evil.example\\@localhost"),
    *("https://user:hunter2@api.runpod.ai/v2", "https://hunter2@localhost", "https://localhost:port", "https://:443"),
    *("https://localhost:99999", "http://localhost\\.evil.example"),
    *("https://api.runpod.ai\n.evil.example", "http://local\nhost", " https://api.runpod.ai", "https://api.runpod.aı"),
    *("http://0.0.0.0", "http://127.1", "http://localhost.", "http://ⓛocalhost"),
]
PARTS = [
    *("http://", "https:", "/", "//", "localhost", "127.0.0.1", "[::1]", "evil.example", "@", "#", "?", ":", "80"),
    *("\\", ".", "\t", "\n", "%40", "%2e", "[", "]", "x", " ", "ı"),
]
"""Of addresses that programs could read differently."""
NO_KEYS = ["", "  \n", "hunter2\nHost: evil.example", "hunter2\r\n hunter2", "hunter2 hunter2", "hünter2", "hunter2\0"]


@pytest.mark.parametrize("url", [*HERE, *ELSEWHERE])
def test_a_safe_address_is_taken_as_it_is(url: str) -> None:
    assert checked_url(url) == url
    assert is_this_machine(url) == (url in HERE)


@pytest.mark.parametrize("url", UNSAFE)
def test_an_address_that_would_show_the_key_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ValueError, match="expected an address") as refused:
        checked_url(url)
    assert "hunter2" not in str(refused.value)


@given(st.lists(st.sampled_from(PARTS), max_size=8).map("".join))
def test_what_is_taken_leads_the_http_client_where_it_was_seen_to_lead(url: str) -> None:
    try:
        checked_url(url)
    except ValueError:
        return
    found = httpx.URL(url)
    assert found.host and not found.userinfo
    is_here = found.host in ("localhost", "127.0.0.1", "::1")
    assert is_this_machine(url) == is_here and (is_here or found.scheme == "https")


@pytest.mark.parametrize("url", ["http://127.0.0.1.evil.example", "http://127.0.0.1@evil.example", "http://[::1"])
def test_what_only_begins_like_this_machine_is_not_it(url: str) -> None:
    assert not is_this_machine(url)


def test_a_key_loses_what_stands_around_it() -> None:
    assert checked_key(" rpa_ABC-123+/=~!\r\n") == "rpa_ABC-123+/=~!"


@pytest.mark.parametrize("key", NO_KEYS)
def test_what_is_no_key_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="no key has") as refused:
        checked_key(key)
    assert "nter2" not in str(refused.value)


@pytest.mark.parametrize(("url", "key"), [(UNSAFE[0], "rpa_1"), *((ELSEWHERE[0], key) for key in NO_KEYS)])
def test_programs_refuse_in_their_own_words(url: str, key: str) -> None:
    with pytest.raises(EndpointError, match="https|no key has") as refused:
        Client(url, key, LIMITS)
    with pytest.raises(DeployError, match="--api-url: .*https|RUNPOD_API_KEY: .*no key has") as refused_too:
        Api(url, key)
    assert "nter2" not in f"{refused.value}{refused_too.value}"
