"""The pieces that every page is made of: one file, readable in light and dark, no script, nothing fetched.

Everything that a model or a user wrote passes through `text`, which escapes it.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

CSS = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #f5f6f8; --ink: #1a1d23; --muted: #5a6270;
  --grid: #d9dde3; --line: #c9ced6; --link: #0b5cad; --good: #0a6b4b; --bad: #a33a00;
  --series-0: #59626f; --series-1: #0072b2; --series-2: #c8500a; --series-3: #00795a; --series-4: #a8437f;
  --series-5: #7a6200; --series-6: #4b4fc4; --series-7: #8c2d19; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --panel: #1d2128; --ink: #e8eaee; --muted: #a3acb9; --grid: #343a44; --line: #414956;
    --link: #7cb8f2; --good: #4fd0a0; --bad: #ff9d66;
    --series-0: #aab3c0; --series-1: #5ab4ec; --series-2: #ff9046; --series-3: #35c9a0; --series-4: #e58bc0;
    --series-5: #d9bd4a; --series-6: #9da0ff; --series-7: #f08a75; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead, .note, figcaption { color: var(--muted); }
.note, figcaption { font-size: .9rem; }
nav ul { list-style: none; margin: 1rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; }
a { color: var(--link); }
.scroll { overflow-x: auto; margin: .75rem 0; }
.scroll:focus-visible, summary:focus-visible, a:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .4rem .9rem .4rem 0; text-align: right; vertical-align: top; white-space: nowrap;
  border-bottom: 1px solid var(--grid); }
thead th { white-space: normal; vertical-align: bottom; max-width: 10.5rem; min-width: 4.5rem; }
th:first-child, td:first-child { text-align: left; }
thead th { border-bottom: 2px solid var(--line); font-weight: 600; }
td small { display: block; color: var(--muted); }
td.word, th.word { text-align: left; }
.better { color: var(--good); font-weight: 600; } .worse { color: var(--bad); font-weight: 600; }
.undecided { color: var(--muted); }
figure { margin: 1rem 0 1.5rem; } figure svg { display: block; width: 100%; min-width: 40rem; height: auto; }
figure svg text { font-family: inherit !important; }
.warnings { border-left: 4px solid var(--series-2); background: var(--panel); padding: .6rem 1rem; margin: 1rem 0; }
.warnings ul { margin: 0; padding-left: 1.1rem; }
details { margin: .6rem 0; } summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
ol.worst { padding-left: 1.6rem; }
ol.worst li { margin: .7rem 0; }
blockquote { margin: .15rem 0 0; padding: .5rem .8rem; background: var(--panel); border-radius: 4px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote .prompt { color: var(--muted); } blockquote .empty { color: var(--muted); font-style: italic; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .92rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 36rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
"""


def page(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """A whole page.

    Args:
        title: Its heading, as text.
        lead: HTML below the heading.
        sections: Anchor, heading as text, HTML; sections without content are left out, together with their heading.
    """
    sections = [section for section in sections if section[2]]
    contents = "".join(f'<li><a href="#{anchor}">{text(name)}</a></li>' for anchor, name, _ in sections)
    body = "".join(
        f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{text(name)}</h2>{content}</section>'
        for anchor, name, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{text(title)}</title>\n'
        f"<style>{CSS}</style>\n</head>\n<body>\n<main>\n<h1>{text(title)}</h1>\n{lead}\n"
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n{body}\n</main>\n</body>\n</html>\n'
    )


def text(value: Any) -> str:
    """Any value as text that a browser shows and never obeys.

    Control characters and halves of surrogate pairs become the replacement character: a browser would drop or misread
    them, and a file cannot hold the latter.
    """
    return escape("".join(c if _printable(c) else "\ufffd" for c in str(value)), quote=True)


def _printable(character: str) -> bool:
    code = ord(character)
    return character in "\n\t" or (code >= 32 and not 127 <= code < 160 and not 0xD800 <= code < 0xE000)


def minus(numbers: str) -> str:
    """The minus sign that typesetters use; a hyphen beside digits is easily missed."""
    return numbers.replace("-", "−")


def figure_block(svg: str, caption: str) -> str:
    """A figure that scrolls in its own container; both arguments are HTML."""
    return (
        f'<figure><div class="scroll" tabindex="0" role="region" aria-label="Figure">{svg}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def table_block(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[int] = ()) -> str:
    """A table that scrolls in its own container; cells are HTML, captions and headers are text."""

    def cell(tag: str, i: int, content: str, scope: str = "") -> str:
        kind = ' class="word"' if i in words else ""
        return f"<{tag}{kind}{scope}>{content}</{tag}>"

    head = "".join(cell("th", i, text(name), ' scope="col"') for i, name in enumerate(header))
    body = "".join(
        "<tr>"
        + "".join(cell("th" if i == 0 else "td", i, c, ' scope="row"' if i == 0 else "") for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return (
        f'<p class="note">{text(caption)}</p><div class="scroll" tabindex="0" role="region" '
        f'aria-label="{text(caption)}"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
