"""A headless Chromium that opens a page from a file and says what it holds and what its console said."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((found for name in NAMES if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here: install the package chromium")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
LOGGED = ("--enable-logging=stderr", "--v=0", "--virtual-time-budget=3000")
SAID = re.compile(r'CONSOLE[^"]*"(.*)", source:')


def opened(page: Path, folder: Path, width: int = 1200) -> tuple[str, list[str]]:
    """The page's HTML after its scripts ran in a window so wide (at least 500), and what its console said. `folder` is
    for the browser's own files."""
    done = _run(folder, *LOGGED, f"--window-size={width},900", "--dump-dom", page.resolve().as_uri())
    return done.stdout, SAID.findall(done.stderr)


def sideways(page: Path, folder: Path) -> int:
    """By how many pixels a page is wider than a window of 500, all its parts that can be opened being open."""
    told = """<script>for (const one of document.querySelectorAll("details")) one.open = true;
const page = document.documentElement;
setTimeout(() => { page.dataset.wider = page.scrollWidth - page.clientWidth; }, 1500);</script></body>"""
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", told), encoding="utf-8")
    found, _ = opened(page, folder, width=500)
    wider = re.search(r'data-wider="(\d+)"', found)
    assert wider
    return int(wider[1])


def screenshot(
    page: Path, target: Path, folder: Path, size: tuple[int, int] = (1200, 1600), dark: bool = False
) -> None:
    """A picture of the page, for people."""
    theme = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if dark else []
    _run(folder, *theme, f"--window-size={size[0]},{size[1]}", f"--screenshot={target}", page.resolve().as_uri())


def _run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    assert BROWSER is not None
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder}", *arguments]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, check=True)
