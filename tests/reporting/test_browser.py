# SPDX-License-Identifier: Apache-2.0
"""A real browser shows the page: nothing overflows, is fetched or complained of."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from nm_permute_plugin.checkpoint.report import subject_of
from nm_permute_plugin.reporting.page import write_comparison

MEASURE = """<!doctype html><iframe id="page" style="width: {width}px; height: 800px"
srcdoc="{page}"></iframe><pre id="found"></pre><script>
page.onload = () => {{
  const inside = page.contentDocument, root = inside.documentElement;
  const images = [...inside.images];
  found.textContent = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    pictures: images.length,
    drawn: images.filter(each => each.complete && each.naturalWidth).length,
    wide: images.filter(each => each.getBoundingClientRect().right > {width}).length,
    fetched: page.contentWindow.performance.getEntriesByType("resource")
      .map(each => each.name).filter(name => !name.startsWith("data:")),
  }});
}};
</script>"""
"""A page around the page, because a window of a browser may not be as narrow as a
telephone; the policy of the page inside stays its own."""


def quoted(page: Path) -> str:
    return page.read_text().replace("&", "&amp;").replace('"', "&quot;")


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("which", ["one", "several"])
def test_no_width_overflows_and_nothing_is_fetched(
    learned: Path, plain: Path, browse, tmp_path: Path, width: int, which: str
) -> None:
    page = learned / "nm_permute" / "report.html"
    if which == "several":
        page = tmp_path / "several.html"
        write_comparison([subject_of(learned), subject_of(plain)], page)
    around = tmp_path / "around.html"
    around.write_text(MEASURE.format(width=width, page=quoted(page)))
    done = browse(
        around,
        "--dump-dom",
        "--virtual-time-budget=5000",
        "--window-size=1400,900",
        "--enable-logging=stderr",
        "--v=0",
    )
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout)[1])
    assert found["overflow"] == 0
    assert found["wide"] == 0
    assert found["drawn"] == found["pictures"] > 0
    assert found["fetched"] == []
    assert "CONSOLE" not in done.stderr


@pytest.mark.slow
def test_both_schemes_are_readable(learned: Path, browse, tmp_path: Path) -> None:
    """Paper and ink change places; pictures are drawn in the ink of the scheme."""
    seen = {}
    for scheme, number in {"dark": 0, "light": 1}.items():
        shot = tmp_path / f"{scheme}.png"
        browse(
            learned / "nm_permute" / "report.html",
            f"--blink-settings=preferredColorScheme={number}",
            f"--screenshot={shot}",
            "--window-size=1000,1600",
            "--hide-scrollbars",
        )
        grey = Image.open(shot).convert("L")
        counts = grey.histogram()
        paper = max(range(256), key=lambda value: counts[value])
        seen[scheme] = paper, counts
    assert seen["light"][0] > 240
    assert seen["dark"][0] < 40
    # Words and axes: far from the paper in either scheme.
    assert sum(seen["light"][1][:80]) > 5000
    assert sum(seen["dark"][1][190:]) > 5000
