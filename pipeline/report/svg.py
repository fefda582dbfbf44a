"""SVG markup, escaped by construction: what charts and the graph of stages are drawn with.

Colours, dashes and fonts are CSS classes (`templates/charts.css`), so that one drawing serves light, dark and print.
"""

from __future__ import annotations

from markupsafe import Markup, escape

Attribute = str | float | int | None


def element(tag: str, *children: Markup | str, **attributes: Attribute) -> Markup:
    """One element: `_` in a name becomes `-`, a trailing one goes (`class_`), None is left out, text is escaped."""
    words = [Markup(tag)]
    for name, value in attributes.items():
        if value is not None:
            shown = number(value) if isinstance(value, float) else value
            words.append(Markup('{}="{}"').format(Markup(name.rstrip("_").replace("_", "-")), shown))
    opening = Markup(" ").join(words)
    if not children:
        return Markup("<{}/>").format(opening)
    return Markup("<{}>{}</{}>").format(opening, join(children), Markup(tag))


def join(parts: object) -> Markup:
    """Parts one after the other, each escaped unless it is markup."""
    assert isinstance(parts, list | tuple)
    return Markup("").join(escape(part) for part in parts)


def number(value: float) -> str:
    """A coordinate: at most one decimal, no trailing zero."""
    return f"{value:.1f}".rstrip("0").rstrip(".")


def drawing(width: float, height: float, title: str, description: str, *children: Markup, class_: str = "") -> Markup:
    """A whole drawing that says what it shows to those who cannot see it."""
    return element(
        "svg",
        element("title", title),
        element("desc", description),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {number(width)} {number(height)}",
        width=number(width),
        height=number(height),
        role="img",
        class_=f"chart {class_}".strip(),
        aria_label=title,
    )


def text(
    x: float, y: float, content: str, class_: str = "label", anchor: str | None = None, rotate: float | None = None
) -> Markup:
    turn = f"rotate({number(rotate)} {number(x)} {number(y)})" if rotate is not None else None
    return element("text", content, x=x, y=y, class_=class_, text_anchor=anchor, transform=turn)


def text_width(content: str, size: float = 12.5) -> float:
    """A guess, generous enough to keep neighbours apart: pixels of `content` in the page's sans-serif at `size`."""
    return sum(0.34 if character in " .,:;ilI|'()" else 0.6 for character in content) * size
