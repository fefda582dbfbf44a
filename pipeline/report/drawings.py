"""Charts of a report as files of their own, for a README or a model card: each brings its style, light and dark."""

from __future__ import annotations

from dataclasses import replace

from markupsafe import Markup

from pipeline.report.assets import asset
from pipeline.report.charts import line_chart
from pipeline.report.figures import HALF, asr_chart
from pipeline.report.model import Report
from pipeline.report.svg import drawing, element, text
from pipeline.report.training import curve_figures


def asr_curve_svg(report: Report) -> str:
    """The ASR curve.

    Raises:
        ValueError: the run measured no ASR at any exit.
    """
    chart = asr_chart(report)
    if chart is None:
        raise ValueError("the run measured no attack success rate at any exit")
    return _alone(line_chart(replace(chart, y_label="attack success rate"), 900, 400))


def training_svg(report: Report) -> str:
    """What the training stages reported: two charts beside each other, as on the page.

    Raises:
        ValueError: no stage of the run reported anything twice.
    """
    figures, _ = curve_figures(report)
    if not figures:
        raise ValueError("no stage of the run reported how its training went")
    wide, high, head = HALF + 20, 276.0, 22.0
    parts = [
        element(
            "g",
            text(0, 14, figure.title),
            # Its own class would have it fill the whole drawing.
            element("g", Markup(str(figure.wide).replace('class="chart"', "", 1)), transform=f"translate(0 {head:g})"),
            transform=f"translate({place % 2 * wide:g} {place // 2 * high:g})",
        )
        for place, figure in enumerate(figures)
    ]
    told = "; ".join(figure.title for figure in figures)
    return _alone(drawing(2 * wide, (len(figures) + 1) // 2 * high, f"Training of {report.recipe}", told, *parts))


def _alone(drawn: Markup) -> str:
    """A drawing with its style, which the page has in its head."""
    style = Markup("<style>\n{}\n.chart {{ background: var(--paper); }}\n</style>").format(Markup(asset("charts.css")))
    head, tail = drawn.split(">", 1)
    return f"{head}>{style}{tail}\n"
