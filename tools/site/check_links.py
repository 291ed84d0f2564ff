"""Every link of the built site leads to a page and an anchor of it, and nothing is fetched from
elsewhere: `python tools/site/check_links.py build/site`."""

from __future__ import annotations

import html.parser
import pathlib
import sys
import urllib.parse

LOADED = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}


class Page(html.parser.HTMLParser):
    """The anchors of a page, what it links to, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect one tag."""
        given = dict(attrs)
        self.anchors |= {value for key in ("id", "name") if (value := given.get(key))}
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        # `rel=canonical` and the like are addresses, not files that a browser loads.
        is_file = tag != "link" or given.get("rel") in ("stylesheet", "icon", "preload")
        if tag in LOADED and is_file and given.get(LOADED[tag]):
            self.loads.append(str(given[LOADED[tag]]))


def faults(site: pathlib.Path) -> list[str]:
    """What is wrong with a built site, one line each."""
    pages = {p: Page(p.read_text(encoding="utf-8")) for p in site.rglob("*.html")}
    found = [] if pages else [f"{site} holds no page; build it first"]
    for path, page in pages.items():
        here = path.relative_to(site)
        external = ("http:", "https:", "//")
        found += [f"{here} loads {a}" for a in page.loads if a.startswith(external)]
        for address in [*page.links, *page.loads]:
            parts = urllib.parse.urlsplit(address)
            if parts.scheme or address.startswith("//"):
                continue
            # 404.html is shown at any depth, so its addresses begin at the top.
            base = site if parts.path.startswith("/") else path.parent
            name = urllib.parse.unquote(parts.path.lstrip("/"))
            goal = (base / name).resolve() if name else path
            goal = goal / "index.html" if goal.is_dir() else goal
            anchor = urllib.parse.unquote(parts.fragment)
            if not goal.is_file():
                found.append(f"{here} -> {address}: no such file")
            elif anchor and goal in pages and anchor not in pages[goal].anchors:
                found.append(f"{here} -> {address}: no such anchor")
    return found


if __name__ == "__main__":
    site = pathlib.Path(sys.argv[1]).resolve()
    wrong = faults(site)
    print("\n".join(wrong) or "every link leads somewhere, nothing is loaded from elsewhere")
    sys.exit(bool(wrong))
