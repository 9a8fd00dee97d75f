"""One page of HTML from numbers, words and pictures: it needs no other file, and fetches none.

Nothing here knows a network, a run or a file. Texts are escaped here, so that names out of
files stay names.
"""

import base64
import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image

from kdmini.tools.draw import Figure

JPEG_QUALITY = 80
DPI = 90  # of a figure

# that nothing is fetched whatever stands in the page
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
body { margin: 0 auto; padding: 1rem; max-width: 70rem; color: #222; background: #fff;
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: .9rem; margin: 1rem 0 .3rem; }
p { max-width: 45rem; margin: .3rem 0 .8rem; }
small, figcaption { color: #555; font-size: .8rem; }
img { max-width: 100%; height: auto; display: block; }
figure { margin: 0; min-width: 0; }
.wide { overflow-x: auto; max-width: 100%; }
.wide img { max-width: none; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #e4e4e4; text-align: right;
  vertical-align: top; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 5.5rem; }
th { font-weight: 600; }
th[colspan] { text-align: center; }
.bar { position: relative; display: inline-block; height: .7rem; margin-left: .6rem;
  width: clamp(3rem, 12vw, 6rem); background: #f2f2f2; }
.bar i { position: absolute; top: 0; bottom: 0; }
.better { background: #0072b2; }
.worse { background: #d55e00; }
.pairs { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
.grid { display: flex; flex-wrap: wrap; gap: .8rem; }
.look { width: 9rem; }
.look div { position: relative; }
.look .over { position: absolute; inset: 0; opacity: var(--share); }
label { position: sticky; top: 0; z-index: 1; display: flex; gap: .6rem; align-items: center;
  max-width: 30rem; padding: .6rem 0; background: #fff; }
label input { flex: 1; min-width: 0; }
"""

SCRIPT = """
for (const slider of document.querySelectorAll(".looks input")) {
  const show = () =>
    slider.closest(".looks").style.setProperty("--share", slider.value / slider.max);
  slider.addEventListener("input", show);
  show();
}
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{sections}
<script>{script}</script>
</body>
</html>
"""

SECTION = "<section>\n<h2>{title}</h2>\n<p>{words}</p>\n{content}\n</section>"
TABLE = '<div class="wide"><table>\n{header}\n{body}\n</table></div>'
PICTURE = '<img src="{source}" alt="{name}">'
FIGURE = '<figure class="{kind}">{content}<figcaption>{caption}</figcaption></figure>'
BAR = (
    '<span class="bar"><i class="{colour}" style="left:{left:.1f}%;width:{width:.1f}%"></i></span>'
)
LOOKS = """<div class="looks" style="--share:0.5">
<label>{one} <input type="range" min="0" max="100" value="50" aria-label="{one} to {other}"> {other}
</label>
{groups}
</div>"""
LOOK = '<div><img src="{one}" alt="{name}"><img class="over" src="{other}" alt=""></div>'


class Look(NamedTuple):
    """One picture over another."""

    group: str  # that it stands in
    caption: str
    one: str  # source of an image
    other: str


# --- pictures


def source_of_image(image: Image.Image) -> str:
    """-> the image as a text, for `src`."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"


def source_of_figure(figure: Figure, kind: str = "jpeg", dpi: float = DPI) -> str:
    """kind: jpeg where there are photographs, png for lines."""
    content = io.BytesIO()
    settings = {"quality": JPEG_QUALITY} if kind == "jpeg" else {}
    figure.savefig(content, format=kind, dpi=dpi, pil_kwargs=settings)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def picture(source: str, name: str) -> str:
    return PICTURE.format(source=source, name=html.escape(name))


def captioned(content: str, caption: str, kind: str = "") -> str:
    """kind: wide for what may be scrolled sideways, look for a small one."""
    return FIGURE.format(kind=kind, content=content, caption=html.escape(caption))


def in_pairs(figures: Sequence[str]) -> str:
    """Two beside each other where there is room."""
    return f'<div class="pairs">{"".join(figures)}</div>'


def slider(looks: Sequence[Look], one: str, other: str) -> str:
    """Pictures that fade from one into the other, all of them together."""
    groups: dict[str, list[str]] = {}
    for look in looks:
        content = LOOK.format(one=look.one, other=look.other, name=html.escape(look.caption))
        groups.setdefault(look.group, []).append(captioned(content, look.caption, "look"))
    parts = [
        f'<h3>{html.escape(name)}</h3><div class="grid">{"".join(figures)}</div>'
        for name, figures in groups.items()
    ]
    return LOOKS.format(one=html.escape(one), other=html.escape(other), groups="\n".join(parts))


# --- tables and words


Columns = Mapping[str, float]
Table = Mapping[str, Columns]  # by label


def text(words: str) -> str:
    return html.escape(words)


def small(words: str) -> str:
    """On a line of its own, if there is anything."""
    return f"<div><small>{html.escape(words)}</small></div>" if words else ""


def table(
    header: Sequence[str], body: Sequence[Sequence[str]], groups: Mapping[str, int] | None = None
) -> str:
    """header: texts. body: cells of HTML. groups: texts over so many columns, after the first."""
    lines = []
    if groups:
        over = "".join(
            f'<th colspan="{columns}">{html.escape(name)}</th>' for name, columns in groups.items()
        )
        lines.append(f"<tr><th></th>{over}</tr>")
    titles = "".join(f"<th>{html.escape(title)}</th>" for title in header)
    lines.append(f"<tr>{titles}</tr>")
    rows = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    return TABLE.format(header="\n".join(lines), body="\n".join(rows))


def number(value: float, sign: str = "") -> str:
    """A dash for NaN. sign: "+" for one before a positive number too."""
    if math.isnan(value):
        return "-"
    if isinstance(value, int):
        return f"{value:{sign},}"
    return f"{round(value, 3) + 0.0:{sign}.3f}"  # -0.0 becomes 0.0


def change(value: float, largest: float, less_is_better: bool) -> str:
    """A number with its sign, and a bar from the middle; largest: that fills half of it."""
    if math.isnan(value):
        return "-"
    share = 50 * min(abs(value) / largest, 1) if largest else 0
    left = 50.0 if value >= 0 else 50 - share
    colour = "worse" if (value > 0) == less_is_better else "better"
    return number(value, "+") + BAR.format(colour=colour, left=left, width=share)


def compared(rows: Mapping[str, Table], less_is_better: bool = False) -> str:
    """One table of several: the columns of each, and behind those of each but the first how
    far its first column differs. Labels without any number there are left out.

    rows: name of each -> label -> column -> number.
    """
    (first_name, first), *others = rows.items()
    columns = list(next(iter(first.values())))
    (main, *_) = columns
    groups = {name: len(columns) + (name != first_name) for name in rows}
    header = ["", *columns, *([*columns, "difference"] * len(others))]

    nothing = dict.fromkeys(columns, math.nan)
    changes: dict[tuple[str, str], float] = {}
    labels = []
    for label, numbers in first.items():
        values = {name: own.get(label, nothing)[main] for name, own in rows.items()}
        if not all(map(math.isnan, values.values())):
            labels.append(label)
        changes |= {(name, label): values[name] - numbers[main] for name, _ in others}

    largest = max((abs(value) for value in changes.values() if not math.isnan(value)), default=0)
    body = []
    for label in labels:
        cells = [html.escape(label)]
        for name, own in rows.items():
            cells += [number(own.get(label, nothing)[column]) for column in columns]
            if name != first_name:
                cells.append(change(changes[name, label], largest, less_is_better))
        body.append(cells)
    return table(header, body, groups)


# --- the page


def section(title: str, words: str, *content: str) -> str:
    """words: what is seen, and how to read it."""
    return SECTION.format(
        title=html.escape(title), words=html.escape(words), content="\n".join(content)
    )


def page(title: str, sections: Sequence[str]) -> str:
    return PAGE.format(
        policy=POLICY,
        title=html.escape(title),
        style=STYLE,
        sections="\n".join(sections),
        script=SCRIPT,
    )
