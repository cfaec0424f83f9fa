"""A real browser for the pages, and text that would take one over."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ATTACK = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & \"quoted\" $\\frac{1}{0}$"
    " </script></style></title>--><svg onload=document.title='owned'> ' autofocus onfocus=document.title='owned' x='"
    " <a href=\"javascript:document.title='owned'\">x</a>"
)
NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
)  # fmt: skip


def opened(page: Path, profile: Path) -> str:
    """The document as it stands after the browser has loaded it and run what it would run.

    Without a browser the test is skipped, or fails where REQUIRE_BROWSER is set: a machine that is meant to have one
    would otherwise lose the test without a word.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        if os.environ.get("REQUIRE_BROWSER", "0") not in ("", "0"):
            pytest.fail("REQUIRE_BROWSER is set, and there is no chromium on this machine")
        pytest.skip("no chromium on this machine")
    command = [browser, *FLAGS, f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "<title>" in done.stdout, done.stderr[-2000:]
    return done.stdout
