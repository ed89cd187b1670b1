"""Takes docs/page.png anew, with the model and the memory that ship: python tests/page_picture.py"""

import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright
from serving import running
from test_page import BOAT, CHROMIUM, opened, tell

from gru_memory.shipped import load_with_memory

TOLD = (BOAT, "By the way, I live in Porto.", "What is my boat called?")
PICTURE = Path(__file__).parents[1] / "docs" / "page.png"

if __name__ == "__main__":
    with (
        tempfile.TemporaryDirectory() as folder,
        running(Path(folder) / "s", load_with_memory(), api_keys=(), default_new_tokens=24) as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 960})
        page.set_default_timeout(120_000)
        page.add_init_script("localStorage.setItem('session', 'boat')")
        opened(page, server)
        for text in TOLD:
            tell(page, text)
        page.screenshot(path=PICTURE)
        browser.close()
