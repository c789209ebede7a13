"""The page as a browser would see it, with the checks that hold for every page."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

from moa_dist.report.page import page
from moa_dist.report.read import read_run

NOW = 2e9
"""The current time, long after that of any test: runs that are not done are silent."""
VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Outline(HTMLParser):
    """Checks that tags nest, and collects tags, attributes, text and the scripts' text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open, self.tags, self.attributes, self.text, self.scripts = [], [], [], "", []
        self.by_class: list[tuple[str, str]] = []
        """Classes of the innermost open element with any, and its text."""
        self._classes: list[str] = []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
            self._classes.append(dict(attrs).get("class") or "")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self._classes.pop()

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        else:
            self.text += data
            self.by_class.append((self._classes[-1] if self._classes else "", data))

    def values(self, name: str) -> list[str]:
        return [value for attribute, value in self.attributes if attribute == name]

    def texts(self, css: str) -> list[str]:
        """Return the texts directly within elements of this class."""
        return [text for classes, text in self.by_class if css in classes.split()]

    def hover(self, kind: str) -> list[dict]:
        """What the script shows of pictures of this kind, `curves` or `cells`."""
        return [json.loads(value) for value in self.values(f"data-{kind}")]


def outline(*folders) -> Outline:
    content = page([read_run(folder) for folder in folders], NOW)
    found = Outline(content)
    names = {name for name, _ in found.attributes}
    assert not names & {"src", "href", "xlink:href", "style"}
    assert not [name for name in names if name.startswith("on")]
    assert not {"link", "img", "iframe", "object"} & set(found.tags)
    assert found.tags.count("svg") - found.values("aria-hidden").count("true") == found.values(
        "role"
    ).count("img")
    assert not re.search(r"url\(|@import|https?:|\bfetch\(|XMLHttpRequest|innerHTML", content)
    # The policy names the one script by its hash: no other would run.
    (script,) = found.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert set(found.values("content")[0].split("; ")) == {
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        f"script-src 'sha256-{digest}'",
    }
    return found


def labels_of(found: Outline) -> list[list[str]]:
    """The labels of the curves of every picture."""
    return [[line["label"] for line in plot["lines"]] for plot in found.hover("curves")]
