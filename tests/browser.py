"""A headless browser for tests of pages: what a page measures, and what it complains of."""

import html
import json
import re
import shutil
import subprocess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--allow-file-access-from-files", "--enable-logging=stderr", "--window-size=1400,1000",
)  # fmt: skip
# Pages are measured in frames: a window of the browser's own is never narrower than 500 pixels.
_FRAME = '<iframe style="border:0;width:{width}px;height:900px" src="{page}"></iframe>\n'
_MEASURE = """<!DOCTYPE html><meta charset="utf-8">
FRAMES<script>
addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(({contentWindow}) =>
    (function (window, document) { SCRIPT })(contentWindow, contentWindow.document));
  const text = document.createElement("pre");
  text.id = "found";
  text.textContent = JSON.stringify(found);
  document.body.append(text);
});
</script>
"""


def measure(pages, folder, script, *, dark=False):
    """What `script`, a function's body in JavaScript, returns of pages, and console messages.

    Args:
      pages: their files, and the width of each in pixels.
      folder: where to put what the browser needs.
      script: sees a page's `window` and `document`.
      dark: whether the reader prefers dark pages.
    """
    frames = [_FRAME.format(width=width, page=page.absolute().as_uri()) for page, width in pages]
    wrapper = folder / "measure.html"
    wrapper.write_text(_MEASURE.replace("FRAMES", "".join(frames)).replace("SCRIPT", script))
    flags = [*_FLAGS, f"--user-data-dir={folder / 'profile'}"]
    if dark:
        flags.append("--blink-settings=preferredColorScheme=0")
    found = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", wrapper.absolute().as_uri()],
        capture_output=True, text=True, timeout=90, check=True,
    )  # fmt: skip
    text = re.search(r'<pre id="found">(.*?)</pre>', found.stdout, re.DOTALL)
    assert text, found.stderr
    messages = re.findall(r".*:CONSOLE.*", found.stderr)
    return json.loads(html.unescape(text[1])), messages
