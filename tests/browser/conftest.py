"""A headless Chromium for the test session, and pages in it that may make no request and log no error."""

from __future__ import annotations

import os
import shutil

import pytest

READ_BACK = "willReadFrequently"
"""Of a warning about how tests look at a canvas."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser():
    executable = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        executable = None
    if executable is None:
        reason = "CHROMIUM OR PLAYWRIGHT IS NOT INSTALLED, PAGES ARE NOT TESTED: tests/browser/install-browser.sh"
        if os.environ.get("HPC_SUPCON_REQUIRE_EXTRAS") == "1":
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        # its sandbox needs a user that is not root
        started = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox"], chromium_sandbox=False
        )
        yield started
        started.close()


@pytest.fixture
def opened(browser):
    """`opened(path, **options of the context)`: the page of a file. In the end, it has logged nothing and asked for
    nothing but the file itself."""
    problems, contexts, asked, files = [], [], [], set()

    def open_page(path, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: READ_BACK in message.text or problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(f"a dialog: {dialog.message}") or dialog.dismiss())
        page.on("request", lambda request: asked.append(request.url))
        files.add(f"file://{path}")
        page.goto(f"file://{path}")
        page.wait_for_function("document.querySelectorAll('[data-widget]:empty').length === 0")
        page.wait_for_function("!document.body.innerText.includes('Drawn by the page')")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("data:", "file:///"))] == []
    assert {url for url in asked if url.startswith("file:")} <= files
