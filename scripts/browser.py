"""Headless Chromium, for the page's tests and its pictures."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
OPTIONS = (
    '--headless=new',
    '--no-sandbox',
    '--disable-gpu',
    '--hide-scrollbars',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--disable-quic',
)


def missing() -> str | None:
    """What a browser wants here: a sentence, or None if there is all."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return 'selenium is not installed: pip install selenium'
    if not any(map(shutil.which, BROWSERS)):
        return 'Chromium is not installed (Debian, Ubuntu: apt install chromium)'
    if not shutil.which('chromedriver'):
        return 'chromedriver is not installed (Debian, Ubuntu: apt install chromium-driver)'
    return None


@contextmanager
def browser(width: int = 1100) -> Iterator:
    """A browser whose window is ``width`` pixels wide, as a Selenium driver."""
    os.environ.update(SE_OFFLINE='true', SE_AVOID_STATS='true')
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    with ExitStack() as stack:
        profile = tempfile.mkdtemp()
        stack.callback(shutil.rmtree, profile, ignore_errors=True)  # it may still be written to
        for option in (*OPTIONS, f'--window-size={width},900', f'--user-data-dir={profile}'):
            options.add_argument(option)
        driver = webdriver.Chrome(options=options, service=Service(shutil.which('chromedriver')))
        stack.callback(driver.quit)
        yield driver


def screenshot(driver, page: Path, out: Path | None = None) -> bytes:
    """Open a page from disk and take a picture of all of it.

    Args:
        driver: Of :func:`browser`.
        page (Path): The page.
        out (Path, optional): Where to write the picture. Defaults to None, nowhere.

    Returns:
        bytes: The picture as PNG.
    """
    driver.get(page.resolve().as_uri())
    width = driver.get_window_size()['width']
    # The window is somewhat higher than the page's part of it.
    height = driver.execute_script(
        'return document.documentElement.scrollHeight + outerHeight - innerHeight'
    )
    driver.set_window_size(width, height)
    picture = driver.get_screenshot_as_png()
    if out is not None:
        out.write_bytes(picture)
    return picture
